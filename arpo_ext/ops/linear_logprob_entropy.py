"""Log-probability of a label and entropy at the end of a language model, from the hidden states, without the logits.

    logits = hidden @ weight.T + bias
    logits = softcap * tanh(logits / softcap)                   # if there is a softcap
    logprob, entropy = logprob_entropy(logits, labels)          # see ops/logprob_entropy.py

The logits exist one small tile at a time, in float32: computed, summed up row by row, overwritten. The backward pass
computes each tile again, turns it into the gradient of the logits where it lies, and adds its products with weight and
hidden to theirs, in float32 whatever the dtype of the operands. So memory above inputs, outputs and gradients does not
grow with N, but for a float32 accumulator of the gradient of low-precision hidden states and, while rows are skipped or
strided, a copy of the others. Time is that of one matrix product forward and three backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arpo_ext.ops import _linear_op  # noqa: F401  defines the ops called here
from arpo_ext.ops import _vocab_parallel as parallel
from arpo_ext.ops._dispatch import refuse_forward_mode
from arpo_ext.ops._linear_tiles import LinearCall
from arpo_ext.ops._logits import checked_call


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_total: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor]:
    """`(logprob, entropy)` of each row of hidden, differentiable in hidden, weight and bias; no labels, no logprob.

    hidden: [..., D], weight: [V, D], bias: [V] or None; one dtype: float32, bfloat16, float16, or float64 (reference
        backend only). Under autocast all but float64 are cast to its dtype. bfloat16 and float16: products accumulate
        and logits are kept in float32; only the gradient of the logits is rounded, on the GPU, for the products that
        follow.
    labels: [...] integers in 0 to V-1. `ignore_index` gives logprob 0 (the entropy is still computed).
    temperature: a number, or a tensor that is 0-d or [...]; positive, not differentiable. Divides after the softcap.
    mask: [...] bool; where False both results are 0 and hidden is not used. On the CPU such rows cost nothing; on the
        GPU they still pass through the matrix products, because counting them would wait for the device.
    softcap: positive number, in 1e-30 to 1e30, or None.
    chunk_tokens: rows of a tile, at most; None: what was measured to be fast. Memory above the results follows it.
    group: the process group over which the vocabulary is divided, in the order of its ranks: weight and bias hold this
        rank's V rows, labels count over all of them, and hidden, labels and everything else are the same on every rank.
        Both results are those of the whole vocabulary, on every rank. The gradients that come back into this op must be
        the same on every rank too; the gradient of hidden is summed over the ranks inside.
    vocab_start, vocab_total: with a group whose ranks hold unequal parts, the number of the first column of this one,
        and of all columns (default: rank * V and ranks * V). A part may have no column.
    backend: as in `logprob_entropy`: what sums up the tiles. The matrix products are torch's.

    Both results: [...], float32 (float64 for float64). NaN, infinities, labels out of range and their errors as in
    `logprob_entropy`. On the CPU a row whose upstream gradients are all zero takes part in no product of the backward
    pass. ValueError besides: shapes, differing dtypes, a DTensor. BackendError: the backend cannot serve the call.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__):
            raise ValueError(
                f"{name} is a DTensor, expected a plain tensor; call this inside the model's forward, "
                "where FSDP has gathered the weights"
            )
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_operands(hidden, weight, bias, least=1 if group is None else 0)
    refuse_forward_mode("linear_logprob_entropy", hidden, weight, bias)
    if softcap is not None and not 1e-30 <= softcap <= 1e30:
        raise ValueError(f"softcap must be positive, in 1e-30 to 1e30, or None, got {softcap}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, or None, got {chunk_tokens}")
    checked = checked_call(hidden, labels, temperature, ignore_index, mask, "hidden", "D")
    shard = parallel.shard_of(group, weight.shape[0], vocab_start, vocab_total)
    call = LinearCall(
        hidden,
        weight,
        bias,
        *checked[1:5],
        ignore_index,
        softcap or 0.0,
        chunk_tokens or 0,
        shard.start,
        shard.total,
    )
    running = torch.ops.arpo_ext.linear_logprob_entropy_sums(*call, backend)
    running = parallel.gather(running, shard, weight.shape[0], call.mask, call.temperatures, call.temperature)
    logprob, entropy, _ = torch.ops.arpo_ext.linear_logprob_entropy_combine(*call, running, shard.group, backend)
    return (None if labels is None else logprob), entropy


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    device = hidden.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    # As torch's own products do, which leave float64 alone.
    cast = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (hidden, weight, bias)]
    return cast[0], cast[1], cast[2]


def _check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None, least: int) -> None:
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[0] < least or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"hidden must be [..., D] and weight [V, D] with V >= {least}, "
            f"got hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be of shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (hidden.dtype, hidden.device):
            raise ValueError(
                f"{name} must have the dtype and device of hidden, {hidden.dtype} on {hidden.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
