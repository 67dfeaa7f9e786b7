"""A vocabulary divided over 2 or 4 gloo ranks gives what one rank gives, forward and backward, on every rank.

The processes are started once per number of ranks; each runs all of CASES, makes the whole inputs from a seed, and
compares its part with the op on all of them.
"""

import datetime
import json
import math
import traceback
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from arpo_ext import ops
from arpo_ext.ops._logits import LogitsCall
from arpo_ext.ops._shards import new_running, shard_finish, shard_forward

INF = math.inf
ROWS, DEPTH, VOCAB = 9, 5, 24


def cut(tensor, edges, rank, dim):
    """A rank's part as memory of its own, ready for gradients."""
    return tensor.narrow(dim, edges[rank], edges[rank + 1] - edges[rank]).detach().clone().requires_grad_()


def edges_of(ranks, uneven):
    if uneven == "some without columns":
        return [0, 0, 24] if ranks == 2 else [0, 9, 9, 24, 24]
    if uneven:
        return [0, 1, 24] if ranks == 2 else [0, 7, 8, 20, 24]
    return [VOCAB // ranks * rank for rank in range(ranks + 1)]


def place(edges, rank, uneven):
    return {"vocab_start": edges[rank], "vocab_total": edges[-1]} if uneven else {}


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, DEPTH, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, DEPTH, generator=generator).to(dtype)
    bias = torch.randn(VOCAB, generator=generator).to(dtype)
    logits = (3 * torch.randn(ROWS, VOCAB, generator=generator)).to(dtype)
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)
    return hidden, weight, bias, logits, labels


def options_of(labels):
    return {
        "temperature": torch.linspace(0.5, 2, len(labels)),
        "mask": torch.arange(len(labels)) % 4 != 1,
        "ignore_index": int(labels[0]),
    }


def loss_of(logprob, entropy):
    steps = torch.arange(entropy.numel()).view(entropy.shape)
    return (entropy * steps.sin()).sum() + (0 if logprob is None else (logprob * steps.cos()).sum())


def assert_close(ours, expected, dtype=torch.float32, what=""):
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        ours.float(), expected.float(), rtol=20 * eps, atol=20 * eps, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def compare_logits(rank, ranks, logits, labels, uneven=False, **options):
    edges = edges_of(ranks, uneven)
    whole, part = logits.clone().requires_grad_(), cut(logits, edges, rank, -1)
    expected = ops.logprob_entropy(whole, labels, **options)
    ours = ops.logprob_entropy(part, labels, group=dist.group.WORLD, **place(edges, rank, uneven), **options)
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, what="result")
    (gradient,) = torch.autograd.grad(loss_of(*ours), part)
    (wanted,) = torch.autograd.grad(loss_of(*expected), whole)
    assert gradient.dtype == logits.dtype
    assert_close(gradient, wanted[..., edges[rank] : edges[rank + 1]], logits.dtype, "gradient")


def compare_linear(rank, ranks, hidden, weight, bias, labels, uneven=False, **options):
    edges = edges_of(ranks, uneven)
    whole = [None if t is None else t.clone().requires_grad_() for t in (hidden, weight, bias)]
    part = [hidden.clone().requires_grad_(), *(None if t is None else cut(t, edges, rank, 0) for t in (weight, bias))]
    expected = ops.linear_logprob_entropy(whole[0], whole[1], labels, whole[2], **options)
    ours = ops.linear_logprob_entropy(
        part[0], part[1], labels, part[2], group=dist.group.WORLD, **place(edges, rank, uneven), **options
    )
    for a, b in zip(ours, expected, strict=True):
        assert_close(a, b, what="result")
    given = [t for t in whole if t is not None], [t for t in part if t is not None]
    wanted = torch.autograd.grad(loss_of(*expected), given[0])
    gradients = torch.autograd.grad(loss_of(*ours), given[1])
    for name, a, b in zip(("hidden", "weight", "bias"), gradients, wanted, strict=False):
        mine = b if name == "hidden" else b[edges[rank] : edges[rank + 1]]
        assert a.dtype == hidden.dtype
        assert_close(a, mine, hidden.dtype, f"gradient of {name}")


def logits_equal_shards(rank, ranks):
    for dtype in (torch.float32, torch.bfloat16):
        *_, logits, labels = inputs(dtype)
        compare_logits(rank, ranks, logits, labels)
        compare_logits(rank, ranks, logits, None, temperature=0.7)
        compare_logits(rank, ranks, logits, labels, backend="reference")
        compare_logits(rank, ranks, logits, labels, **options_of(labels))


