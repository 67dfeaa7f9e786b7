"""The loss and gradient of the trainer against those of TRL's GRPOTrainer: the same rows, model and settings."""

import pytest
import torch
from test_algorithms import configured, gradient_by_step, gradient_of, made_trees, relative, row_logprobs
from tiny import tiny_model

from arpo_ext.training.advantages import credit_trees
from arpo_ext.training.forward import prepare_model
from benchmarks import _peers
from benchmarks._harness import Unavailable


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    prepare_model(model, packed=True)
    return model


def columns(model, trees, advantages, reference):
    """TRL's form of the rollouts: completions [B, T] padded on the right, tool results and padding masked."""
    rows = []
    own = iter(advantages)
    for rollout_tree in trees:
        for leaf in rollout_tree.leaves:
            tokens, advantage = rollout_tree.path_tokens(leaf.segment), next(own)
            segments = list(rollout_tree.response_segments(leaf))
            prompt = len(rollout_tree.segments[0].tokens)
            mask = torch.tensor([float(s.sampled) for s in segments for _ in s.tokens])
            old = torch.tensor([x for s in segments for x in (s.logprobs or [-9.0] * len(s.tokens))])
            new = row_logprobs(model, tokens)[prompt - 1 :]
            ref = row_logprobs(reference, tokens)[prompt - 1 :].detach()
            rows.append((new, old, torch.tensor(advantage), mask, ref))
    new, old, advantage, mask, ref = zip(*rows, strict=True)
    padded = [torch.nn.utils.rnn.pad_sequence(list(column), batch_first=True) for column in (new, old, mask, ref)]
    return padded[0], padded[1], torch.stack(advantage), padded[2], padded[3]


@pytest.mark.parametrize("noise", [0.0, 0.004, 0.6])
@pytest.mark.parametrize(
    ("name", "train", "theirs"),
    [
        ("grpo", {}, {"loss_type": "grpo"}),
        ("grpo", {"kl_coef": 0.2}, {"loss_type": "grpo", "beta": 0.2}),
        ("dr_grpo", {"loss_length": 20}, {"loss_type": "dr_grpo", "length": 20}),
        ("dapo", {}, {"loss_type": "dapo", "clip_high": 0.28}),
        ("gspo", {}, {"loss_type": "grpo", "level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}),
        ("cispo", {}, {"loss_type": "cispo", "clip_high": 5.0}),
    ],
    ids=["grpo", "grpo with KL", "dr_grpo", "dapo", "gspo", "cispo"],
)
def test_loss_and_gradient_are_those_of_trl(model, name, train, theirs, noise):
    try:
        loss_of = _peers.trl_policy_loss(**{"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, **theirs})
    except Unavailable as error:
        pytest.skip(str(error))
    # Shaping of rewards is not part of the loss.
    config, reference = configured(name, overlong_share=0.0, **train), tiny_model(seed=1).eval()
    trees = made_trees(model, noise)
    credited = credit_trees(trees, estimator=config.train.estimator)
    advantages = [leaf.advantage for one in credited for leaf in one.tree.leaves]
    new, old, advantage, mask, ref = columns(model, trees, advantages, reference)
    loss = loss_of(new, old, advantage, mask, torch.zeros_like(new), ref)
    prepare_model(reference, packed=True)
    got, metrics = gradient_by_step(model, trees, config, reference if config.train.kl_coef else None)
    assert metrics["train/loss"] == pytest.approx(float(loss.detach()), rel=2e-5, abs=1e-6)
    assert relative(got, gradient_of(model, loss)) < 3e-5
