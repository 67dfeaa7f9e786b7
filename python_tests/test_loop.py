"""The loop end to end on one process: a tiny model, trees sampled by plain torch, no engine."""

import functools
import json
import random
import statistics
from dataclasses import dataclass, field, replace

import pytest
import torch
from tiny import SPECIALS, VOCAB, tiny_model, tiny_tokenizer, tree

from arpo_ext.config import Config
from arpo_ext.errors import CheckpointError, DataError
from arpo_ext.tracking import Tracker
from arpo_ext.training import named_weights, train
from arpo_ext.types import Prompt, RolloutTree

FIRST_LETTER = len(SPECIALS)
PROMPTS = [Prompt(str(i), ({"role": "user", "content": "?"},), ("a",)) for i in range(6)]
TRAIN_METRICS = {
    "reward/mean", "reward/accuracy", "reward/std", "rollout/tool_calls", "train/loss", "train/grad_norm",
    "train/clip_fraction", "train/entropy", "train/logprob_gap_mean", "train/logprob_gap_max", "train/ratio_max",
    "train/seconds", "push/seconds",
}  # fmt: skip


class Killed(Exception):
    """Stands for a process that dies in the middle of a step."""


@dataclass
class Collected:
    trees: list[RolloutTree]
    metrics: dict[str, float] = field(default_factory=lambda: {"rollout/tool_calls": 0.0})


class Bandit:
    """Prompt i shows letter i; the answer is two sampled tokens, right if both are the letter after it.

    The sampler holds a copy of the weights, as an engine does: it learns of an update only by `push`. Half of the paths
    fork after the first token.
    """

    def __init__(self, model, paths: int = 8, die_at: int | None = None) -> None:
        self.sampler = tiny_model(seed=99)
        self.paths, self.die_at = paths, die_at
        self.calls: list[tuple[str, int]] = []
        self.drawn: list[list[str]] = []

    def collect(self, prompts, step, attempt):
        self.calls.append(("collect", step))
        self.drawn.append([prompt.id for prompt in prompts])
        if step == self.die_at:
            raise Killed
        # Draws from all three global generators: a resumed run has to find them where they were.
        torch.manual_seed(int(torch.randint(1 << 30, ())) ^ random.getrandbits(20))
        return Collected([self.sample(prompt, step) for prompt in prompts])

    def sample(self, prompt, step):
        shown = FIRST_LETTER + int(prompt.id)
        segments, leaves, logprobs = [(-1, (shown, 1), False)], [], [()]

        @functools.cache
        def distribution(*context):
            with torch.no_grad():
                return torch.log_softmax(self.sampler(input_ids=torch.tensor([context])).logits[0, -1], -1)

        def turn(parent, *context):
            row = distribution(*context)
            token = int(torch.multinomial(row.exp(), 1))
            segments.append((parent, (token,), True))
            logprobs.append((float(row[token]),))
            return token

        for _ in range(self.paths // 2):
            first = turn(0, shown, 1)
            fork = len(segments) - 1
            for _ in range(2):
                second = turn(fork, shown, 1, first)
                correct = (first == shown + 1) + (second == shown + 1)
                leaves.append((len(segments) - 1, correct / 2))
        sampled = tree(segments, leaves, prompt_id=prompt.id)
        filled = [replace(s, logprobs=own) for s, own in zip(sampled.segments, logprobs, strict=True)]
        return replace(sampled, segments=tuple(filled))

    def score(self, trees):
        self.calls.append(("score", len(trees)))
        return [
            replace(t, leaves=tuple(replace(leaf, accuracy=float(leaf.reward == 1)) for leaf in t.leaves))
            for t in trees
        ]

    def push(self, model):
        self.calls.append(("push", 0))
        missing = self.sampler.load_state_dict(dict(named_weights(model)), strict=False).missing_keys
        assert missing == ["lm_head.weight"]
        return 0.25

    def evaluate(self, step):
        self.calls.append(("evaluate", step))
        return {"eval/set/sampled/accuracy": step / 100}


def config(folder, *, trees_per_step=2, **settings) -> Config:
    section = {"steps": 4, "prompts_per_step": 4, "lr": 3e-3, "micro_batch_rows": 8, **settings}
    tracking = {"tensorboard": False, "progress": False, "trees_per_step": trees_per_step}
    return Config.model_validate({"output_dir": folder, "train": section, "tracking": tracking, "seed": 5})


def run(folder, *, die_at=None, prompts=PROMPTS, paths=8, model=None, **settings):
    own = config(folder, **settings)
    model = model or tiny_model(seed=3)
    bandit = Bandit(model, paths=paths, die_at=die_at)
    with Tracker(own.output_dir, own.tracking) as tracker:
        train(
            own,
            model=model,
            prompts=prompts,
            collect=bandit.collect,
            score=bandit.score,
            push=bandit.push,
            evaluate=bandit.evaluate,
            tracker=tracker,
            tokenizer=tiny_tokenizer(),
        )
    return bandit, model


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_reward_rises(tmp_path):
    run(tmp_path, steps=30, prompts_per_step=6, lr=1e-2, paths=16)
    rewards = [row["reward/mean"] for row in read(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert sum(rewards[:3]) / 3 < 0.3
    assert sum(rewards[-3:]) / 3 > 0.8


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
    "settings", [{}, {"updates_per_step": 2, "old_logprob": "trainer", "credit": "hard"}], ids=["plain", "two updates"]
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, settings):
    settings = {"steps": 6, "save_every": 2, "eval_every": 3, **settings}
    whole, whole_model = run(tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        run(tmp_path / "killed", die_at=6, **settings)
    # Step 5 ran and was recorded, but the last checkpoint is of step 4: the resumed run does step 5 again.
    assert read(tmp_path / "killed" / "metrics.jsonl")[-1]["step"] == 5
    resumed, resumed_model = run(tmp_path / "killed", resume=True, model=tiny_model(seed=8), **settings)

    assert resumed.calls[:2] == [("push", 0), ("collect", 5)]
    assert resumed.drawn == whole.drawn[4:]
    for (name, a), b in zip(whole_model.state_dict().items(), resumed_model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    timed = ("time_s", "train/seconds")
    a, b = (
        [{k: v for k, v in row.items() if k not in timed} for row in read(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "killed")
    )
    assert a == b
    assert read(tmp_path / "whole" / "trees.jsonl") == read(tmp_path / "killed" / "trees.jsonl")


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
