"""A pack of trees gives the loss and the gradient of its rows, read one by one, for any loss, tree, cut and model."""

import copy
import itertools
import random
import statistics
from dataclasses import fields, replace

import pytest
import torch
from tiny import VOCAB, forked_tree, tree

from arpo_ext.config import TrainConfig
from arpo_ext.training.advantages import credit_trees
from arpo_ext.training.batch import micro_batches, tree_rows
from arpo_ext.training.forward import prepare_model, row_statistics
from arpo_ext.training.step import batch_loss

FAMILIES = ("Qwen2", "Llama")
TREES = 200
LOSSES = list(
    itertools.product(
        ("soft", "hard"),
        ("token_mean", "sequence_mean"),
        # On policy, beyond both clips and the cap, and with old log-probabilities of its own.
        (
            {"old_logprob": "trainer"},
            {"importance_cap": 1e3},
            {"importance_cap": 1.3},
            {"dual_clip": 1.5, "importance_cap": 1e3, "clip_high": 0.28},
        ),
    )
)


def made_model(family, **changes):
    """A model of two layers with grouped heads, in which attention counts."""
    import transformers

    torch.manual_seed(1)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{family}Config")(**settings | changes)
    return getattr(transformers, f"{family}ForCausalLM")(config).train()


def random_tree(seed):
    """A tree of 1 to 8 leaves in which anything happens that the engine can produce.

    Forks after a tool result and inside a turn, behind its first and its last token; tool segments at forks; leaves at
    inner nodes; single paths; siblings of 1 to 30 tokens, some of which begin with the same tokens.
    """
    generator = random.Random(seed)

    def tokens(least, most):
        return tuple(generator.randrange(5, VOCAB) for _ in range(generator.randint(least, most)))

    segments = [(-1, tokens(1, 20), False)]
    for _ in range(generator.randint(1, 14)):
        parent = generator.choice([0, len(segments) - 1, generator.randrange(len(segments))])
        own = tokens(1, 30) if generator.random() < 0.8 else tokens(1, 2)
        siblings = [s for p, s, _ in segments if p == parent]
        if siblings and generator.random() < 0.3:
            own = siblings[0][: generator.randint(1, 3)] + own
        segments.append((parent, own, generator.random() < 0.7))
    ends = [i for i in range(len(segments)) if all(parent != i for parent, _, _ in segments)]
    ends += [i for i in range(1, len(segments)) if i not in ends and generator.random() < 0.15]
    leaves = [(end, generator.choice([0.0, 0.0, 1.0, 0.4])) for end in generator.sample(ends, min(len(ends), 8))]
    return tree(segments, leaves, prompt_id=str(seed))


def with_sampler_logprobs(model, rollout_tree, noise, seed):
    """The model's own log-probabilities plus noise, so that ratios lie within and beyond every clip."""
    generator = torch.Generator().manual_seed(seed)
    segments = list(rollout_tree.segments)
    for i, segment in enumerate(segments):
        if segment.sampled:
            path = torch.tensor(rollout_tree.path_tokens(i))
            with torch.no_grad():
                logits = model(input_ids=path[None]).logits[0].double()
            values = torch.nn.functional.pad(logits.log_softmax(-1)[:-1].gather(1, path[1:, None])[:, 0], (1, 0))
            own = values[len(path) - len(segment.tokens) :]
            own = own + noise * torch.randn(own.shape, generator=generator, dtype=torch.float64)
            segments[i] = replace(segment, logprobs=tuple(own.tolist()))
    return replace(rollout_tree, segments=tuple(segments))


def as_dtype(columns, dtype):
    wide = {f.name: getattr(columns, f.name) for f in fields(columns)}
    return replace(columns, **{k: v.to(dtype) for k, v in wide.items() if v is not None and v.is_floating_point()})


def loss_and_gradient(model, rows, config, normalizer):
    """Sum over the micro-batches, and of |weight * advantage| / normalizer, the scale of the loss."""
    model.zero_grad()
    dtype, total, scale = torch.promote_types(next(model.parameters()).dtype, torch.float32), 0.0, 0.0
    for batch in micro_batches(rows, config, pad_token=0):
        batch = replace(batch, columns=as_dtype(batch.columns, dtype))
        loss, _ = batch_loss(model, batch, config, normalizer, 0.8)
        loss.backward()
        total += float(loss.detach())
        scale += float((batch.columns.weight * batch.columns.advantage).abs().sum()) / normalizer
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return total, gradient.double(), scale


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    """The same weights in float64 and float32, as they are; and prepared for packs."""
    plain = {torch.float64: made_model(request.param).double()}
    plain[torch.float32] = copy.deepcopy(plain[torch.float64]).float()
    packed = copy.deepcopy(plain)
    for model in packed.values():
        prepare_model(model, packed=True)
    return plain, packed


def credited_rows(trees, config):
    credited = credit_trees(trees, estimator="grpo")
    rows = [row for each in credited for row in tree_rows(each, config)]
    return [row for row in rows if row.trained.any()]


