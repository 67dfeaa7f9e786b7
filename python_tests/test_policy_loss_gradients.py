"""What autograd may do with the policy loss: keep its graph, take its gradient, transform it."""

import gc

import pytest
import torch
from backends import counting
from policy_loss_cases import FAST, device_of, made_tokens, run
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from arpo_ext import ops

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

BACKENDS = [*FAST, "reference"]


class Watching(TorchDispatchMode):
    """Sees every operation, so that the loss goes through its registered op."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def eager(function):
    return function


def watched(function):
    def call(*args, **kwargs):
        with Watching():
            return function(*args, **kwargs)

    return call


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


WAYS = pytest.mark.parametrize("way", [eager, watched, compiled])


def few(backend, count=30):
    """Tokens without NaN; logprob is a leaf."""
    logprob, *rest = (t.nan_to_num().to(device_of(backend)) for t in made_tokens(count))
    return logprob.requires_grad_(), *rest


@pytest.mark.parametrize("backend", BACKENDS)
@WAYS
def test_only_logprob_and_entropy_have_gradients_and_sums_have_none(backend, way):
    tokens = [t.detach().requires_grad_() for t in few(backend)]
    names = ("importance", "ref_logprob", "entropy")
    columns = {name: torch.rand_like(tokens[1]).requires_grad_() for name in names}
    numbers = {name: torch.tensor(0.5, requires_grad=True) for name in ("normalizer", "kl_coef", "entropy_coef")}
    loss, sums = way(ops.policy_loss)(*tokens, **columns, **numbers, kl="k3", backend=backend)
    assert not any(value.requires_grad for value in sums)
    loss.mul(3).backward()
    given = [t.grad is not None for t in (*tokens, *columns.values(), *numbers.values())]
    assert given == [True] + 5 * [False] + [True] + 3 * [False]
    values = [{name: t.detach() for name, t in group.items()} for group in (columns, numbers)]
    expected = run([t.detach() for t in tokens], backend, **values[0], **values[1], kl="k3")[1]
    torch.testing.assert_close(torch.stack([tokens[0].grad, columns["entropy"].grad]).cpu(), 3 * expected)
    assert not ops.policy_loss(*(t.detach() for t in tokens), normalizer=1.0, backend=backend)[0].requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(30,), (5, 6)])
@WAYS
def test_a_graph_may_be_kept_and_used_again(backend, shape, way):
    """A view hands the gradient's memory to the leaf, whose .grad then changes in place."""
    tokens = few(backend)
    leaf = tokens[0].detach().reshape(shape).requires_grad_()
    loss = way(lambda x: ops.policy_loss(x.reshape(-1), *tokens[1:], normalizer=1.0, backend=backend)[0])(leaf)
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    leaf.grad.zero_()
    for _ in range(3):
        loss.backward(retain_graph=True)
    loss.mul(2).backward()
    torch.testing.assert_close(leaf.grad, 5 * once)


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_add_up_in_the_gradient_of_a_leaf(backend):
    tokens = few(backend)
    leaf = tokens[0].detach().reshape(5, 6).requires_grad_()
    for part in range(5):
        loss, _ = ops.policy_loss(
            leaf.reshape(-1)[6 * part : 6 * part + 6],
            *(t[6 * part : 6 * part + 6] for t in tokens[1:]),
            normalizer=1.0,
            backend=backend,
        )
        loss.backward()
    torch.testing.assert_close(leaf.grad.reshape(-1).cpu(), run(tokens, backend, normalizer=1.0)[1])


def test_a_backward_pass_frees_the_gradient():
    tokens = few("cpu", 100_003)
    loss, _ = ops.policy_loss(*tokens, normalizer=1.0, backend="cpu")
    loss.backward()
    tokens[0].grad = None
    gc.collect()
    held = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == tokens[0].shape]
    assert {id(t) for t in held} <= {id(t) for t in tokens}
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_the_only_backward_pass_hands_the_gradient_on():
    """Without reading and writing it once more."""
    tokens = few("cpu")
    seen = []
    tokens[0].register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    loss, _ = ops.policy_loss(*tokens, normalizer=1.0, backend="cpu")
    saved = loss.grad_fn.saved_tensors[0].data_ptr()
    loss.backward(retain_graph=True)
    loss.backward()
    assert seen[0] != saved
    assert seen[1] == saved


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_upstream_gradients_at_once(backend):
    tokens = few(backend)
    loss, _ = ops.policy_loss(*tokens, normalizer=1.0, backend=backend)
    scales = torch.tensor([1.0, -2.0, 0.0], device=tokens[1].device)
    (got,) = torch.autograd.grad(loss, tokens[0], scales, is_grads_batched=True)
    torch.testing.assert_close(got.cpu(), scales.cpu()[:, None] * run(tokens, backend, normalizer=1.0)[1])


