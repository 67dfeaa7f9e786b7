"""Every algorithm against its paper's formula (`published`): from scored trees to the gradient, through the trainer."""

import copy
import random
from dataclasses import replace

import published
import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_model, tree

from arpo_ext.algorithms import ALGORITHMS
from arpo_ext.config import Config
from arpo_ext.training.advantages import CREDIT_KEYS, credit_trees
from arpo_ext.training.batch import plan_updates
from arpo_ext.training.forward import prepare_model
from arpo_ext.training.step import policy_step

TEMPERATURE = 0.7
LIMIT = 20
# Nothing but the formula: no gradient clipping, no cap of the ratio, and the ratio against what the sampler recorded.
PLAIN = {"grad_clip": 1e9, "importance_cap": 1e6, "old_logprob": "sampler", "micro_batch_tokens": 30}


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    prepare_model(model, packed=True)
    return model


def row_logprobs(model, tokens):
    logits = model(input_ids=torch.tensor([tokens])).logits[0].float() / TEMPERATURE
    return torch.log_softmax(logits, -1)[:-1].gather(-1, torch.tensor(tokens)[1:, None])[:, 0]


def branching_tree(rewards, prompt_id, *, cut):
    """Four leaves. cut: segments 1 and 5 are one turn that a fork cut in two; else 5 begins after the tool result 2.

    0 [6 7] - 1 [8 9] - 2 tool [3 10 4] - 3 [11]
                                        - 4 [12 13 2]
                      - 5 [20 21] - 6 tool [3 4] - 7 [22 ...]
            - 8 [14 15 16 17 2]
    """
    segments = [
        (-1, (6, 7), False),
        (0, (8, 9), True),
        (1, (3, 10, 4), False),
        (2, (11,), True),
        (2, (12, 13, 2), True),
        (1 if cut else 2, (20, 21), True),
        (5, (3, 4), False),
        (6, (22, 23, 24, 25, 26, 27, 28, 29, 30, 8, 9, 2), True),
        (0, (14, 15, 16, 17, 2), True),
    ]
    return tree(segments, list(zip((3, 4, 7, 8), rewards, strict=True)), prompt_id=prompt_id)


def sampled(model, trees, noise, seed=0):
    """The trees with log-probabilities of the model plus noise, and with entropies, at every sampled token."""
    generator = random.Random(seed)
    filled = []
    for rollout_tree in trees:
        segments = list(rollout_tree.segments)
        for index, segment in enumerate(segments):
            if not segment.sampled:
                continue
            path = rollout_tree.path_tokens(index)
            with torch.no_grad():
                values = row_logprobs(model, path)[len(path) - len(segment.tokens) - 1 :].tolist()
            segments[index] = replace(
                segment,
                logprobs=tuple(value + generator.gauss(0, noise) for value in values),
                entropies=tuple(generator.uniform(0.0, 3.0) for _ in values),
            )
        filled.append(replace(rollout_tree, segments=tuple(segments)))
    return filled


def made_trees(model, noise=0.0, rewards=((1.0, 0.0, 0.0, 0.3), (0.0, 2.0, 0.5, 1.1)), *, cut=True):
    return sampled(model, [branching_tree(own, str(i), cut=cut) for i, own in enumerate(rewards)], noise)


def configured(name, **train):
    return Config.model_validate(
        {"algorithm": name, "train": {**PLAIN, **train}, "rollout": {"max_response_tokens": LIMIT}}
    )


def gradient_by_step(model, trees, config, reference=None):
    """One step of plain gradient descent of rate 1: the change of the weights is the gradient."""
    settings, after, accelerator = config.train, copy.deepcopy(model), Accelerator()
    credited = credit_trees(
        trees,
        **{name: getattr(settings, name) for name in CREDIT_KEYS},
        response_limit=config.rollout.max_response_tokens,
    )
    metrics = policy_step(
        accelerator,
        *accelerator.prepare(after, torch.optim.SGD(after.parameters(), lr=1.0)),
        plan_updates(credited, settings, seed=0, pad_token=0),
        settings,
        temperature=TEMPERATURE,
        pad_token=0,
        reference=reference,
    )
    flat = [(a - b).flatten() for a, b in zip(model.parameters(), after.parameters(), strict=True)]
    return torch.cat(flat).detach(), metrics


