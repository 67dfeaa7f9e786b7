"""`arpo-ext train` in two processes, each with a vLLM engine of its own, started by `accelerate launch`."""

import json
import math
from pathlib import Path

import pytest
import yaml
from ranks import launch

from examples.lookup_and_compute.build import build

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CONFIG = Path(__file__).parents[1] / "examples" / "lookup_and_compute" / "train.yaml"
# Three prompts on two ranks. The rate is high, so that an engine that missed a push would sample from another model.
SETTINGS = [
    *("train.steps=2", "train.prompts_per_step=3", "rollout.paths=4", "rollout.initial_paths=2", "train.lr=1e-2"),
    # An untrained model earns nothing: what moves it is the bonus.
    *("train.kl_coef=0.01", "train.entropy_coef=0.1", "train.eval_every=0", "rollout.max_response_tokens=24"),
]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    build(folder, seed=0)
    for name in ("train", "heldout"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()[:5]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    config = yaml.safe_load(CONFIG.read_text())
    config["model"]["path"] = str(folder / "model")
    config["data"] = {"train": str(folder / "train.jsonl"), "eval": {"heldout": str(folder / "heldout.jsonl")}}
    config["tools"]["search"]["corpus"] = str(folder / "corpus.jsonl")
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    return folder / "train.yaml"


@pytest.mark.parametrize(
    ("flags", "override"),
    [(["--multi_gpu"], "engine.own_process=true"), (["--use_fsdp", "--fsdp_version", "2"], "engine.own_process=false")],
    ids=["ddp", "fsdp2"],
)
def test_each_rank_samples_from_the_weights_in_training(task, tmp_path, flags, override):
    run = tmp_path / "run"
    overrides = [f"output_dir={run}", override, *SETTINGS]
    output = launch(flags, ["-m", "arpo_ext", "train", "--config", str(task), *overrides])
    assert output.count("report: ") == 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in rows] == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2)]
    for row in rows:
        if row["kind"] == "eval":
            assert row["eval/heldout/sampled/questions"] == 5
        else:
            # Of all ranks, in the second step after an update.
            assert row["train/logprob_gap_max"] < 1e-3
            assert row["train/rank_imbalance"] >= 1
            assert math.isfinite(row["train/loss"])
    assert rows[2]["train/ref_kl"] > 1e-3
    assert len(list((run / "checkpoints").iterdir())) == 1
