"""A training run of seconds without an engine: a tiny model, trees sampled by plain torch."""

import functools
import random
from dataclasses import dataclass, field, replace

import torch
from tiny import SPECIALS, tiny_model, tiny_tokenizer, tree

from arpo_ext.config import Config
from arpo_ext.tracking import Tracker
from arpo_ext.training import named_weights, train
from arpo_ext.types import Prompt, RolloutTree

FIRST_LETTER = len(SPECIALS)
PROMPTS = [Prompt(str(i), ({"role": "user", "content": "?"},), ("a",)) for i in range(6)]


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
        self.steps: list[int] = []

    def collect(self, prompts, step, attempt):
        self.calls.append(("collect", step))
        self.drawn.append([prompt.id for prompt in prompts])
        self.steps.append(step)
        if step == self.die_at:
            raise Killed
        # Draws from all three global generators: a resumed run has to find them where they were.
        torch.manual_seed(int(torch.randint(1 << 30, ())) ^ random.getrandbits(20))
        return Collected([self.sample(prompt, step) for prompt in prompts])

    def sample(self, prompt, step):
        shown = FIRST_LETTER + int(prompt.id)
        segments, leaves, logprobs, entropies = [(-1, (shown, 1), False)], [], [()], [()]

        @functools.cache
        def distribution(*context):
            with torch.no_grad():
                return torch.log_softmax(self.sampler(input_ids=torch.tensor([context])).logits[0, -1], -1)

        def turn(parent, *context):
            row = distribution(*context)
            token = int(torch.multinomial(row.exp(), 1))
            segments.append((parent, (token,), True))
            logprobs.append((float(row[token]),))
            entropies.append((float(-(row.exp() * row).sum()),))
            return token

        for _ in range(self.paths // 2):
            first = turn(0, shown, 1)
            fork = len(segments) - 1
            for _ in range(2):
                second = turn(fork, shown, 1, first)
                correct = (first == shown + 1) + (second == shown + 1)
                leaves.append((len(segments) - 1, correct / 2))
        sampled = tree(segments, leaves, prompt_id=prompt.id)
        measured = zip(sampled.segments, logprobs, entropies, strict=True)
        filled = [replace(s, logprobs=own, entropies=spread) for s, own, spread in measured]
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


def config(folder, *, trees_per_step=2, algorithm=None, **settings) -> Config:
    section = {"steps": 4, "prompts_per_step": 4, "lr": 3e-3, "micro_batch_rows": 8, **settings}
    tracking = {"tensorboard": False, "progress": False, "trees_per_step": trees_per_step}
    return Config.model_validate(
        {"output_dir": folder, "algorithm": algorithm, "train": section, "tracking": tracking, "seed": 5}
    )


def run(folder, *, die_at=None, prompts=PROMPTS, paths=8, model=None, change=lambda bandit: None, **settings):
    own = config(folder, **settings)
    model = model or tiny_model(seed=3)
    bandit = Bandit(model, paths=paths, die_at=die_at)
    change(bandit)
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