def gradient_of(model, loss):
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(model.parameters(), gradients, strict=True)
        ]
    )


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


def test_there_is_a_published_formula_for_every_algorithm():
    assert all(callable(getattr(published, name, None)) for name in ALGORITHMS)
    assert all("arXiv" in preset.__doc__ for preset in ALGORITHMS.values())


# Small noise leaves ratios on both sides of the narrow clips of gspo and at2po, large noise of the wide ones.
@pytest.mark.parametrize("noise", [0.004, 0.6])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradient_and_loss_are_those_of_the_paper(model, name, noise):
    # AT2PO forks between turns only: for a turn in two pieces it names no advantage.
    trees = made_trees(model, noise, cut=name != "at2po")
    rollouts = published.rollouts_of(trees, lambda tokens: row_logprobs(model, tokens))
    loss = getattr(published, name)(rollouts)
    got, metrics = gradient_by_step(model, trees, configured(name))
    assert metrics["train/loss"] == pytest.approx(float(loss.detach()), rel=2e-5, abs=1e-6)
    assert relative(got, gradient_of(model, loss)) < 3e-5
    if noise > 0.1 or name in ("gspo", "at2po"):
        assert metrics["train/clip_fraction"] > 0


@pytest.mark.parametrize("name", ["at2po", "gspo", "aepo"])
def test_any_split_into_micro_batches_gives_the_same_update(model, name):
    trees = made_trees(model, 0.05)
    whole, expected = gradient_by_step(model, trees, configured(name, micro_batch_tokens=1000))
    rows = {"packing": "rows", "micro_batch_rows": 3}
    for cut in ({"micro_batch_tokens": 1}, {"micro_batch_tokens": 20}, rows, {**rows, "micro_batch_rows": 100}):
        got, metrics = gradient_by_step(model, trees, configured(name, **cut))
        assert relative(got, whole) < 1e-5
        assert metrics["train/clip_fraction"] == pytest.approx(expected["train/clip_fraction"])


@pytest.mark.parametrize(("ratio", "name"), [("token", "grpo"), ("turn", "at2po"), ("sequence", "gspo")])
def test_the_importance_cap_cuts_the_ratio_of_every_level_and_keeps_its_gradient(model, ratio, name):
    trees = made_trees(model, 0.8, cut=False)
    # Every sampler log-probability a bit lower: all ratios well above 1, and a clip so wide that only the cap acts.
    trees = [
        replace(t, segments=tuple(replace(s, logprobs=tuple(x - 0.5 for x in s.logprobs)) for s in t.segments))
        for t in trees
    ]
    config = configured(name, clip_high=100.0, clip_low=1.0, importance_cap=1.5, credit="soft")
    got, metrics = gradient_by_step(model, trees, config)
    rollouts = published.rollouts_of(trees, lambda tokens: row_logprobs(model, tokens))
    total, cut = 0.0, 0
    for o in rollouts:
        labels = {"token": range(len(o.new)), "turn": o.turn, "sequence": [0] * len(o.new)}[ratio]
        for label in dict.fromkeys(labels):
            inside = torch.tensor([own == label for own in labels])
            value = (o.new - o.old)[inside].mean().exp()
            if float(value.detach()) > 1.5:
                value, cut = 1.5 / value.detach() * value, cut + 1
            total += inside.sum() * value * published.normalised(rollouts, o) / len(o.new)
    assert cut > 3
    loss = -total / len(rollouts)
    assert metrics["train/loss"] == pytest.approx(float(loss.detach()), rel=2e-5, abs=1e-6)
    assert relative(got, gradient_of(model, loss)) < 3e-5
    # The log shows the ratio as it was, not as it was cut.
    assert metrics["train/ratio_max"] > 1.5


