"""linear_logprob_entropy tile by tile: a matrix product into one small workspace, then the row sums of what it holds.

Work: 2 N D V operations forward and 6 N D V backward (the logits once more, then both gradients), so the floor is one
and three matrix products of that shape; everything else here touches each logit in the cache, not in memory.

The vocabulary is the outer loop and the tokens the inner one. Then each weight is read from memory once per pass, its
gradient is complete when its tile is done, and low-precision weights need a float32 accumulator of one tile instead of
one of V x D. What grows with N is the float32 accumulator of a low-precision grad_hidden, and the hidden
states that are left where rows are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from arpo_ext.ops import _native
from arpo_ext.ops._logits import LogitsCall
from arpo_ext.ops._result_memory import empty_result
from arpo_ext.ops._shards import new_running, shard_backward, shard_forward

# On the CPU a tile of 256 x 1536 float32 stays in the second-level caches; measured on two AVX-512 cores, D = 1024, the
# products reach there what the largest ones reach (512 x 1536 and 256 x 2048 do too, 256 x 3072 and 1024 x 1536 lose
# a tenth or more).
_CPU_TOKENS, _CPU_ELEMENTS, _CPU_COLUMNS = 256, 256 * 1536, 8192
_CPU_WEIGHTS = 2 << 20  # elements of a weight tile that is converted to float32
# On the GPU a forward tile of 32 MiB stays in the second-level cache of the large devices. Backward, grad_hidden is
# read and written once per tile, which wants wider ones. Not yet measured.
_GPU_TOKENS, _GPU_ELEMENTS, _GPU_BACKWARD_ELEMENTS = 4096, 8 << 20, 32 << 20


class LinearCall(NamedTuple):
    """The checked inputs that forward and backward share, in the order of the op's schema.

    hidden [..., D], labels, mask and temperatures [...] (temperatures may be 0-d). `weight` and `bias` are the rows
    `vocab_start` and up of a vocabulary of `vocab_total`. softcap 0: none; chunk_tokens 0: choose. The backends take
    what `flat` gives: hidden [N, D] and the others [N].
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor | None
    mask: Tensor | None
    temperatures: Tensor | None
    temperature: float
    ignore_index: int
    softcap: float
    chunk_tokens: int
    vocab_start: int
    vocab_total: int

    def flat(self) -> LinearCall:
        rows = self.hidden.shape[:-1]
        labels, mask, temperatures = (t if t is None or t.shape != rows else t.reshape(-1) for t in self[3:6])
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])
        return self._replace(hidden=hidden, labels=labels, mask=mask, temperatures=temperatures)

    def rows(self, logits: Tensor, rows: slice | Tensor = slice(None), start: int = 0) -> LogitsCall:
        """The logits of some rows and of the columns `start` and up, as the row sums take them."""
        labels, mask = (None if t is None else t[rows] for t in (self.labels, self.mask))
        temperatures = self.temperatures
        if temperatures is not None and temperatures.dim():
            temperatures = temperatures[rows]
        start += self.vocab_start
        options = (labels, mask, temperatures, self.temperature, self.ignore_index)
        return LogitsCall(logits, *options, start, self.vocab_total)


class _Tile(NamedTuple):
    columns: slice
    rows: slice
    weight: Tensor
    hidden: Tensor
    logits: Tensor  # in the workspace; the next tile overwrites it


def _converts(call: LinearCall) -> bool:
    """Whether operands are widened tile by tile: the CPU has no product of low precision with a float32 result."""
    return _native.device_kind(call.hidden) == "cpu" and call.hidden.dtype != torch.float32


