"""How long a collection takes while tools answer late: the collector, lock-step rounds, and what no scheduler can beat.

    python -m benchmarks.bench_rollout [--seeds 10] [--json FILE]

A discrete-event run: the collector is the real one, the engine and the tools move a clock instead of taking time
(`_rollout_sim`). 64 prompts x 8 paths, 3 tool calls each, log-normal latencies of median 1 s and sigma 1; every seed is
a trace that all three share. Engine: 5 ms a step and 0.17 ms a sequence, what vLLM takes for a tiny model on two cores.

Left out: forks (every path begins at the prompt, so that lock-step rounds do the same work), the collector's own time,
which is not on the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict

from ._rollout_sim import Engine, Workload, bound_s, collector_makespan_s, lock_step_makespan_s


def run(seeds: int, engine: Engine, workload: Workload) -> list[dict[str, float]]:
    """One row a trace: seconds of each, and the two ratios."""
    rows = []
    for seed in range(seeds):
        trace = Workload(**{**asdict(workload), "seed": seed})
        collector, lock_step = collector_makespan_s(engine, trace), lock_step_makespan_s(engine, trace)
        bound = bound_s(engine, trace)
        rows.append(
            {
                "seed": seed,
                "collector_s": collector,
                "lock_step_s": lock_step,
                "bound_s": bound,
                "of_lock_step": collector / lock_step,
                "of_bound": collector / bound,
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_rollout", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10, help="traces of tool latencies (default 10)")
    parser.add_argument("--prompts", type=int, default=Workload.prompts)
    parser.add_argument("--tokens", type=int, default=Workload.tokens, help="mean tokens of a turn (default 32)")
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args(argv)
    engine, workload = Engine(), Workload(prompts=arguments.prompts, tokens=arguments.tokens)
    rows = run(arguments.seeds, engine, workload)
    print(f"{'trace':>6}{'collector s':>13}{'lock-step s':>13}{'bound s':>9}{'of lock-step':>14}{'of bound':>10}")
    for row in rows:
        print(f"{row['seed']:>6}{row['collector_s']:>13.1f}{row['lock_step_s']:>13.1f}{row['bound_s']:>9.1f}", end="")
        print(f"{row['of_lock_step']:>14.2f}{row['of_bound']:>10.2f}")
    medians = {name: statistics.median(row[name] for row in rows) for name in ("of_lock_step", "of_bound")}
    print(f"median {medians['of_lock_step']:.2f} of lock-step, {medians['of_bound']:.2f} of the bound")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(
                {"engine": asdict(engine), "workload": asdict(workload), "rows": rows, "medians": medians},
                file,
                indent=1,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
