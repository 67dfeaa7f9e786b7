"""The policy update against a second implementation that shares nothing with it: row by row, plain torch."""

import copy
import math
import random
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from tiny import forked_tree, tiny_model, tree

from arpo_ext.config import TrainConfig
from arpo_ext.errors import ModelError
from arpo_ext.training.advantages import credit_trees
from arpo_ext.training.batch import plan_updates, weightless_batch
from arpo_ext.training.forward import prepare_model
from arpo_ext.training.step import policy_step
from arpo_ext.training.weights import named_weights

TEMPERATURE = 0.7
UNCLIPPED = 1e9


def row_logprobs(model, tokens, temperature=TEMPERATURE):
    """Log-probability of every token after the first, one unpadded row, plain torch."""
    logits = model(input_ids=torch.tensor([tokens])).logits[0].float() / temperature
    return torch.log_softmax(logits, -1)[:-1].gather(-1, torch.tensor(tokens)[1:, None])[:, 0]


def sampled_trees(model, *, noise=0.0, seed=0, rewards=((1.0, 0.0, 0.0), (0.0, 2.0, 0.5))):
    """Trees whose sampler log-probabilities are the model's own plus normal noise of the given size."""
    generator = random.Random(seed)
    trees = []
    for index, own in enumerate(rewards):
        rollout_tree = forked_tree(own, prompt_id=str(index))
        segments = list(rollout_tree.segments)
        for i, segment in enumerate(segments):
            path = rollout_tree.path_tokens(i)
            with torch.no_grad():
                values = row_logprobs(model, path)[len(path) - len(segment.tokens) - 1 :].tolist() if i else []
            if segment.sampled:
                noisy = tuple(value + generator.gauss(0, noise) for value in values)
                segments[i] = replace(segment, logprobs=noisy)
        trees.append(replace(rollout_tree, segments=tuple(segments)))
    return trees


def naive_advantages(rollout_tree):
    """GRPO advantage of every leaf, and the leaves below every segment, from the definition."""
    rewards = [leaf.reward for leaf in rollout_tree.leaves]
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    own = [(r - mean) / (std + 1e-6) for r in rewards]
    below = {
        s: [own[i] for i, leaf in enumerate(rollout_tree.leaves) if s in rollout_tree.path(leaf.segment)]
        for s in range(len(rollout_tree.segments))
    }
    return own, below


def naive_loss(model, trees, config, old_model=None):
    """The objective as the paper and the module's docstring write it; old_model None: ratios against the sampler."""
    total, normalizer = 0.0, 0.0
    for rollout_tree in trees:
        own, below = naive_advantages(rollout_tree)
        for i, leaf in enumerate(rollout_tree.leaves):
            tokens = rollout_tree.path_tokens(leaf.segment)
            logprob = row_logprobs(model, tokens)
            with torch.no_grad():
                old_row = None if old_model is None else row_logprobs(old_model, tokens)
            terms, position = [], 0
            for s in rollout_tree.path(leaf.segment):
                segment = rollout_tree.segments[s]
                for j in range(len(segment.tokens)):
                    if segment.sampled:
                        advantage = own[i] if config.credit == "soft" else sum(below[s]) / len(below[s])
                        new = logprob[position - 1]
                        old = segment.logprobs[j] if old_row is None else old_row[position - 1]
                        ratio = torch.exp(new - old)
                        if old_model is None and float(ratio.detach()) > config.importance_cap:
                            ratio = config.importance_cap * torch.exp(new - new.detach())
                        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
                        objective = torch.minimum(ratio * advantage, clipped * advantage)
                        if config.dual_clip is not None and advantage < 0:
                            objective = torch.maximum(objective, torch.tensor(config.dual_clip * advantage))
                        terms.append(objective)
                    position += 1
            scale = 1.0 if config.loss_scale == "token_mean" else 1 / len(terms)
            total = total - scale * torch.stack(terms).sum()
            normalizer += scale * len(terms)
    return total / normalizer


