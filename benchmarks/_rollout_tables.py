"""Tables of the recorded rollouts: results/rollout.json, of bench_rollout, and results/tool_budget.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

# The bars of DESIGN: median over traces of log-normal latencies.
OF_LOCK_STEP, OF_BOUND, OF_SIMULATED = 0.6, 1.15, 0.15


def makespan(run: Row) -> str:
    """Seconds of the collector, of lock-step rounds and of the bound, by kind of trace."""
    lines = [
        "| trace | collector, s | lock-step, s | bound, s | of lock-step | of the bound |",
        "|---|---|---|---|---|---|",
    ]
    names = {"simulated": "log-normal, simulated", "recorded": "recorded latencies, simulated"}
    for section, name in names.items():
        if section in run:
            lines.append(_makespan_row(f"{name}: median of {len(run[section]['rows'])}", run[section]["medians"]))
    if "real" in run:
        result = run["real"]
        seed, schedulers = result["workload"]["seed"], result["schedulers"]
        lines.append(_makespan_row(f"log-normal, trace {seed}, vLLM and sleeping tools", result))
        again = {f"{name}_s": scheduler["simulated_s"] for name, scheduler in schedulers.items()}
        again["of_lock_step"] = again["collector_s"] / again["lock_step_s"]
        again |= {"bound_s": result["bound_s"], "of_bound": again["collector_s"] / result["bound_s"]}
        lines.append(_makespan_row("the same trace, simulated at the speeds of that run", again))
        lines += ["", *_engines(schedulers)]
    if "recorded" in run:
        calls = run["recorded"]
        lines += [
            "",
            f"Recorded: {calls['calls']:,} calls; {1e3 * calls['p50_s']:.1f} ms at the median, "
            f"{calls['p99_s']:.2f} s at the 99th percentile, at most {calls['max_s']:.2f} s.",
        ]
    return "\n".join(lines)


def _makespan_row(name: str, row: Row) -> str:
    cells = [f"{row[column]:.1f}" for column in ("collector_s", "lock_step_s", "bound_s")]
    return f"| {name} | {' | '.join(cells)} | {row['of_lock_step']:.2f}x | {row['of_bound']:.2f}x |"


def _engines(schedulers: Row) -> list[str]:
    lines = ["Speeds of the engine in the real run, by least squares over its steps:", ""]
    for name, scheduler in schedulers.items():
        engine = scheduler["engine"]
        lines.append(
            f"- {name.replace('_', '-')}: {scheduler['steps']} steps, {scheduler['decode_s']:.1f} s; "
            f"{1e3 * engine['step_s']:.1f} ms a step, {1e3 * engine['token_s']:.2f} ms a sequence, "
            f"{1e3 * engine['admit_s']:.2f} ms a new one; real over simulated {scheduler['of_simulated']:.3f}"
        )
    return lines


def monitor(run: Row) -> str:
    """Process time of a step and of a rollout, by what is asked of the engine."""
    result = run["monitor"]
    shape = result["shape"]
    lines = [
        f"{shape['sequences']} sequences, V = {shape['vocab']:,}, {shape['turns']} turns of {shape['tokens']} tokens, "
        f"blocks of {result['block']}; medians of process time:",
        "",
        "| entropies | prefix cache | step, ms | of none | rollout, s | prompt tokens computed |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['monitor']} | {'on' if row['prefix_cache'] else 'off'} | {row['step_ms']:.2f} | "
            f"{row['of_none']:.3f}x | {row['rollout_s']:.2f} | {row['prompt_tokens']:,.0f} |"
        )
    return "\n".join(lines)


def tool_budget(run: Row) -> str:
    """Means over the seeds, the tool calls with their range."""
    shape, seeds = run["shape"], len(run["rows"][0]["seconds"])
    chain = next((statistics.fmean(row["tool_calls"]) for row in run["rows"] if row["policy"] == "chain"), None)
    lines = [
        f"{shape['prompts']} prompts, M = {shape['paths']}, N = {shape['initial_paths']}, means of {seeds} seeds:",
        "",
        "| policy | tool calls | range | of `chain` | distinct | sampled tokens | forks | fresh paths | accuracy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in run["rows"]:
        calls = statistics.fmean(row["tool_calls"])
        means = [f"{statistics.fmean(row[n]):,.0f}" for n in ("ran", "sampled_tokens", "forks", "fresh_paths")]
        share = "" if chain is None else f"{calls / chain:.0%}"
        lines.append(
            f"| `{row['policy']}` | {calls:,.0f} | {_range(row['tool_calls'])} | {share} | {' | '.join(means)} | "
            f"{statistics.fmean(row['accuracy']):.3f} |"
        )
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):,.0f} to {max(values):,.0f}"
