"""Which token positions to branch at, over whole rows of tokens, and the future value that APPO weighs them by.

`branch_points` decides for paths that have just met a tool result; these ops look back at complete rows. Source: APPO
(arXiv 2606.12384) and its published code (AMAP-ML/APPO, `build_appo_branch_request`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from arpo_ext.ops import _native
from arpo_ext.ops import branch_tokens_reference as reference
from arpo_ext.ops._branch import check_vector, refuse_cpu
from arpo_ext.ops._dispatch import Backend, choose, refuse_cuda

# Codes as in csrc/branch_tokens.h.
SCOPES = {"row": 0, "tree": 1, "none": 2}


class TokenBranches(NamedTuple):
    """Chosen positions [R, count], the best of a tree first; row -1, token -1, score 0 where there is none."""

    row: Tensor
    token: Tensor
    score: Tensor


class TokenCall(NamedTuple):
    """The checked inputs of branch_tokens, in the order of its schema."""

    entropy: Tensor
    mask: Tensor | None
    tree: Tensor
    room: Tensor
    value: Tensor | None
    candidate: Tensor | None
    key: Tensor | None
    count: int
    scope: int
    min_distance: int
    fallback: bool
    eps: float


def branch_tokens(
    entropy: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    room: Tensor,
    value: Tensor | None = None,
    *,
    count: int,
    candidate: Tensor | None = None,
    key: Tensor | None = None,
    scope: str = "row",
    min_distance: int = 1,
    fallback: bool = True,
    eps: float = 1e-6,
    backend: str = "auto",
) -> TokenBranches:
    """The `min(room, count)` best token positions of each of R trees among B rows of T tokens.

        counted = mask & entropy.isfinite() & value.isfinite()
        z(x) = (x - mean(x)) / (std(x) + eps)  over the counted positions of the row (scope "row"), of all rows of the
               tree ("tree"), or x itself ("none"); biased std, float64 rounded to float32; 0 where all x are equal
        score = z(entropy) * z(value)                     (z(entropy) without value)
        strict = z(entropy) > 0, z(value) > 0, score > 0  (z(entropy) > 0 without value)
        for row, t in sorted(counted & candidate & (strict | fallback), (strict first, -score, key, row, t)):
            choose it, unless the tree has min(room, count), or a chosen t' of this row has |t - t'| < min_distance

    entropy: [B, T] float32, nats, of every token. mask: [B, T] bool, the sampled tokens; None: all.
    tree: [B] int64 in [0, R). room: [R] int32, branches the tree may still get; below 0 counts as 0.
    value: [B, T] float32, a second score (`future_value`), or None.
    candidate: [B, T] bool, where a branch may start; other positions still count in the z-scores. The published code
        leaves white space out this way; leave out a row's last position too, which has nothing to resample.
    key: [B] int64, orders the rows of a tree for ties: a hash of the path makes the choice independent of the batch's
        order. None: the row's index, as published.
    count: places of a tree in the result, a number so that its shape is known.
    fallback: also take positions that are not strict when strict ones run out, as published. The published code then
        repeats positions until the budget is full; here -1 says that there are no more.
    Without mask, candidate, key and min_distance, scope "row", this is the selection of the published code, which keeps
    the product of two negative z-scores out of the strict ones only.

    All backends choose the same positions and return the same bits: float64 sums are in one fixed order.
    ValueError: shape, dtype, device, a number or (on the CPU) a tree index is wrong; on a GPU a row whose tree index is
    out of range is left out. No gradient flows through. BackendError: the backend named cannot serve.
    """
    call = checked_call(entropy, mask, tree, room, value, candidate, key, count, scope, min_distance, fallback, eps)
    return TokenBranches(*choose("branch_tokens", _TOKENS, backend, entropy).run(*call))


def future_value(
    log_ratio: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    clip: float = 0.2,
    backend: str = "auto",
) -> Tensor:
    """How much likelier the trainer finds what follows each token than the sampler did. [B, T] float32.

        value[b, t] = exp(clamp(sum(gamma**(k - t) * log_ratio[b, k] for k >= t if mask[b, k]), -20, 20))
        if clip > 0: value = value.clamp(1 - clip, 1 + clip)

    in one pass from the right (the published code multiplies every row by a T x T matrix). Masked tokens add nothing,
    whatever they hold, but count in the distance k - t, as published.

    log_ratio: [B, T] float32, log-probability under the trainer less that under the sampler. mask: [B, T] bool; None:
    all. gamma in 0 to 1. Sums in float64, rounded once at the end. CPU and CUDA agree to the bit, the reference to one
    unit in the last place. NaN and infinities go through as arithmetic has it, to the left only.
    No gradient flows through. ValueError: shape, dtype, device or a number is wrong.
    Source: APPO (arXiv 2606.12384), Omega. Before any update of the trainer, as the published code calls it, both terms
    are the same weights, and the value is the numerical gap between trainer and sampler.
    """
    _check_matrix("future_value", "log_ratio", log_ratio, torch.float32, None)
    if mask is not None:
        _check_matrix("future_value", "mask", mask, torch.bool, log_ratio)
    if not 0 <= gamma <= 1:
        raise ValueError(f"future_value: got gamma {gamma}; expected 0 to 1")
    if not clip < float("inf"):
        raise ValueError(f"future_value: got clip {clip}; expected a finite number, 0 or less for none")
    chosen = choose("future_value", _VALUES, backend, log_ratio)
    return chosen.run(log_ratio.detach(), mask, float(gamma), float(clip))


def checked_call(
    entropy: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    room: Tensor,
    value: Tensor | None,
    candidate: Tensor | None,
    key: Tensor | None,
    count: int,
    scope: str,
    min_distance: int,
    fallback: bool,
    eps: float,
) -> TokenCall:
    op = "branch_tokens"
    _check_matrix(op, "entropy", entropy, torch.float32, None)
    for name, tensor, dtype in (
        ("mask", mask, torch.bool),
        ("value", value, torch.float32),
        ("candidate", candidate, torch.bool),
    ):
        if tensor is not None:
            _check_matrix(op, name, tensor, dtype, entropy)
    check_vector(op, "tree", tree, torch.int64, entropy.shape[0], entropy.device)
    check_vector(op, "room", room, torch.int32, None, entropy.device)
    if key is not None:
        check_vector(op, "key", key, torch.int64, entropy.shape[0], entropy.device)
    if scope not in SCOPES:
        raise ValueError(f"{op}: got scope {scope!r}; expected {', '.join(SCOPES)}")
    if not 0 <= count < 2**31 or not 1 <= min_distance < 2**63:
        raise ValueError(
            f"{op}: got count {count} and min_distance {min_distance}; expected 0 to 2^31 - 1 and at least 1"
        )
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: got eps {eps}; expected a finite number of at least 0")
    value = None if value is None else value.detach()
    numbers = count, SCOPES[scope], min_distance, bool(fallback), float(eps)
    return TokenCall(entropy.detach(), mask, tree, room, value, candidate, key, *numbers)


def _check_matrix(op: str, name: str, tensor: Tensor, dtype: torch.dtype, like: Tensor | None) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{op}: got {name} of {tensor.dtype}; expected {dtype}")
    if tensor.ndim != 2 or (like is not None and tensor.shape != like.shape):
        expected = "[B, T]" if like is None else list(like.shape)
        raise ValueError(f"{op}: got {name} of shape {list(tensor.shape)}; expected {expected}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: got {name} on {tensor.device}; expected {like.device}")


def _reference_tokens(*arguments: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    call = TokenCall(*arguments)
    scope = next(name for name, code in SCOPES.items() if code == call.scope)
    return reference.branch_tokens(**{**call._asdict(), "scope": scope})


torch.library.define(
    "arpo_ext::branch_tokens",
    "(Tensor entropy, Tensor? mask, Tensor tree, Tensor room, Tensor? value, Tensor? candidate, Tensor? key, "
    "int count, int scope, int min_distance, bool fallback, float eps) -> (Tensor, Tensor, Tensor)",
)
torch.library.define("arpo_ext::future_value", "(Tensor log_ratio, Tensor? mask, float gamma, float clip) -> Tensor")

_TOKENS = {
    "cpu": Backend(refuse_cpu, torch.ops.arpo_ext.branch_tokens),
    "cuda": Backend(refuse_cuda, torch.ops.arpo_ext.branch_tokens),
    "reference": Backend(lambda tensor: None, _reference_tokens),
}
_VALUES = {
    "cpu": Backend(refuse_cpu, torch.ops.arpo_ext.future_value),
    "cuda": Backend(refuse_cuda, torch.ops.arpo_ext.future_value),
    "reference": Backend(lambda tensor: None, reference.future_value),
}


@torch.library.register_fake("arpo_ext::branch_tokens")
def _branch_tokens_fake(*arguments: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    return _places(TokenCall(*arguments))


@torch.library.register_fake("arpo_ext::future_value")
def _future_value_fake(log_ratio: Tensor, *rest: object) -> Tensor:
    return log_ratio.new_empty(log_ratio.shape)


def _places(call: TokenCall) -> tuple[Tensor, Tensor, Tensor]:
    shape = call.room.shape[0], call.count
    row, token = (call.room.new_empty(shape, dtype=torch.int64) for _ in range(2))
    return row, token, call.room.new_empty(shape, dtype=torch.float32)


@torch.library.impl("arpo_ext::branch_tokens", ("cpu", "cuda"))
def _branch_tokens(*arguments: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    call = TokenCall(*arguments)
    places = _places(call)
    tensors = call.entropy, call.value, call.mask, call.candidate, call.tree, call.key, call.room
    kept = [None if t is None else t.contiguous() for t in tensors]
    entropy = call.entropy
    rows = _native.C.TokenRows(*map(_native.pointer, kept), *entropy.shape, call.room.numel())
    rule = _native.C.TokenRule(call.scope, call.count, call.min_distance, call.fallback, call.eps)
    choice = _native.C.TokenChoice(*(place.data_ptr() for place in places))
    if _native.device_kind(entropy) == "cpu":
        _native.C.branch_tokens_cpu(rule, rows, choice, torch.get_num_threads())
    else:
        scratch = entropy.new_empty(_native.C.branch_tokens_scratch_bytes(*entropy.shape), dtype=torch.uint8)
        _native.C.branch_tokens_cuda(rule, rows, choice, scratch.data_ptr(), *_native.place(entropy))
    return places


@torch.library.impl("arpo_ext::future_value", ("cpu", "cuda"))
def _future_value(log_ratio: Tensor, mask: Tensor | None, gamma: float, clip: float) -> Tensor:
    log_ratio, mask = log_ratio.contiguous(), None if mask is None else mask.contiguous()
    value = torch.empty_like(log_ratio)
    low, high = (1.0 - clip, 1.0 + clip) if clip > 0 else (0.0, float("inf"))
    addresses = log_ratio.data_ptr(), _native.pointer(mask)
    args = _native.C.FutureValue(*addresses, *log_ratio.shape, gamma, low, high, value.data_ptr())
    if _native.device_kind(log_ratio) == "cpu":
        _native.C.future_value_cpu(args, torch.get_num_threads())
    else:
        _native.C.future_value_cuda(args, *_native.place(log_ratio))
    return value