def logits_uneven_shards(rank, ranks):
    *_, logits, labels = inputs()
    compare_logits(rank, ranks, logits, labels, uneven=True)
    compare_logits(rank, ranks, logits, labels, uneven=True, **options_of(labels))


def ranks_without_columns(rank, ranks):
    hidden, weight, bias, logits, labels = inputs()
    uneven, world = "some without columns", dist.group.WORLD
    for backend in ("auto", "reference"):
        options = {**options_of(labels), "backend": backend, "uneven": uneven}
        compare_logits(rank, ranks, logits, labels, **options)
        compare_linear(rank, ranks, hidden, weight, bias, labels, **options)
    compare_logits(rank, ranks, logits.view(3, 3, VOCAB), None, uneven=uneven)
    edges = edges_of(ranks, uneven)
    leaf = cut(logits, edges, rank, -1)
    options = {"inplace_backward": True, "group": world, **place(edges, rank, uneven)}
    (ours,) = torch.autograd.grad(ops.logprob_entropy(leaf * 1, labels, **options)[1].sum(), leaf)
    assert ours.shape == leaf.shape
    # What is wrong raises on every rank: one that waits for another would wait for ever.
    part, rows = leaf.detach(), cut(weight, edges, rank, 0)
    with pytest.raises(ValueError, match=r"columns must make up the vocabulary, got .*none of 0.*unequal shards need"):
        ops.entropy(part, group=world)
    with pytest.raises(ValueError, match=r"columns must make up the vocabulary, got none of 0, none of 0"):
        ops.linear_logprob_entropy(hidden, rows[:0], group=world)
    del options["inplace_backward"]
    for wrong in (labels + VOCAB, labels - 99):
        with pytest.raises(ValueError, match=r"labels must be in 0 to 23 or equal ignore_index -100, got"):
            ops.logprob_entropy(part, wrong, **options)
        with pytest.raises(ValueError, match=r"labels must be in 0 to 23 or equal ignore_index -100, got"):
            ops.linear_logprob_entropy(hidden, rows, wrong, **options)
    with pytest.raises(ValueError, match="temperature must be positive"):
        ops.entropy(part, temperature=torch.tensor(-1.0), **options)
    with pytest.raises(ops.BackendError, match="needs a CUDA tensor"):
        ops.entropy(part, backend="cuda", **options)


def logits_of_several_dimensions(rank, ranks):
    *_, logits, labels = inputs()
    shape = (3, 3)
    options = {**options_of(labels), "temperature": torch.linspace(0.5, 2, 9).view(shape)}
    options["mask"] = options["mask"].view(shape)
    compare_logits(rank, ranks, logits.view(3, 3, VOCAB), labels.view(shape), **options)
    compare_logits(rank, ranks, logits[0], labels[0], temperature=torch.tensor(0.5))


def one_output(rank, ranks):
    *_, logits, labels = inputs()
    part = cut(logits, edges_of(ranks, False), rank, -1)
    assert_close(ops.logprob(part, labels, group=dist.group.WORLD), ops.logprob(logits, labels))
    assert_close(ops.entropy(part, group=dist.group.WORLD), ops.entropy(logits))


def hostile_rows(rank, ranks):
    step = VOCAB // ranks
    base = inputs()[3][0]
    columns = torch.arange(VOCAB)
    rows = {
        "maximum tied across ranks": base.clamp(max=float(base.topk(step + 1).values[-1])),
        "constant": torch.full((VOCAB,), 7.5),
        "first rank all -inf": torch.where(columns < step, -INF, base),
        "last rank all -inf": torch.where(columns >= VOCAB - step, -INF, base),
        "one finite logit": torch.where(columns == VOCAB - 1, 2.0, -INF),
        "all -inf": torch.full((VOCAB,), -INF),
        "NaN in one rank": torch.where(columns == step, math.nan, base),
        "NaN beside ranks all -inf": torch.where(columns == 0, math.nan, -INF),
        "+inf in the last rank": torch.where(columns == VOCAB - 1, INF, base),
        "offset": base + 1e4,
        "far apart": torch.where(columns < step, -3e38, 3e38),
        "nearly certain": torch.where(columns == VOCAB - 1, 0.0, -16.0),
    }
    logits = torch.stack(list(rows.values()))
    for label in (0, step, VOCAB - 1):
        labels = torch.full((len(rows),), label)
        compare_logits(rank, ranks, logits, labels)
        compare_logits(rank, ranks, logits, labels, temperature=0.6)
    certain = cut(rows["nearly certain"][None], edges_of(ranks, False), rank, -1)
    s = (VOCAB - 1) * math.exp(-16)
    exact = math.log1p(s) + 16 * s / (1 + s)
    assert ops.entropy(certain, group=dist.group.WORLD).item() == pytest.approx(exact, rel=1e-6, abs=0)