def step(model, trees, config, *, optimizer=None, pad_token=0, extra=()):
    """One policy step with plain gradient descent of rate 1: the change of the weights is the gradient."""
    accelerator = Accelerator()
    updates = plan_updates(credit_trees(trees, estimator="grpo"), config, seed=0, pad_token=pad_token)
    updates = [replace(u, micro_batches=[*extra, *u.micro_batches]) for u in updates]
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    return policy_step(accelerator, model, optimizer, updates, config, temperature=TEMPERATURE, pad_token=pad_token)


def gradient_by_step(model, trees, config, **options):
    after = copy.deepcopy(model)
    metrics = step(after, trees, config, **options)
    flat = [(a - b).flatten() for a, b in zip(model.parameters(), after.parameters(), strict=True)]
    return torch.cat(flat).detach(), metrics


def gradient_of(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def model():
    model = tiny_model(seed=1)
    prepare_model(model, packed=True)
    return model


@pytest.mark.parametrize("packing", [{"micro_batch_tokens": 14}, {"packing": "rows", "micro_batch_rows": 4}], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"old_logprob": "trainer"},
        {"old_logprob": "trainer", "loss_scale": "sequence_mean", "credit": "hard"},
        {"credit": "soft"},
        {"credit": "hard"},
        {"credit": "soft", "loss_scale": "sequence_mean", "clip_low": 0.1, "clip_high": 0.4},
        {"dual_clip": 1.5, "importance_cap": 100.0},
        {"importance_cap": 1.3},
    ],
    ids=str,
)
def test_gradient_equals_the_naive_implementation(model, settings, packing):
    config = TrainConfig(grad_clip=UNCLIPPED, **packing, **settings)
    trees = sampled_trees(model, noise=0.5)
    got, metrics = gradient_by_step(model, trees, config)
    # With one update the old policy is the model itself: the ratio is 1.
    loss = naive_loss(model, trees, config, old_model=model if config.old_logprob == "trainer" else None)
    assert relative(got, gradient_of(model, loss)) < 2e-5
    assert metrics["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-6)
    assert metrics["train/grad_norm"] == pytest.approx(float(got.norm()), rel=1e-4)
    if config.old_logprob == "sampler":
        assert metrics["train/clip_fraction"] > 0.1


def test_the_cap_bites_and_keeps_the_gradient(model):
    trees = sampled_trees(model, noise=0.5)
    base = TrainConfig(grad_clip=UNCLIPPED)
    wide, _ = gradient_by_step(model, trees, base.model_copy(update={"importance_cap": 1e6}))
    capped, metrics = gradient_by_step(model, trees, base.model_copy(update={"importance_cap": 1.3}))
    assert relative(capped, wide) > 1e-2
    # The log shows the ratio as it was, not as it was cut.
    assert metrics["train/ratio_max"] > 1.3


@pytest.mark.parametrize("loss_scale", ["token_mean", "sequence_mean"])
def test_any_split_into_micro_batches_gives_the_same_update(model, loss_scale):
    trees = sampled_trees(model, noise=0.3, rewards=[(1.0, 0.0, 0.0), (0.0, 2.0, 0.5), (1.0, 1.0, 0.0)])
    results = []
    cuts = [("rows", {"micro_batch_rows": rows}) for rows in (1, 2, 4, 5, 16)]
    cuts += [("tree", {"micro_batch_tokens": tokens}) for tokens in (1, 11, 16, 30, 100)]
    for pad_token, (packing, cut) in enumerate(cuts):
        config = TrainConfig(grad_clip=UNCLIPPED, packing=packing, loss_scale=loss_scale, **cut)
        # The padding token must not matter either.
        results.append(gradient_by_step(model, trees, config, pad_token=pad_token))
    for gradient, metrics in results[1:]:
        assert relative(gradient, results[0][0]) < 5e-6
        for name in ("train/loss", "train/entropy", "train/clip_fraction", "train/logprob_gap_mean"):
            assert metrics[name] == pytest.approx(results[0][1][name], rel=1e-5, abs=1e-7)


def test_leaving_out_groups_of_equal_reward_changes_nothing(model):
    config = TrainConfig(grad_clip=UNCLIPPED)
    trees = sampled_trees(model, rewards=[(1.0, 0.0, 0.0), (0.0, 2.0, 0.5)])
    flat = sampled_trees(model, rewards=[(1.0, 1.0, 1.0)])
    alone, _ = gradient_by_step(model, trees, config)
    beside, _ = gradient_by_step(model, [*trees, *flat], config)
    assert relative(beside * 39 / 26, alone) < 1e-5


def test_a_weightless_batch_adds_nothing(model):
    config = TrainConfig(grad_clip=UNCLIPPED)
    trees = sampled_trees(model, noise=0.3)
    without, expected = gradient_by_step(model, trees, config)
    beside, metrics = gradient_by_step(model, trees, config, extra=[weightless_batch(0)])
    assert torch.equal(beside, without)
    assert metrics == expected


def test_two_updates_take_the_ratio_against_the_policy_before_the_first(model):
    config = TrainConfig(grad_clip=UNCLIPPED, updates_per_step=2, old_logprob="trainer")
    trees = sampled_trees(model, rewards=[(1.0, 0.0, 0.0), (0.0, 2.0, 0.5)])
    got = copy.deepcopy(model)
    step(got, trees, config, optimizer=torch.optim.SGD(got.parameters(), lr=0.05))

    expected = copy.deepcopy(model)
    order = [0, 1]
    random.Random(0).shuffle(order)
    for index in order:
        gradients = torch.autograd.grad(
            naive_loss(expected, [trees[index]], config, old_model=model), list(expected.parameters())
        )
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                parameter -= 0.05 * gradient
    for a, b in zip(got.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_gap_to_the_sampler_is_measured_before_the_weights_move(model):
    trees = sampled_trees(model)
    shifted = [
        replace(t, segments=tuple(replace(s, logprobs=tuple(x - 0.25 for x in s.logprobs)) for s in t.segments))
        for t in trees
    ]
    for settings in ({}, {"updates_per_step": 2}, {"old_logprob": "trainer"}):
        config = TrainConfig(**settings)
        after = copy.deepcopy(model)
        metrics = step(after, shifted, config, optimizer=torch.optim.SGD(after.parameters(), lr=0.05))
        assert metrics["train/logprob_gap_mean"] == pytest.approx(0.25, abs=1e-5)
        assert metrics["train/logprob_gap_max"] == pytest.approx(0.25, abs=1e-5)
    _, metrics = gradient_by_step(model, trees, TrainConfig())
    assert metrics["train/logprob_gap_max"] < 1e-5
    assert metrics["train/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    _, metrics = gradient_by_step(model, [forked_tree(logprob=None)], TrainConfig(old_logprob="trainer"))
    assert math.isnan(metrics["train/logprob_gap_mean"])


def test_the_distance_to_the_sampler_by_its_definitions(model):
    trees = sampled_trees(model, noise=0.5)
    differences = []
    for rollout_tree in trees:
        for leaf in rollout_tree.leaves:
            with torch.no_grad():
                own = row_logprobs(model, rollout_tree.path_tokens(leaf.segment)).tolist()
            parts = [rollout_tree.segments[i] for i in rollout_tree.path(leaf.segment)]
            sampled = [p for part in parts for p in (part.logprobs or [None] * len(part.tokens))][1:]
            differences += [a - b for a, b in zip(own, sampled, strict=True) if b is not None]
    _, metrics = gradient_by_step(model, trees, TrainConfig())
    count = len(differences)
    weights = [math.exp(d) for d in differences]
    expected = {
        "train/sampler_kl_k1": -sum(differences) / count,
        "train/sampler_kl_k2": sum(d * d / 2 for d in differences) / count,
        "train/sampler_kl_k3": sum(math.exp(d) - 1 - d for d in differences) / count,
        "train/sampler_ess": sum(weights) ** 2 / (count * sum(w * w for w in weights)),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert expected["train/sampler_ess"] < 0.95
    # A sampler that nearly ruled a token out: no overflow.
    segment = replace(trees[0].segments[3], logprobs=(-1000.0,))
    far = replace(trees[0], segments=(*trees[0].segments[:3], segment, *trees[0].segments[4:]))
    _, metrics = gradient_by_step(model, [far], TrainConfig())
    assert math.isfinite(metrics["train/sampler_kl_k2"])


def test_entropy_is_that_of_the_trained_positions(model):
    (rollout_tree,) = trees = sampled_trees(model, rewards=[(1.0, 0.0, 0.0)])
    entropies = []
    for leaf in rollout_tree.leaves:
        tokens = rollout_tree.path_tokens(leaf.segment)
        with torch.no_grad():
            p = torch.softmax(model(input_ids=torch.tensor([tokens])).logits[0] / TEMPERATURE, -1)
        h = -(p * p.log()).sum(-1)
        position = 0
        for segment in (rollout_tree.segments[s] for s in rollout_tree.path(leaf.segment)):
            for _ in segment.tokens:
                entropies += [float(h[position - 1])] if segment.sampled else []
                position += 1
    _, metrics = gradient_by_step(model, trees, TrainConfig())
    assert metrics["train/entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)


def test_nothing_to_learn_is_no_step_but_is_still_measured(model):
    trees = sampled_trees(model, rewards=[(1.0, 1.0, 1.0)])
    gradient, metrics = gradient_by_step(model, trees, TrainConfig())
    assert not gradient.any()
    assert metrics["train/loss"] == metrics["train/grad_norm"] == metrics["train/clip_fraction"] == 0
    assert metrics["train/entropy"] > 0
    assert metrics["train/logprob_gap_max"] < 1e-5
    _, metrics = gradient_by_step(model, [], TrainConfig())
    assert math.isnan(metrics["train/entropy"])


def test_rows_in_which_nothing_was_sampled_are_not_measured(model):
    silent = tree([(-1, (5, 6), False)], [(0, 1.0)])
    _, metrics = gradient_by_step(model, [silent], TrainConfig())
    assert math.isnan(metrics["train/entropy"])
    _, metrics = gradient_by_step(model, [silent, *sampled_trees(model, rewards=[(1.0, 1.0, 1.0)])], TrainConfig())
    assert metrics["train/entropy"] > 0


def test_gradient_is_clipped_to_the_norm(model):
    gradient, metrics = gradient_by_step(model, sampled_trees(model), TrainConfig(grad_clip=0.01))
    assert metrics["train/grad_norm"] > 0.01
    assert float(gradient.norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(model):
    broken = copy.deepcopy(model)
    trees = sampled_trees(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    before = copy.deepcopy(broken.state_dict())
    with pytest.raises(ModelError, match="the gradient norm is nan; expected a finite one"):
        step(broken, trees, TrainConfig())
    assert all(
        torch.equal(tensor.nan_to_num(), before[name].nan_to_num()) for name, tensor in broken.state_dict().items()
    )


@pytest.mark.parametrize("tied", [True, False])
def test_named_weights_are_detached_copies_under_checkpoint_names(tied, tmp_path):
    from safetensors.torch import load_file

    model = tiny_model(tied=tied)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    wrapped = torch.nn.parallel.DataParallel(model)
    weights = dict(named_weights(wrapped))
    assert weights.keys() == stored.keys()
    assert ("lm_head.weight" in weights) is not tied
    for name, tensor in weights.items():
        assert torch.equal(tensor, stored[name])
        assert not tensor.requires_grad
        tensor.zero_()
    assert all(torch.equal(stored[name], tensor) for name, tensor in named_weights(model))
