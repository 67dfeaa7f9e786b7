"""What autograd may do with the policy loss: keep its graph, take its gradient, transform it."""

import gc

import pytest
import torch
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
