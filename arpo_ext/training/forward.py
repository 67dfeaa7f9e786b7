"""The model's forward over a batch: log-probability and entropy of the trained tokens, and of each row's.

A model is looked at before it is wrapped (`prepare_model`), by running it on a few tokens, because its code says less:

Packs of rows can be read by any causal language model of transformers whose every layer attends to all tokens before it
through transformers' `AttentionInterface` and takes positions from `position_ids`. A small pack is run beside its rows.

The head's product and the statistics of its logits can be one step (`ops.linear_logprob_entropy`) if what the head
returns is what the model returns. It takes place inside the model's forward, where DDP, FSDP and ZeRO have their
weights ready and see their gradients: the head's own `forward` is replaced for the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from arpo_ext import ops
from arpo_ext.errors import ModelError
from arpo_ext.training.attention import IMPLEMENTATION, TreeAttention, tree_attention
from arpo_ext.training.batch import PolicyBatch, TokenBatch
from arpo_ext.training.packing import pack

# From this many bytes of logits on, they are not kept. One step needs a fourth product for that: on a CPU it took 1.2
# to 1.4 times as long as head and statistics apart, at 1,000 x 2,048 to 300 x 151,936 logits.
FUSED_BYTES = 256 << 20

_SOFTCAP = "arpo_softcap"  # set on a head whose result is the model's but for this softcap (0: none)

_INSTEAD = "expected full attention in every layer, or train.packing=rows"
# Forks behind a first, an inner and a last token, and rows far from where they stand in the pack.
_PROBE = ((1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 7, 5), (1, 2, 3, 4, 7, 5, 6, 6), (1, 6, 5, 2, 2, 3), (4, 3))


def prepare_model(model: nn.Module, *, packed: bool) -> None:
    """Look at a model of transformers before accelerate wraps it; packed: make it attend as packs say.

    Given no pack it goes on attending causally. ModelError if packs would not give what rows give.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        # Filled later from the rank that holds the weights, which looks at them.
        if packed:
            model.set_attn_implementation(IMPLEMENTATION)
        return
    if packed:
        _read_packs(model)
    _look_at_head(model)


def row_statistics(model: nn.Module, batch: PolicyBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [N] of the trained tokens of every row, as `batch.columns`."""
    logprob, entropy = token_statistics(model, batch.text, temperature)
    return logprob.flatten().index_select(0, batch.index), entropy.flatten().index_select(0, batch.index)


def token_statistics(model: nn.Module, batch: TokenBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [B, P] at `temperature`, float32, 0 where `batch.mask` is False.

    Logits are made only at `batch.keep`: prompts and tool results that all rows share cost no vocabulary-sized memory.
    """
    inner = extract_model_from_parallel(model)
    config, head = inner.config.get_text_config(), inner.get_output_embeddings()
    arguments: dict[str, Any] = {"input_ids": batch.tokens, "logits_to_keep": batch.keep, "use_cache": False}
    if batch.tree is not None:
        if config._attn_implementation != IMPLEMENTATION:
            raise ValueError(
                "got a pack for a model that was not prepared for them; expected prepare_model(packed=True)"
            )
        arguments |= _pack_arguments(batch.positions, batch.tree)
    softcap = getattr(head, _SOFTCAP, None)
    if softcap is not None and batch.labels.numel() * config.vocab_size * head.weight.itemsize >= FUSED_BYTES:

        def statistics(hidden: Tensor) -> Tensor:
            both = ops.linear_logprob_entropy(
                hidden,
                head.weight,
                batch.labels,
                head.bias,
                temperature=temperature,
                mask=batch.mask,
                softcap=softcap or None,
            )
            return torch.stack(both, dim=-1)

        with _head_forward(head, statistics), _no_softcap(config):
            both = model(**arguments).logits
        return both[..., 0], both[..., 1]
    logits = model(**arguments).logits
    # The gradient takes the memory of the logits, unless a soft cap behind the head needs them in its own backward.
    inplace = getattr(config, "final_logit_softcapping", None) is None
    return ops.logprob_entropy(logits, batch.labels, temperature=temperature, mask=batch.mask, inplace_backward=inplace)


def _read_packs(model: nn.Module) -> None:
    name, config = type(model).__name__, model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise ModelError(f"{name} has layers of {', '.join(sorted(kinds))}; {_INSTEAD}")
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None:
        raise ModelError(f"{name} attends within a sliding window of {config.sliding_window} tokens; {_INSTEAD}")
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(f"{name} has an attention of its own, outside transformers' AttentionInterface; {_INSTEAD}")
    before = config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    difference = _difference(model)
    if difference is not None:
        model.set_attn_implementation(before)
        raise ModelError(f"{name} gives packed rows other logits than rows ({difference}); {_INSTEAD}")


def _pack_arguments(positions: Tensor, tree: TreeAttention) -> dict[str, Any]:
    # Any mask of four dimensions keeps transformers from making one of its own, from jumps in the positions.
    return {"position_ids": positions, "attention_mask": positions.new_empty(1, 1, 0, 0), "tree": tree}


@torch.no_grad()
def _difference(model: nn.Module) -> str | None:
    """How far the logits of the probe are from those of its rows; None if they are as near as the dtype allows."""
    vocab, training = model.config.get_text_config().vocab_size, model.training
    device = next(model.parameters()).device
    rows = [torch.tensor(row) % vocab for row in _PROBE]
    packed = pack(rows)
    arguments = _pack_arguments(packed.depth[None].to(device), tree_attention(packed).to(device))
    model.eval()
    try:
        got = model(input_ids=packed.tokens[None].to(device), use_cache=False, **arguments).logits[0].float()
        flat = [model(input_ids=row[None].to(device), use_cache=False).logits[0].float() for row in rows]
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error).partition("\n")[0]
    finally:
        model.train(training)
    largest = max(
        float((got[place.to(device)] - row).abs().max()) for place, row in zip(packed.rows, flat, strict=True)
    )
    scale = max(float(row.abs().max()) for row in flat)
    allowed = (1e-4 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 5e-2) * scale
    return None if largest <= allowed else f"by {largest:.2g} where the largest is {scale:.2g}"


@torch.no_grad()
def _look_at_head(model: nn.Module) -> None:
    """Note on the head whether what it returns leaves the model unchanged, or soft-capped."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if type(head) is not nn.Linear:
        return
    mark = torch.tensor([[[0.25, -3.0]]], device=head.weight.device)
    tokens = torch.zeros(1, 1, dtype=torch.int64, device=mark.device)
    with _head_forward(head, lambda hidden: mark), _no_softcap(config):
        seen = model(input_ids=tokens, use_cache=False).logits
    if torch.equal(seen, mark):
        setattr(head, _SOFTCAP, getattr(config, "final_logit_softcapping", None) or 0.0)


@contextlib.contextmanager
def _head_forward(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


@contextlib.contextmanager
def _no_softcap(config: Any) -> Iterator[None]:
    """The op behind the head caps the logits itself."""
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is None:
        yield
        return
    config.final_logit_softcapping = None
    try:
        yield
    finally:
        config.final_logit_softcapping = softcap