def results_are_the_same_bits(rank, ranks):
    *_, logits, labels = inputs()
    results = ops.logprob_entropy(
        cut(logits, edges_of(ranks, True), rank, -1),
        labels,
        group=dist.group.WORLD,
        **place(edges_of(ranks, True), rank, True),
    )
    for result in results:
        every = [torch.empty_like(result) for _ in range(ranks)]
        dist.all_gather(every, result.detach())
        assert all(torch.equal(other, result) for other in every)


def linear_equal_shards(rank, ranks):
    hidden, weight, bias, _, labels = inputs()
    compare_linear(rank, ranks, hidden, weight, None, labels, softcap=2.0)
    compare_linear(rank, ranks, hidden, weight, bias, labels, chunk_tokens=4, **options_of(labels))
    compare_linear(rank, ranks, hidden, weight, bias, labels, backend="reference", **options_of(labels))


def linear_uneven_shards(rank, ranks):
    hidden, weight, bias, _, labels = inputs()
    compare_linear(rank, ranks, hidden, weight, bias, labels, uneven=True, **options_of(labels))
    bias[:] = torch.where(torch.arange(VOCAB) < 9, -INF, bias)  # whole ranks without a possible label
    compare_linear(rank, ranks, hidden, weight, bias, labels.clamp(min=9), uneven=True)


def linear_in_low_precision(rank, ranks):
    hidden, weight, bias, _, labels = inputs(torch.bfloat16)
    compare_linear(rank, ranks, hidden, weight, bias, labels, **options_of(labels))


def linear_without_gradient_of_hidden(rank, ranks):
    hidden, weight, _, _, labels = inputs()
    part = cut(weight, edges_of(ranks, False), rank, 0)
    logprob, _ = ops.linear_logprob_entropy(hidden, part, labels, group=dist.group.WORLD)
    whole = weight.requires_grad_()
    expected, _ = ops.linear_logprob_entropy(hidden, whole, labels)
    (wanted,) = torch.autograd.grad(expected.sum(), whole)
    edges = edges_of(ranks, False)
    (gradient,) = torch.autograd.grad(logprob.sum(), part)
    assert_close(gradient, wanted[edges[rank] : edges[rank + 1]])


def inplace_backward(rank, ranks):
    *_, logits, labels = inputs()
    edges = edges_of(ranks, True)
    leaf = cut(logits, edges, rank, -1)
    options = {"inplace_backward": True, "group": dist.group.WORLD, **place(edges, rank, True)}
    with pytest.raises(ValueError, match="would overwrite a leaf"):
        ops.logprob_entropy(leaf, labels, **options)
    computed = leaf * 1
    seen = []
    computed.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    (ours,) = torch.autograd.grad(loss_of(*ops.logprob_entropy(computed, labels, **options)), leaf)
    assert seen == [computed.data_ptr()]
    whole = logits.requires_grad_()
    (wanted,) = torch.autograd.grad(loss_of(*ops.logprob_entropy(whole, labels)), whole)
    assert_close(ours, wanted[:, edges[rank] : edges[rank + 1]])


def second_derivative(rank, ranks):
    hidden, weight, _, logits, _ = inputs()
    edges = edges_of(ranks, False)
    part, leaf = cut(logits, edges, rank, -1), hidden.requires_grad_()
    for entropy, of in (
        (ops.entropy(part, group=dist.group.WORLD), part),
        (ops.linear_logprob_entropy(leaf, cut(weight, edges, rank, 0), group=dist.group.WORLD)[1], leaf),
    ):
        (gradient,) = torch.autograd.grad(entropy.sum(), of, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


def compiled(rank, ranks):
    if ranks > 2:
        return  # tracing takes seconds a process, and does not depend on their number
    hidden, weight, _, logits, labels = inputs()
    edges = edges_of(ranks, False)
    leaves = [hidden.requires_grad_(), cut(weight, edges, rank, 0), cut(logits, edges, rank, -1)]

    def loss(hidden, weight, logits, temperature):
        options = {"temperature": temperature, "group": dist.group.WORLD}
        first = ops.linear_logprob_entropy(hidden * 2, weight, labels, **options)
        return loss_of(*first) + loss_of(*ops.logprob_entropy(logits, labels, **options))

    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    function = torch.compile(loss, fullgraph=True, backend=count)
    for value in (0.7, 1.3):
        temperature = torch.tensor(value)
        ours, expected = function(*leaves, temperature), loss(*leaves, temperature)
        assert_close(ours, expected)
        for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), strict=True):
            assert_close(a, b)
    assert len(graphs) == 1