@pytest.mark.slow
def test_packed_equals_flat_on_random_trees(models):
    plain, packed = models
    errors = []
    for seed in range(TREES):
        credit, loss_scale, ratios = LOSSES[seed % len(LOSSES)]
        config = TrainConfig(credit=credit, loss_scale=loss_scale, **ratios)
        flat = config.model_copy(update={"packing": "rows", "micro_batch_rows": 1})
        rows = credited_rows([with_sampler_logprobs(plain[torch.float64], random_tree(seed), 0.5, seed)], config)
        normalizer = sum(float(row.weight.sum()) for row in rows)
        if not any((row.weight * row.advantage).any() for row in rows):
            continue
        true_loss, true_gradient, scale = loss_and_gradient(plain[torch.float64], rows, flat, normalizer)
        loss, gradient, _ = loss_and_gradient(packed[torch.float64], rows, config, normalizer)
        assert abs(loss - true_loss) <= 1e-12 * scale, seed
        # RMSNorm computes in float32.
        assert relative(gradient, true_gradient) <= 1e-6, seed
        flat_loss, flat_gradient, _ = loss_and_gradient(plain[torch.float32], rows, flat, normalizer)
        loss, gradient, _ = loss_and_gradient(packed[torch.float32], rows, config, normalizer)
        assert abs(loss - flat_loss) <= 1e-6 * scale, seed
        errors.append((relative(gradient, true_gradient), relative(flat_gradient, true_gradient)))
    assert len(errors) >= 0.6 * TREES
    # In float32 the pack is as far from the truth as the rows are: on every tree about, in the middle exactly.
    assert all(own <= 4 * rows + 2e-6 for own, rows in errors), max(errors)
    assert statistics.median(own for own, _ in errors) <= 1.1 * statistics.median(rows for _, rows in errors)


@torch.no_grad()
def test_the_first_token_after_each_fork_follows_its_own_parent(models):
    plain, packed = models
    forks = 0
    for rollout_tree in (forked_tree(), *map(random_tree, range(20))):
        segments = rollout_tree.segments
        rows = credited_rows([rollout_tree], TrainConfig())
        paths = [rollout_tree.path(leaf.segment) for leaf in rollout_tree.leaves]
        paths = [path for path in paths if any(segments[i].sampled for i in path)]
        (batch,) = micro_batches(rows, TrainConfig(), 0)
        got = dict(zip(*said_of_rows(rows, row_statistics(packed[torch.float64], batch, 1.0)), strict=True))
        for number, path in enumerate(paths):
            for above, below in itertools.pairwise(path):
                if segments[below].sampled and sum(s.parent == above for s in segments) > 1:
                    name = f"tree {rollout_tree.prompt_id}, row {number}: first token of segment {below} behind {above}"
                    before, token = rollout_tree.path_tokens(above), segments[below].tokens[0]
                    logits = plain[torch.float64](input_ids=torch.tensor([before])).logits[0, -1].log_softmax(-1)
                    logprob, entropy = (column[len(before)] for column in got[number])
                    assert float(logprob) == pytest.approx(float(logits[token]), abs=1e-12), name
                    assert float(entropy) == pytest.approx(-float((logits.exp() * logits).sum()), abs=1e-12), name
                    forks += 1
    assert forks > 50


def said_of_rows(rows, statistics):
    """Numbers of the rows in the order of the pack, and what the model says of their tokens, 0 where not trained."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].tokens.tolist())
    parts = [column.split([int(rows[i].trained.sum()) for i in order]) for column in statistics]
    spread = [
        [torch.zeros(len(rows[i].tokens), dtype=part.dtype).masked_scatter(rows[i].trained, part) for part in both]
        for i, *both in zip(order, *parts, strict=True)
    ]
    return order, spread


def test_any_cut_and_any_packing_gives_the_same_loss(models):
    plain, packed = models
    trees = [with_sampler_logprobs(plain[torch.float64], random_tree(seed), 0.5, seed) for seed in range(6)]
    rows = credited_rows(trees, TrainConfig())
    normalizer = sum(float(row.weight.sum()) for row in rows)
    cuts = [("rows", {"micro_batch_rows": n}) for n in (1, 3, 100)]
    cuts += [("tree", {"micro_batch_tokens": n}) for n in (1, 60, 150, 400, 10**6)]
    results = []
    for packing, cut in cuts:
        model = (packed if packing == "tree" else plain)[torch.float64]
        config = TrainConfig(packing=packing, **cut)
        results.append(loss_and_gradient(model, rows, config, normalizer))
    for loss, gradient, scale in results[1:]:
        assert abs(loss - results[0][0]) <= 1e-12 * scale
        assert relative(gradient, results[0][1]) <= 1e-6


def test_trees_of_one_system_prompt_share_it():
    system = tuple(range(5, 25))
    trees = [
        tree([(-1, (*system, first), False), (0, (3, 4), True), (0, (4, 4), True)], [(1, 1.0), (2, 0.0)])
        for first in (1, 2)
    ]
    (batch,) = micro_batches(credited_rows(trees, TrainConfig()), TrainConfig(), 0)
    assert batch.text.tokens.shape == (1, 20 + 2 * (1 + 4))


@pytest.mark.parametrize("setting", ["checkpointing", "bfloat16", "untied", "single heads"])
def test_packs_in_other_settings(setting):
    changes = {"untied": {"tie_word_embeddings": False}, "single heads": {"num_key_value_heads": 4}}.get(setting, {})
    model = made_model("Qwen2", **changes)
    if setting == "bfloat16":
        model = model.bfloat16()
    flat = copy.deepcopy(model)
    if setting == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    prepare_model(model, packed=True)
    rows = credited_rows([random_tree(seed) for seed in range(6)], TrainConfig())
    config = TrainConfig(importance_cap=1e3)
    normalizer = sum(float(row.weight.sum()) for row in rows)
    got = loss_and_gradient(model, rows, config, normalizer)
    expected = loss_and_gradient(flat, rows, config.model_copy(update={"packing": "rows"}), normalizer)
    bound = 0.15 if setting == "bfloat16" else 2e-5
    assert relative(got[1], expected[1]) <= bound
    assert got[0] == pytest.approx(expected[0], abs=bound * got[2])
