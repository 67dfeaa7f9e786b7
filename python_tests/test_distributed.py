"""Two processes joined by gloo do what one process does, also when one of them has fewer micro-batches or none."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import forked_tree, tiny_model, tiny_tokenizer

from arpo_ext.config import Config, TrainConfig
from arpo_ext.data import Demo, DemoSegment
from arpo_ext.tracking import Tracker
from arpo_ext.training import checkpoint, sft
from arpo_ext.training.advantages import credit_trees
from arpo_ext.training.batch import plan_updates
from arpo_ext.training.step import policy_step, prepare

STEPS = 2


def policy_run(folder: Path) -> None:
    """Two steps over trees dealt to the ranks, and a checkpoint; in the first step rank 1 of 2 has no row to train."""
    config = TrainConfig(lr=1e-2, micro_batch_rows=2, loss_scale="sequence_mean")
    accelerator, model, optimizer = prepare(tiny_model(), config)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    for step in range(STEPS):
        rewards = [(1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.5, 1.0), (0.0, 0.0, 0.0)]
        if step == 1:
            rewards[1] = (0.0, 0.0, 3.0)
        trees = [forked_tree(own, prompt_id=str(i)) for i, own in enumerate(rewards)][rank::ranks]
        updates = plan_updates(credit_trees(trees, estimator="grpo"), config, seed=0, pad_token=0)
        metrics = policy_step(accelerator, model, optimizer, updates, config, temperature=1.0, pad_token=0)
    checkpoint.save(
        folder,
        checkpoint.RunState(STEPS, 8),
        {},
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        tokenizer=tiny_tokenizer(),
    )
    if accelerator.is_main_process:
        torch.save(metrics, folder / "metrics.pt")


def sft_run(folder: Path) -> None:
    """Batches of 5 rows over 2 ranks: one rank has a row fewer."""
    demos = [
        Demo((DemoSegment(train=False, text="a" * n), DemoSegment(train=True, text="b" * n + "<eos>")))
        for n in range(1, 8)
    ]
    config = Config.model_validate(
        {
            "output_dir": folder,
            "sft": {"steps": 3, "batch_size": 5, "micro_batch_size": 2, "warmup_steps": 0},
            "tracking": {"tensorboard": False, "progress": False},
        }
    )
    with Tracker(folder, config.tracking) as tracker:
        sft(config, model=tiny_model(), tokenizer=tiny_tokenizer(), demos=demos, tracker=tracker)


def runs(folder: Path) -> None:
    for name, run in (("policy", policy_run), ("sft", sft_run)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        run(folder / name)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    here = Path(__file__)
    ranks = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]),
        }
        command = [
            sys.executable,
            "-c",
            f"import test_distributed as t; t.runs(t.Path({str(tmp_path / 'two')!r}))",
        ]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        outputs = [process.communicate(timeout=240)[0].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)

    runs(tmp_path / "one")
    for part in ("policy/checkpoints/step_000002/model", "sft/model"):
        two, one = (tiny_model().from_pretrained(tmp_path / count / part) for count in ("two", "one"))
        for (name, a), b in zip(two.state_dict().items(), one.state_dict().values(), strict=True):
            assert torch.allclose(a, b, atol=5e-5), f"{part}: {name} is off by {float((a - b).abs().max())}"
    two, one = (torch.load(tmp_path / count / "policy" / "metrics.pt") for count in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    rng = torch.load(tmp_path / "two" / "policy" / "checkpoints" / "step_000002" / "rng.pt")
    assert len(rng) == 2
