"""What the ops over rows of logits share: their checked arguments, the layout of the rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from arpo_ext.ops import _native
from arpo_ext.ops._invalid_labels import invalid_label_counter, prepare_invalid_label_counter

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LogitsCall(NamedTuple):
    """The checked inputs that forward and backward share: those of the op's schema in its order, then the shard.

    The logits may be a shard: columns `vocab_start` and up of a vocabulary of `vocab_total` (None: these are all).
    Labels count from the vocabulary's first column. One in another shard counts as a label, but has no logit here.
    """

    logits: Tensor
    labels: Tensor | None
    mask: Tensor | None
    temperatures: Tensor | None
    temperature: float
    ignore_index: int
    vocab_start: int = 0
    vocab_total: int | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, float, int]:
        return self[:6]

    @property
    def vocab(self) -> int:
        """Columns of the whole vocabulary."""
        return self.logits.shape[-1] if self.vocab_total is None else self.vocab_total


def checked_call(
    logits: Tensor,
    labels: Tensor | None,
    temperature: float | Tensor,
    ignore_index: int,
    mask: Tensor | None,
    name: str = "logits",
    axis: str = "V",
    least: int = 1,
) -> LogitsCall:
    """`name` and `axis`: what errors call the rows; `least`: how many columns there must be."""
    if logits.dim() == 0 or logits.shape[-1] < least or logits.dtype not in _DTYPES:
        raise ValueError(
            f"{name} must be [..., {axis}] with {axis} >= {least} in float32, bfloat16, float16 or float64, "
            f"got {logits.dtype} of shape {tuple(logits.shape)}"
        )
    rows = logits.shape[:-1]
    if labels is not None:
        if labels.shape != rows or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"labels must be integers of shape {tuple(rows)}, got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        labels = labels.to(torch.int64)
    if mask is not None and (mask.shape != rows or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool of shape {tuple(rows)}, got {mask.dtype} of shape {tuple(mask.shape)}")
    temperatures = None
    if isinstance(temperature, Tensor):
        if temperature.requires_grad or temperature.shape not in ((), rows):
            raise ValueError(
                f"temperature must be a number or a tensor of shape () or {tuple(rows)} that needs no gradient, "
                f"got shape {tuple(temperature.shape)}, requires_grad={temperature.requires_grad}"
            )
        temperatures, temperature = temperature.to(result_dtype(logits)), 1.0
    elif not 1e-15 <= temperature <= 1e30:
        raise ValueError(f"temperature must be positive, in 1e-15 to 1e30, got {temperature}")
    elif torch.compiler.is_compiling():
        # A number given to an op is part of the graph, so that every new temperature would compile another one, and
        # hit the limit of them. So is one that fills a tensor; a product keeps it an input.
        temperatures, temperature = logits.new_ones((), dtype=result_dtype(logits)) * temperature, 1.0
    for other, tensor in (("labels", labels), ("mask", mask), ("temperature", temperatures)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{other} must be on the device of {name}, {logits.device}, got {tensor.device}")
    if labels is not None and _native.device_kind(labels) == "cuda":
        prepare_invalid_label_counter(labels.device)
    return LogitsCall(logits, labels, mask, temperatures, float(temperature), ignore_index)


def result_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def row_layout(tensor: Tensor) -> tuple[int, int, int] | None:
    """(inner, outer stride, inner stride) such that row r starts at r // inner * outer + r % inner * inner_stride.

    None if the leading dimensions need more than two strides or the last one is not adjacent.
    """
    if tensor.is_contiguous():
        return max(tensor.numel() // tensor.shape[-1], 1), 0, tensor.shape[-1]
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        return None
    levels: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    levels = [(1, 0)] * (2 - len(levels)) + levels
    if len(levels) > 2:
        return None
    (_, outer_stride), (inner, inner_stride) = levels
    return max(inner, 1), outer_stride, inner_stride


def refuse_layout(call: LogitsCall) -> str | None:
    if row_layout(call.logits) is None:
        return f"needs adjacent columns and rows of at most two strides, got strides {call.logits.stride()}"
    return None


def native_inputs(call: LogitsCall) -> tuple[object, list[Tensor]]:
    """The native description of a call, and the tensors that must outlive it."""
    logits = call.logits
    layout = row_layout(logits)
    assert layout is not None
    kept = [t if t is None else t.contiguous() for t in (call.labels, call.mask, call.temperatures)]
    labels, mask, temperatures = kept
    inputs = _native.C.LogitInputs(
        _native.pointer(logits),
        _native.DTYPE_CODES[logits.dtype],
        logits.numel() // logits.shape[-1],
        logits.shape[-1],
        *layout,
        _native.pointer(labels),
        _native.pointer(mask),
        _native.pointer(temperatures),
        int(temperatures is not None and temperatures.dim() > 0),
        call.temperature,
        call.ignore_index,
        call.vocab_start,
        call.vocab,
    )
    return inputs, kept


def without_invalid_labels(call: LogitsCall, *, count: bool = True) -> LogitsCall:
    """Labels out of range: an error on the CPU, ignored and (if `count`) counted elsewhere, without a wait."""
    if call.labels is None:
        return call
    invalid = ((call.labels < 0) | (call.labels >= call.vocab)) & (call.labels != call.ignore_index)
    if call.mask is not None:
        invalid &= call.mask
    if call.logits.device.type == "cpu":
        if invalid.any():
            raise ValueError(
                f"labels must be in 0 to {call.vocab - 1} or equal ignore_index {call.ignore_index}, "
                f"got {int(call.labels[invalid][0])}"
            )
        return call
    if count and call.vocab_start == 0:  # all shards see the label
        counter = invalid_label_counter(call.logits.device)
        if counter is not None:
            counter.add_(invalid.sum())
    return call._replace(labels=call.labels.masked_fill(invalid, call.ignore_index))


def check_temperatures(call: LogitsCall) -> None:
    if call.temperatures is None or call.temperatures.device.type != "cpu":
        return
    wrong = ~((call.temperatures >= 1e-15) & (call.temperatures <= 1e30))
    if call.mask is not None:
        wrong = wrong & call.mask
    if wrong.any():
        raise ValueError(
            f"temperature must be positive, in 1e-15 to 1e30, got {call.temperatures.expand_as(wrong)[wrong][0]:g}"
        )