def part_of_the_ranks(rank, ranks):
    """A group that is not the world: its ranks count from 0."""
    groups = [dist.new_group([first, first + 1]) for first in range(0, ranks, 2)]
    *_, logits, labels = inputs()
    part = cut(logits, edges_of(2, False), rank % 2, -1)
    ours = ops.logprob_entropy(part, labels, group=groups[rank // 2])
    for a, b in zip(ours, ops.logprob_entropy(logits, labels), strict=True):
        assert_close(a, b)


def mistakes(rank, ranks):
    hidden, weight, _, logits, labels = inputs()
    world, step = dist.group.WORLD, VOCAB // ranks
    part, rows = cut(logits, edges_of(ranks, False), rank, -1), cut(weight, edges_of(ranks, False), rank, 0)
    for start in (0, rank * (step - 1)):
        with pytest.raises(ValueError, match=r"columns must make up the vocabulary, got 0 to \d+ of 24, "):
            ops.logprob_entropy(part, labels, group=world, vocab_start=start, vocab_total=VOCAB)
        with pytest.raises(ValueError, match="columns must make up the vocabulary"):
            ops.linear_logprob_entropy(hidden, rows, labels, group=world, vocab_start=start, vocab_total=VOCAB)
    uneven = cut(logits, edges_of(ranks, True), rank, -1)
    with pytest.raises(ValueError, match="unequal shards need vocab_start and vocab_total"):
        ops.entropy(uneven, group=world)
    with pytest.raises(ValueError, match="does not fit a vocabulary of 24"):
        ops.entropy(part, group=world, vocab_start=VOCAB, vocab_total=VOCAB)
    with pytest.raises(ValueError, match="go together"):
        ops.entropy(part, group=world, vocab_start=0)
    for group, got in (
        (dist.GroupMember.NON_GROUP_MEMBER, "that of a group this rank is not in"),
        (init_device_mesh("cpu", (ranks,)), "DeviceMesh"),
    ):
        with pytest.raises(ValueError, match=f"group must be a .*ProcessGroup this rank belongs to, got {got}"):
            ops.entropy(part, group=group)
    labels[3] = VOCAB
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=r"labels must be in 0 to 23 or equal ignore_index -100, got 24"):
            ops.logprob_entropy(part, labels, group=world, backend=backend)
        with pytest.raises(ValueError, match=r"labels must be in 0 to 23 or equal ignore_index -100, got 24"):
            ops.linear_logprob_entropy(hidden, rows, labels, group=world, backend=backend)


CASES = [
    logits_equal_shards,
    logits_uneven_shards,
    ranks_without_columns,
    logits_of_several_dimensions,
    one_output,
    hostile_rows,
    results_are_the_same_bits,
    linear_equal_shards,
    linear_uneven_shards,
    linear_in_low_precision,
    linear_without_gradient_of_hidden,
    inplace_backward,
    second_derivative,
    compiled,
    part_of_the_ranks,
    mistakes,
]


def run_cases(rank, ranks, folder):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # new tensors hold NaN until they are written
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timeout)
    outcomes = {}
    for case in CASES:
        try:
            case(rank, ranks)
            outcomes[case.__name__] = ""
        except (Exception, pytest.fail.Exception):  # noqa: BLE001  the parent tells it
            outcomes[case.__name__] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def outcomes(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    torch.multiprocessing.spawn(run_cases, (request.param, folder), nprocs=request.param)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(request.param)]


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_over_ranks(outcomes, case):
    failures = [f"rank {rank}: {found[case]}" for rank, found in enumerate(outcomes) if found[case]]
    assert not failures, "\n".join(failures)


