"""The loop end to end on one process: a tiny model, trees sampled by plain torch, no engine."""

import itertools
import json
import os
import signal
import statistics
from dataclasses import replace

import pytest
import torch
from bandit import PROMPTS, Killed, run
from tiny import VOCAB, tiny_model

from arpo_ext.algorithms import ALGORITHMS
from arpo_ext.errors import CheckpointError, ConfigError, DataError, ModelError
from arpo_ext.training.checkpoint_folder import best
from arpo_ext.training.termination import Terminated
from arpo_ext.types import RolloutTree

TRAIN_METRICS = {
    "reward/mean", "reward/accuracy", "reward/std", "rollout/tool_calls", "train/loss", "train/grad_norm",
    "train/lr", "train/clip_fraction", "train/entropy", "train/logprob_gap_mean", "train/logprob_gap_max",
    "train/ratio_max", "train/seconds", "push/seconds", "reward/format", "tokens/unique", "memory/peak_gib",
}  # fmt: skip


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_reward_rises(tmp_path):
    run(tmp_path, steps=30, prompts_per_step=6, lr=1e-2, paths=16)
    rewards = [row["reward/mean"] for row in read(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert sum(rewards[:3]) / 3 < 0.3
    assert sum(rewards[-3:]) / 3 > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_learns(tmp_path, algorithm):
    settings = {"steps": 30, "prompts_per_step": 6, "lr": 1e-2, "updates_per_step": 2}
    run(tmp_path, algorithm=algorithm, paths=12, **settings)
    rewards = [row["reward/mean"] for row in read(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    first, last = rewards[:10], rewards[-10:]
    error = ((statistics.variance(first) + statistics.variance(last)) / 10) ** 0.5
    assert statistics.fmean(last) - statistics.fmean(first) > 2 * error


@pytest.mark.parametrize("credit", ["soft", "hard"])
def test_order_of_the_parts_and_what_is_written(tmp_path, credit):
    bandit, model = run(tmp_path, eval_every=2, steps=3, credit=credit)
    step = [("score", 4), ("push", 0)]
    assert bandit.calls == [
        ("push", 0), ("evaluate", 0),
        ("collect", 1), *step,
        ("collect", 2), *step, ("evaluate", 2),
        ("collect", 3), *step, ("evaluate", 3),
    ]  # fmt: skip
    rows = read(tmp_path / "metrics.jsonl")
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("eval", 3)
    ]  # fmt: skip
    first = rows[1]
    assert first.keys() >= TRAIN_METRICS
    assert first["push/seconds"] == 0.25
    # The sampler has the trainer's weights from the first step on, and after every push.
    assert all(row["train/logprob_gap_max"] < 1e-5 for row in rows if row["kind"] == "train")
    trees = [RolloutTree.from_json(row) for row in read(tmp_path / "trees.jsonl")]
    assert [t.metadata["step"] for t in trees] == [1, 1, 2, 2, 3, 3]
    assert all(leaf.advantage is not None and leaf.accuracy is not None for t in trees for leaf in t.leaves)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(saved.state_dict()[name], value) for name, value in model.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == VOCAB
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000003"]


def test_reward_metrics_are_over_all_leaves(tmp_path):
    # After a dozen steps rewards differ.
    run(tmp_path, steps=12, paths=4, lr=1e-2, trees_per_step=4)
    *_, row = [row for row in read(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    rewards = [leaf["reward"] for tree in read(tmp_path / "trees.jsonl")[-4:] for leaf in tree["leaves"]]
    assert len(rewards) == 16
    assert row["reward/mean"] == pytest.approx(statistics.fmean(rewards))
    assert row["reward/std"] == pytest.approx(statistics.pstdev(rewards))
    assert row["reward/accuracy"] == sum(reward == 1 for reward in rewards) / 16


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"updates_per_step": 2, "old_logprob": "trainer", "credit": "hard"},
        {"dynamic_sampling": 2, "kl_coef": 0.1, "prompts_per_step": 2},
    ],
    ids=["plain", "two updates", "refilled, with a reference"],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, settings):
    settings = {"steps": 6, "save_every": 2, "eval_every": 3, **settings}
    whole, whole_model = run(tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        run(tmp_path / "killed", die_at=6, **settings)
    # Step 5 ran and was recorded, but the last checkpoint is of step 4: the resumed run does step 5 again.
    assert read(tmp_path / "killed" / "metrics.jsonl")[-1]["step"] == 5
    other = None if "kl_coef" in settings else tiny_model(seed=8)
    resumed, resumed_model = run(tmp_path / "killed", resume=True, model=other, **settings)

    assert resumed.calls[:2] == [("push", 0), ("collect", 5)]
    assert resumed.drawn == whole.drawn[whole.steps.index(5) :]
    for (name, a), b in zip(whole_model.state_dict().items(), resumed_model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    timed = ("time_s", "train/seconds", "memory/peak_gib")
    a, b = (
        [{k: v for k, v in row.items() if k not in timed} for row in read(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "killed")
    )
    assert a == b
    assert read(tmp_path / "whole" / "trees.jsonl") == read(tmp_path / "killed" / "trees.jsonl")


def test_prompts_without_spread_are_replaced_and_still_counted(tmp_path):
    bandit, _ = run(tmp_path, steps=1, prompts_per_step=3, dynamic_sampling=2, paths=2, trees_per_step=10)
    # The sampler knows nothing yet: two paths with different rewards are rare.
    assert bandit.steps == [1, 1, 1]
    assert [name for own in bandit.drawn for name in own][:6] == [name for own in bandit.drawn[:2] for name in own]
    assert len({name for own in bandit.drawn[:2] for name in own}) == 6
    (row,) = [row for row in read(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    sampled = sum(len(own) for own in bandit.drawn)
    trained = len(read(tmp_path / "trees.jsonl")) if (tmp_path / "trees.jsonl").exists() else 0
    assert row["reward/flat_groups"] == pytest.approx(1 - trained / sampled)
    *_, state = sorted((tmp_path / "checkpoints").glob("*/state.json"))
    assert json.loads(state.read_text())["position"] == sampled


def test_the_reference_is_the_model_that_the_run_began_with(tmp_path):
    settings = {"kl_coef": 0.05, "paths": 16, "prompts_per_step": 6, "lr": 1e-2}
    run(tmp_path, steps=2, **settings)
    with pytest.raises(CheckpointError, match="was made with reference"):
        run(tmp_path, steps=3, resume=True, model=tiny_model(seed=4), **settings)
    run(tmp_path, steps=3, resume=True, **settings)
    rows = [row for row in read(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    # Exactly 0 against itself, then it grows; the resumed step is measured against the same model.
    assert [row["train/ref_kl"] > 1e-6 for row in rows] == [False, True, True]
    assert rows[2]["train/ref_kl"] > rows[1]["train/ref_kl"]


def test_a_finished_run_resumed_does_nothing_but_write_the_model(tmp_path):
    run(tmp_path, steps=2)
    before = (tmp_path / "metrics.jsonl").read_text()
    bandit, _ = run(tmp_path, steps=2, resume=True)
    assert bandit.calls == [("push", 0)]
    assert (tmp_path / "metrics.jsonl").read_text() == before
    longer, _ = run(tmp_path, steps=3, resume=True)
    assert ("collect", 3) in longer.calls


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, die_at=2)
    bandit, _ = run(tmp_path, resume=True, steps=2)
    assert bandit.calls[:2] == [("push", 0), ("evaluate", 0)]
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [0, 1, 2, 2]


def test_a_used_folder_and_foreign_checkpoints_are_refused(tmp_path):
    run(tmp_path, steps=1)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match=r"holds step_000001 of a run; expected train\.resume=true or another"):
        run(tmp_path, steps=1)
    with pytest.raises(CheckpointError, match=r"was made with prompts '\w+'; this run has '\w+'"):
        run(tmp_path, steps=2, resume=True, prompts=PROMPTS[:5])
    with pytest.raises(CheckpointError, match="holds another model"):
        run(tmp_path, steps=2, resume=True, model=tiny_model(layers=3))
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_no_prompts_is_an_error(tmp_path):
    with pytest.raises(DataError, match="got no prompts to train on"):
        run(tmp_path, prompts=[])
    assert not (tmp_path / "checkpoints").exists()


def test_every_prompt_is_drawn_once_an_epoch(tmp_path):
    bandit, _ = run(tmp_path, steps=3, paths=2)
    drawn = [name for step in bandit.drawn for name in step]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == [prompt.id for prompt in PROMPTS]


def read_untimed(folder):
    timed = ("time_s", "train/seconds", "memory/peak_gib")
    return [{k: v for k, v in row.items() if k not in timed} for row in read(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("where", "time", "left"),
    [
        ("evaluate", 1, None),
        ("collect", 1, "step_000000"),
        ("collect", 2, "step_000001"),  # sampling is cut off, and saved is where step 1 had ended
        ("score", 2, "step_000001"),
        ("push", 3, "step_000002"),  # inside step 2, which is finished first
        ("evaluate", 2, "step_000002"),  # the evaluation of step 2 is owed
    ],
)
def test_sigterm_saves_and_the_resumed_run_misses_nothing(tmp_path, where, time, left):
    settings = {"steps": 4, "eval_every": 2}
    _, whole_model = run(tmp_path / "whole", **settings)

    def killing(bandit):
        call, times = getattr(bandit, where), itertools.count(1)

        def wrapped(*arguments):
            if next(times) == time:
                os.kill(os.getpid(), signal.SIGTERM)
            return call(*arguments)

        setattr(bandit, where, wrapped)

    with pytest.raises(Terminated):
        run(tmp_path / "stopped", change=killing, **settings)
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoints/*")] == ([left] if left else [])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    # Without a checkpoint the run begins anew, from the weights it began with.
    _, model = run(tmp_path / "stopped", resume=True, model=tiny_model(seed=8) if left else None, **settings)
    for (name, a), b in zip(whole_model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert read_untimed(tmp_path / "whole") == read_untimed(tmp_path / "stopped")
    assert read(tmp_path / "whole" / "trees.jsonl") == read(tmp_path / "stopped" / "trees.jsonl")


def test_checkpoints_that_stay_are_the_last_and_the_best(tmp_path):
    run(tmp_path, steps=8, save_every=1, lr=1e-2, keep_checkpoints=2)
    rewards = {row["step"]: row["reward/mean"] for row in read(tmp_path / "metrics.jsonl") if row["kind"] == "train"}
    top = max(rewards, key=lambda step: (rewards[step], step))
    expected = {f"step_{step:06d}" for step in (7, 8, top)}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == expected
    assert best(tmp_path, "reward/mean").name == f"step_{top:06d}"


def test_a_metric_that_does_not_exist_cannot_be_the_best(tmp_path):
    with pytest.raises(
        ConfigError, match=r"best_metric is 'reward/maen', which this run does not measure; .*'reward/mean'"
    ):
        run(tmp_path / "a", best_metric="reward/maen")
    with pytest.raises(ConfigError, match=r"best_metric is 'eval/set/accuracy'.*'eval/set/sampled/accuracy'"):
        run(tmp_path / "b", best_metric="eval/set/accuracy")
    run(tmp_path / "c", steps=2, best_metric="eval/set/sampled/accuracy")
    assert best(tmp_path / "c", "eval/set/sampled/accuracy").name == "step_000002"


def test_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_trees(tmp_path):
    def spoil(bandit):
        score = bandit.score

        def scored(trees):
            return [replace(t, leaves=(replace(t.leaves[0], reward=1e38), *t.leaves[1:])) for t in score(trees)]

        bandit.score = scored

    with pytest.raises(
        ModelError, match=r"gradient norm is (nan|inf).*the trees of the step are in .*failed_step_000001"
    ):
        run(tmp_path, change=spoil, estimator="none", lr=1.0)
    (path,) = tmp_path.glob("failed_step_*.jsonl")
    assert len([RolloutTree.from_json(row) for row in read(path)]) == 4
    assert not (tmp_path / "checkpoints").exists()


def test_the_learning_rate_follows_the_step_through_a_resume(tmp_path):
    settings = {"steps": 4, "lr": 0.01, "warmup_steps": 2, "decay_fraction": 0.5, "save_every": 1}
    with pytest.raises(Killed):
        run(tmp_path, die_at=3, **settings)
    run(tmp_path, resume=True, **settings)
    rates = [row["train/lr"] for row in read(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005])