@pytest.mark.parametrize("name", ["grpo", "at2po", "gspo", "cispo"])
def test_against_the_trainer_the_first_update_has_ratio_one_and_the_second_has_not(model, name):
    trees = made_trees(model, 0.5, cut=False)
    published_loss = getattr(published, name)

    def naive(current, own):
        rollouts = published.rollouts_of(own, lambda tokens: row_logprobs(current, tokens))
        olds = published.rollouts_of(own, lambda tokens: row_logprobs(model, tokens).detach())
        return published_loss([replace(new, old=old.new) for new, old in zip(rollouts, olds, strict=True)])

    expected, rate = copy.deepcopy(model), 0.02
    order = [0, 1]
    random.Random(0).shuffle(order)
    for index in order:
        gradients = torch.autograd.grad(naive(expected, [trees[index]]), list(expected.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                parameter -= rate * gradient
    config, got = configured(name, old_logprob="trainer", updates_per_step=2), copy.deepcopy(model)
    accelerator = Accelerator()
    credited = credit_trees(trees, estimator="grpo", credit=config.train.credit)
    updates = plan_updates(credited, config.train, seed=0, pad_token=0)
    prepared = accelerator.prepare(got, torch.optim.SGD(got.parameters(), lr=rate))
    metrics = policy_step(accelerator, *prepared, updates, config.train, temperature=TEMPERATURE, pad_token=0)
    moved = torch.cat([(a - b).flatten() for a, b in zip(got.parameters(), model.parameters(), strict=True)])
    wanted = torch.cat([(a - b).flatten() for a, b in zip(expected.parameters(), model.parameters(), strict=True)])
    assert relative(moved, wanted) < 1e-4
    assert metrics["train/ratio_max"] > 1.001


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_to_the_reference_and_entropy_bonus(model, kind):
    reference = tiny_model(seed=1).eval()
    prepare_model(reference, packed=True)
    trees = made_trees(model, 0.3, rewards=((1.0, 0.0, 0.0, 0.3), (1.0, 1.0, 1.0, 1.0)))
    config = configured("grpo", kl=kind, kl_coef=0.3, entropy_coef=0.05)
    got, metrics = gradient_by_step(model, trees, config, reference)

    rollouts = published.rollouts_of(trees, lambda tokens: row_logprobs(model, tokens))
    kept = published.rollouts_of(trees, lambda tokens: row_logprobs(reference, tokens).detach())
    entropies = published.rollouts_of(trees, lambda tokens: row_entropies(model, tokens))
    loss, k3 = published.grpo(rollouts), 0.0
    for o, ref, entropy in zip(rollouts, kept, entropies, strict=True):
        d = o.new - ref.new
        terms = {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() - 1 + d}
        # The rollouts of the second tree have no advantage, but a divergence and an entropy.
        loss = loss + (0.3 * terms[kind] - 0.05 * entropy.new).mean() / len(rollouts)
        k3 += float(terms["k3"].detach().mean()) / len(rollouts)
    assert metrics["train/loss"] == pytest.approx(float(loss.detach()), rel=2e-5)
    assert metrics["train/ref_kl"] == pytest.approx(k3, rel=1e-5)
    assert relative(got, gradient_of(model, loss)) < 3e-5


def row_entropies(model, tokens):
    logprobs = torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0] / TEMPERATURE, -1)
    return -(logprobs.exp() * logprobs).sum(-1)[:-1]


def test_a_kl_term_without_a_reference_is_refused(model):
    with pytest.raises(ValueError, match="ref_logprob"):
        gradient_by_step(model, made_trees(model), configured("grpo", kl_coef=0.1))


def test_dual_clip_and_sapo_are_the_ops(model):
    trees = made_trees(model, 0.8)
    rollouts = published.rollouts_of(trees, lambda tokens: row_logprobs(model, tokens))
    dual, sapo = 0.0, 0.0
    for o in rollouts:
        ratio, advantage = published.token_ratios(o), published.normalised(rollouts, o)
        own = published.surrogate(ratio, advantage, 0.2, 0.2)
        dual += (torch.maximum(own, torch.tensor(1.5 * advantage)) if advantage < 0 else own).mean()
        tau = 0.9 if advantage > 0 else 1.2
        sapo += (torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage).mean()
    for loss, settings in (
        (dual, {"dual_clip": 1.5}),
        (sapo, {"clip": "sapo", "tau_positive": 0.9, "tau_negative": 1.2}),
    ):
        got, _ = gradient_by_step(model, trees, configured("grpo", **settings))
        assert relative(got, gradient_of(model, -loss / len(rollouts))) < 3e-5