@pytest.mark.parametrize("way", [eager, watched])
def test_the_fast_loss_refuses_a_second_derivative(way):
    tokens = few("cpu")
    loss, _ = way(ops.policy_loss)(*tokens, normalizer=1.0, backend="cpu")
    with pytest.raises(RuntimeError, match="policy_loss cannot be differentiated twice"):
        torch.autograd.grad(loss, tokens[0], create_graph=True)


@pytest.mark.parametrize("op", [ops.policy_loss, ops.logprob_entropy, ops.linear_logprob_entropy])
def test_forward_mode_is_refused_and_not_zero(op):
    def call(x):
        if op is ops.policy_loss:
            return op(x[0], *torch.ones(3, 4), normalizer=1.0, backend="cpu")[0]
        weight = (torch.ones(5, 4),) if op is ops.linear_logprob_entropy else ()
        return op(x, *weight, torch.zeros(2, dtype=torch.int64))[0]

    x = torch.randn(2, 4)
    with pytest.raises(RuntimeError, match=f"{op.__name__} has no forward-mode derivative"):
        torch.func.jvp(call, (x,), (x,))
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=f"{op.__name__} has no forward-mode derivative"):
            call(forward_ad.make_dual(x, x))
        call(x)


def test_the_reference_of_the_loss_has_a_forward_mode():
    tokens = few("reference")
    logprob, direction = tokens[0].detach(), torch.rand(30)
    _, tangent = torch.func.jvp(
        lambda x: ops.policy_loss(x, *tokens[1:], normalizer=1.0, backend="reference")[0], (logprob,), (direction,)
    )
    torch.testing.assert_close(tangent, run(tokens, "reference", normalizer=1.0)[1] @ direction)


SCHEDULED = {
    "ppo": {"clip_low": 0.1, "clip_high": 0.2, "normalizer": 3.0},
    "packed": {"clip": "dual", "dual_clip": 2.0, "clip_low": 0.1, "normalizer": 5, "kl": "k3", "kl_coef": 0.2},
    "turn": {"clip": "gppo", "clip_high": 0.3, "normalizer": 2.0, "entropy_coef": 0.1},
    "sapo": {"clip": "sapo", "tau_positive": 0.5, "tau_negative": 2.0, "normalizer": 4.0},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", SCHEDULED)
def test_a_new_number_compiles_nothing_anew(backend, form):
    """A number is a constant of the first graph and an input of the second, which serves all others."""
    torch._dynamo.reset()
    graphs, compiler = counting("aot_eager")
    tokens = few(backend)
    index = torch.arange(30, device=tokens[1].device) // 5
    given = {"ref_logprob": tokens[1] * 0.9} if "kl" in SCHEDULED[form] else {}
    given |= {"entropy": tokens[1].abs()} if form == "turn" else {}
    given |= {"ratio": "turn", "segment": index, "groups": 6} if form == "turn" else {}
    if form == "packed":
        parent, leaf_segment = torch.tensor([-1, 0, 0, 1, 1, 2]), torch.tensor([3, 4, 5])
        given |= {"ratio": "sequence", "segment": index, "parent": parent, "leaf_segment": leaf_segment}
        given = {name: value.to(index.device) if torch.is_tensor(value) else value for name, value in given.items()}
        tokens = (*tokens[:2], tokens[2][:3], tokens[3])

    def step(logprob, numbers):
        loss, sums = ops.policy_loss(logprob * 1.0, *tokens[1:], **numbers, **given, backend=backend)
        return loss + 0.0 * logprob.sum(), sums.clipped + sums.dual_clipped

    wrapped = torch.compile(step, backend=compiler, fullgraph=True)
    for change in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.1, 2.2):
        numbers = {n: value * change if type(value) is float else value for n, value in SCHEDULED[form].items()}
        numbers["normalizer"] = numbers["normalizer"] if form != "packed" else int(10 * change)
        leaves = [tokens[0].detach().clone().requires_grad_() for _ in range(2)]
        results = [call(leaf, numbers) for call, leaf in zip((wrapped, step), leaves, strict=True)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(r[0], x)[0] for r, x in zip(results, leaves, strict=True)))
    assert len(graphs) == 2


@pytest.mark.parametrize("numbers", [{"normalizer": -1.0}, {"normalizer": 1.0, "clip_low": 1.5}])
def test_a_wrong_number_is_named_while_compiling_too(numbers):
    torch._dynamo.reset()
    compiled = torch.compile(ops.policy_loss, backend="eager")
    message = r"got (normalizer -1\.0; expected a number above 0|clip_low 1\.5; expected 0)"
    with pytest.raises(ValueError, match=message):
        compiled(*few("cpu"), **numbers)