def _tile_shape(call: LinearCall, *, backward: bool) -> tuple[int, int]:
    """(tokens, columns) of a tile."""
    depth = call.hidden.shape[1]
    if _native.device_kind(call.hidden) == "cpu":
        tokens, elements = call.chunk_tokens or _CPU_TOKENS, _CPU_ELEMENTS
        most = _CPU_COLUMNS
        if _converts(call):
            most = min(most, _CPU_WEIGHTS // depth)
    else:
        tokens, elements = call.chunk_tokens or _GPU_TOKENS, _GPU_BACKWARD_ELEMENTS if backward else _GPU_ELEMENTS
        most = call.weight.shape[0]
    tokens = max(min(tokens, call.hidden.shape[0]), 1)
    columns = max(min(elements // tokens, most) // 64 * 64, 256)
    return tokens, min(columns, call.weight.shape[0])


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b; accumulated, and stored, in out's float32 whatever the operands' dtype."""
    wider = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, **wider, out=out)
    else:
        torch.mm(a, b, **wider, out=out)


def _tiles(call: LinearCall, shape: tuple[int, int]) -> Iterator[_Tile]:
    """The tiles of logits one after another, soft-capped, in float32 also for operands of lower precision."""
    (count, depth), vocab = call.hidden.shape, call.weight.shape[0]
    tokens, width = shape
    new = call.hidden.new_empty
    convert = _converts(call)
    logits_work = new(tokens * width, dtype=torch.float32)
    weight_work = new((width, depth) if convert else 0, dtype=torch.float32)
    hidden_work = new((tokens, depth) if convert else 0, dtype=torch.float32)
    for first in range(0, vocab, width):
        columns = slice(first, min(first + width, vocab))
        weight = call.weight[columns]
        bias = None if call.bias is None else call.bias[columns].float()
        if convert:
            weight = weight_work[: weight.shape[0]].copy_(weight)
        for begin in range(0, count, tokens):
            rows = slice(begin, min(begin + tokens, count))
            hidden = call.hidden[rows]
            if convert:
                hidden = hidden_work[: hidden.shape[0]].copy_(hidden)
            logits = logits_work[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], weight.shape[0])
            _multiply(hidden, weight.t(), logits)
            if bias is not None:
                logits.add_(bias)
            if call.softcap:
                logits.div_(call.softcap).tanh_().mul_(call.softcap)
            yield _Tile(columns, rows, weight, hidden, logits)


def _only(call: LinearCall, kept: Tensor) -> LinearCall:
    inputs = call.rows(call.hidden[kept], kept)
    return call._replace(hidden=inputs.logits, labels=inputs.labels, mask=None, temperatures=inputs.temperatures)


def _skip_rows(call: LinearCall, wanted: Tensor | None) -> tuple[LinearCall, Tensor | None]:
    """The call without the rows that are not wanted, and the indices of its rows (None: all).

    On the GPU the number of wanted rows is not known without waiting for it: the products take all rows, with zeros
    for those that are not wanted, because 0 * NaN from a padded row would spoil the gradient of the weights.
    """
    if wanted is None:
        return call, None
    if _native.device_kind(call.hidden) != "cpu":
        return call._replace(hidden=call.hidden.masked_fill(~wanted.unsqueeze(1), 0)), None
    kept = wanted.nonzero().squeeze(1)
    return (call, None) if len(kept) == len(wanted) else (_only(call, kept), kept)


def sums(backend: str, call: LinearCall) -> Tensor:
    """`running` [N, 4] of the columns `weight` stands for, see `_shards`."""
    running = new_running(call.hidden)
    call, kept = _skip_rows(call, call.mask)
    part = running if kept is None else running[kept]
    for tile in _tiles(call, _tile_shape(call, backward=False)):
        shard_forward(call.rows(tile.logits, tile.rows, tile.columns.start), part[tile.rows], backend)
    return part if kept is None else running.index_copy_(0, kept, part)


class Upstream(NamedTuple):
    """What the backward pass is given: gradients [N], None for zero, and the statistics [3, N] of the whole rows."""

    stats: Tensor
    logprob: Tensor | None
    entropy: Tensor | None

    def rows(self, rows: slice | Tensor) -> Upstream:
        parts = (None if t is None else t[..., rows].contiguous() for t in self)
        return Upstream(*parts)


class Wanted(NamedTuple):
    hidden: bool
    weight: bool
    bias: bool


def _rows_with_gradient(call: LinearCall, upstream: Upstream) -> Tensor | None:
    """Rows the gradient depends on; None for all. On the CPU a row without upstream gradient costs no product."""
    if _native.device_kind(call.hidden) != "cpu":
        return call.mask
    wanted = torch.zeros(call.hidden.shape[0], dtype=torch.bool)
    if upstream.logprob is not None and call.labels is not None:
        wanted |= (upstream.logprob != 0) & (call.labels != call.ignore_index)
    if upstream.entropy is not None:
        wanted |= upstream.entropy != 0
    return wanted if call.mask is None else wanted & call.mask


def gradients(
    backend: str, call: LinearCall, upstream: Upstream, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden (float32), weight and bias (their dtypes); those of a shard are its part of the sum."""
    count, depth = call.hidden.shape
    call, kept = _skip_rows(call, _rows_with_gradient(call, upstream))
    if kept is not None:
        upstream = upstream.rows(kept)
    grad_hidden = call.hidden.new_empty(call.hidden.shape, dtype=torch.float32) if wanted.hidden else None
    grad_weight = empty_result(call.weight.shape, call.weight) if wanted.weight else None
    grad_bias = None if call.bias is None or not wanted.bias else torch.zeros_like(call.bias, dtype=torch.float32)
    if len(call.hidden):
        _fill(backend, call, upstream, grad_hidden, grad_weight, grad_bias)
    elif grad_weight is not None:
        grad_weight.zero_()
    if grad_hidden is not None and kept is not None:
        grad_hidden = grad_hidden.new_zeros(count, depth).index_copy_(0, kept, grad_hidden)
    return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(call.weight.dtype)


def _fill(
    backend: str,
    call: LinearCall,
    upstream: Upstream,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    tokens, width = shape = _tile_shape(call, backward=True)
    count, depth = call.hidden.shape
    new = call.hidden.new_empty
    parts = {begin: upstream.rows(slice(begin, begin + tokens)) for begin in range(0, count, tokens)}
    slopes = new(tokens * width if call.softcap else 0, dtype=torch.float32)
    accumulate_apart = grad_weight is not None and grad_weight.dtype != torch.float32
    weight_sums = new((width, depth) if accumulate_apart else 0, dtype=torch.float32)
    for columns, rows, weight, hidden, logits in _tiles(call, shape):
        slope = None
        if call.softcap:
            slope = slopes[: logits.numel()].view_as(logits)
            torch.div(logits, call.softcap, out=slope).square_().neg_().add_(1)
        shard = call.rows(logits, rows, columns.start)
        shard_backward(shard, *parts[rows.start], out=logits, backend=backend)
        if slope is not None:
            logits.mul_(slope)
        if grad_bias is not None:
            grad_bias[columns] += logits.sum(0)
        # On the GPU the products take operands of one dtype; rounding d logits to it is what autograd does there.
        d_logits = logits.to(weight.dtype)
        if grad_hidden is not None:
            _multiply(d_logits, weight, grad_hidden[rows], add=columns.start > 0)
        if grad_weight is not None:
            total = weight_sums[: weight.shape[0]] if accumulate_apart else grad_weight[columns]
            _multiply(d_logits.t(), hidden, total, add=rows.start > 0)
            if accumulate_apart and rows.stop == count:
                grad_weight[columns] = total