def gathered(logits, labels, edges, mask, temperature):
    """What the ranks' all-gather would give, and the call of the whole."""
    options = (labels, mask, temperature, 1.0, -100)
    parts = []
    for start, end in pairwise(edges):
        call = LogitsCall(logits[:, start:end], *options, start, edges[-1])
        running = new_running(call.logits)
        if end > start:
            shard_forward(call, running)
        parts.append(torch.cat((running, torch.tensor([[start, end - start, edges[-1], 0]]).double())))
    return torch.stack(parts), LogitsCall(logits, *options)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    data=st.data(),
    vocab=st.integers(2, 60),
    seed=st.integers(0, 10**6),
    order=st.randoms(use_true_random=False),
    special=st.sampled_from([0.0, -INF, 4.0, 1e30, -1e30]),
)
def test_any_cut_merges_to_the_whole(data, vocab, seed, order, special):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, vocab, generator=generator)
    logits = torch.where(torch.rand(4, vocab, generator=generator) < 0.3, special, logits)
    labels = torch.randint(vocab, (4,), generator=generator)
    mask, temperature = torch.tensor([True, True, False, True]), torch.tensor([0.3, 1.0, 1.0, 20.0])
    cuts = data.draw(st.lists(st.integers(0, vocab), max_size=5))  # equal ones: a rank without columns
    every, call = gathered(logits, labels, [0, *sorted(cuts), vocab], mask, temperature)
    ranks = list(range(len(every)))
    order.shuffle(ranks)  # ranks need not hold the columns in their order
    merged = torch.ops.arpo_ext.merge_shards(every[ranks], mask, temperature, 1.0)
    logprob, entropy, _ = shard_finish(merged, call)
    expected = ops.logprob_entropy(logits, labels, mask=mask, temperature=temperature)
    for a, b in zip((logprob, entropy), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("rank", "column", "value", "got"),
    [
        (1, 0, 6, "0 to 6 of 24, 6 to 17 of 24, 19 to 23 of 24"),
        (1, 0, 8, "0 to 6 of 24, 8 to 19 of 24, 19 to 23 of 24"),
        (1, 1, 11, "0 to 6 of 24, 7 to 17 of 24, 19 to 23 of 24"),
        (1, 1, 13, "0 to 6 of 24, 7 to 19 of 24, 19 to 23 of 24"),
        (2, 2, 25, "0 to 6 of 24, 7 to 18 of 24, 19 to 23 of 25"),
        (0, 0, 1, "1 to 7 of 24, 7 to 18 of 24, 19 to 23 of 24"),
    ],
)
def test_one_rank_that_is_out_of_place_is_found(rank, column, value, got):
    *_, logits, labels = inputs()
    every, _ = gathered(logits, labels, [0, 7, 19, VOCAB], None, None)
    torch.ops.arpo_ext.merge_shards(every, None, None, 1.0)
    every[rank, -1, column] = value
    with pytest.raises(ValueError, match=f"columns must make up the vocabulary, got {got}; unequal shards need"):
        torch.ops.arpo_ext.merge_shards(every, None, None, 1.0)


def test_opcheck():
    *_, logits, labels = inputs()
    mask, temperature = torch.ones(ROWS, dtype=torch.bool), torch.linspace(0.5, 2, ROWS)
    every, _ = gathered(logits, labels, [0, 7, VOCAB], mask, temperature)
    torch.library.opcheck(torch.ops.arpo_ext.merge_shards.default, (every, mask, temperature, 1.0))
    arpo = torch.ops.arpo_ext
    for leaf, extra in (
        (logits, (labels, None, None, 0.7, -100)),
        (logits.clone().requires_grad_(), (labels, mask, temperature, 1.0, -100)),
    ):
        call = (leaf, *extra, 0, VOCAB)
        torch.library.opcheck(arpo.logprob_entropy_sums.default, (*call, "auto"))
        running = arpo.logprob_entropy_sums(*call, "auto")
        for inputs_of in (call, (leaf, None, *call[2:])):
            torch.library.opcheck(arpo.logprob_entropy_combine.default, (*inputs_of, running, False, "auto"))
        stats = arpo.logprob_entropy_combine(*call, running, False, "auto")[2]
        upstream = (stats, torch.ones(ROWS), None, "auto", 0, VOCAB)
        part = leaf.detach()[:, :5].contiguous()
        for op in (arpo.logprob_entropy_backward, arpo.logprob_entropy_backward_):
            torch.library.opcheck(op.default, (part.clone(), *extra, *upstream))
