"""The whole example: build, cold start in two stages, ARPO with an evaluation before and after, report.

`python -m examples.lookup_and_compute.demo [--seed S] [--out DIR] [--smoke]` runs the commands that README.md lists,
in this process. `--smoke` takes a few steps only, to check the path in about a minute: its accuracies mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Matrices this small are slower on two threads than on one, several times so on a busy machine. Read when torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from arpo_ext.cli import main as arpo_ext
from arpo_ext.errors import ConfigError
from examples.lookup_and_compute.build import PROMPTS, build

CONFIGS = Path(__file__).parent
RUNS = Path("runs/lookup_and_compute")
SMOKE = {
    "sft_1": ["sft.steps=40"],
    "sft_2": ["sft.steps=5"],
    "train": [
        *("train.steps=2", "train.prompts_per_step=4", "train.eval_every=0"),
        *("rollout.paths=4", "rollout.initial_paths=2", "data.limit=16"),
    ],
}


def main(argv: list[str] | None = None) -> int:
    """Run everything; the exit code of the first command that fails, or 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the world, the weights and every draw")
    parser.add_argument("--out", type=Path, help=f"new folder for everything; default: the next free one in {RUNS}")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to check that everything works")
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        out = _new_folder(arguments.out, arguments.seed)
    except ConfigError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    print(f"== build the task in {out / 'data'}", flush=True)
    build(out / "data", arguments.seed)
    for command, name in (("sft", "sft_1"), ("sft", "sft_2"), ("train", "train")):
        print(f"\n== {name}: arpo-ext {command}, {time.perf_counter() - started:.0f} s after the start", flush=True)
        overrides = [*_overrides(name, out, arguments.seed), *(SMOKE[name] if arguments.smoke else [])]
        code = arpo_ext([command, "--config", str(CONFIGS / f"{name}.yaml"), *overrides])
        if code:
            return code
    summary = summarize(out / "train", arguments.seed, time.perf_counter() - started)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"largest gap between the log-probabilities of sampler and trainer: {summary['logprob_gap_max']:.1e}")
    print(f"total: {summary['seconds']} s, seed {arguments.seed}")
    return 0


def summarize(run: Path, seed: int, seconds: float) -> dict[str, Any]:
    """The run in numbers: every evaluation before and after training, what training cost, and on which machine."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    steps = [row for row in rows if row["kind"] == "train"]
    totals = ("tool_calls", "sampled_tokens", "forks", "fresh_paths")
    return {
        "seed": seed,
        "seconds": round(seconds),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cores": os.cpu_count(), "processor": _processor()},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "arpo-ext")},
        "before": _measures(evaluations[0]),
        "after": _measures(evaluations[-1]),
        "steps": len(steps),
        **{f"training_{name}": sum(row[f"rollout/{name}"] for row in steps) for name in totals},
        "logprob_gap_max": max(row["train/logprob_gap_max"] or 0.0 for row in steps),
    }


def _measures(row: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}


def _processor() -> str:
    """As the kernel names it; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _new_folder(wanted: Path | None, seed: int) -> Path:
    """`wanted`, or the next free folder for this seed. ConfigError if `wanted` holds something."""
    if wanted is None:
        names = itertools.chain([f"seed_{seed}"], (f"seed_{seed}_run_{n}" for n in itertools.count(2)))
        return next(RUNS / name for name in names if not (RUNS / name).exists())
    if wanted.exists() and not (wanted.is_dir() and not any(wanted.iterdir())):
        raise ConfigError(f"--out {wanted} exists and is not an empty folder; expected a new one")
    return wanted


def _overrides(name: str, out: Path, seed: int) -> list[str]:
    """The paths of one command, moved from the defaults in its YAML file to `out`."""
    data = out / "data"
    model = {"sft_1": data / "model", "sft_2": out / "sft_1" / "model", "train": out / "sft_2" / "model"}[name]
    overrides = [f"seed={seed}", f"output_dir={out / name}", f"model.path={model}"]
    if name == "train":
        sets = [f"data.eval.{split}={data / split}.jsonl" for split in PROMPTS if split != "train"]
        return [*overrides, f"data.train={data / 'train.jsonl'}", *sets, f"tools.search.corpus={data / 'corpus.jsonl'}"]
    return [*overrides, f"sft.data={data / name.replace('sft', 'demos')}.jsonl"]


if __name__ == "__main__":
    sys.exit(main())
