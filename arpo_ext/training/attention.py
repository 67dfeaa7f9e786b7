"""Attention over packed rows: what a token sees of a tree, without a T x T mask.

A run is a stretch of tokens with no fork between them. Its tokens see each other causally, and everything below it sees
all of it. In depth-first preorder both are slices, so the attention of a tree is a sum of

    a square      queries and keys of one run, causal
    a rectangle   queries below a run, keys of the run, nothing masked

over its runs: exactly the pairs that may attend, no key copied for the rows that share it. The parts of a token are put
together by their log-sum-exp. A long run is two squares and a rectangle in turn, because torch's CPU kernel computes a
square of up to 512 tokens whole. Where small runs stand side by side, calls cost more than pairs: their stretch is one
square with a dense mask of its own size. `CALL_PAIRS` decides both.

On a GPU a block mask for FlexAttention, or a dense one for a small pack, does the same (not yet measured). A dense mask
also serves what torch's CPU kernel cannot: values of another head size than the keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from arpo_ext.training.packing import PackedRows

IMPLEMENTATION = "arpo_tree"

# A call, forward and backward, takes the time of about so many pairs of a query and a key. Measured on an AVX-512 core
# with 4 heads of 32 to 10 heads of 64; half or twice of it changes the time of attention by less than 4 %.
CALL_PAIRS = 2048
# Below, a dense mask is cheaper on a GPU than making a block mask. Not yet measured.
GPU_DENSE_TOKENS = 1024


class Block(NamedTuple):
    """Queries first <= q < last see keys key_first <= k < key_last: all, the causal ones or those that `mask` shows."""

    first: int
    last: int
    key_first: int
    key_last: int
    kind: str  # "full", "causal" or "masked"

    @property
    def cost(self) -> int:
        return (self.last - self.first) * (self.key_last - self.key_first) + CALL_PAIRS


@dataclass(frozen=True)
class TreeAttention:
    """Who sees whom in a pack of T tokens: k <= q < ends[k].

    ends: int64 [T]. blocks: the same pairs as squares, in which every token stands once, and then rectangles.
    """

    ends: Tensor
    blocks: tuple[Block, ...]
    _made: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def to(self, device: torch.device) -> TreeAttention:
        return TreeAttention(self.ends.to(device, non_blocking=True), self.blocks)

    def mask(self, first: int = 0, last: int | None = None) -> Tensor:
        """bool [n, n] of the tokens `first` to `last`, True where the query (row) sees the key (column)."""
        ends = self.ends[first:last]
        tokens = torch.arange(first, first + len(ends), device=ends.device)
        return (tokens <= tokens[:, None]) & (tokens[:, None] < ends)

    def bias(self, block: Block, dtype: torch.dtype) -> Tensor | None:
        """What a masked block adds to its scores, [1, 1, n, n]; kept, as every layer asks for it."""
        if block.kind != "masked":
            return None
        if (block, dtype) not in self._made:
            size = block.last - block.first
            hidden = ~self.mask(block.first, block.last)
            self._made[block, dtype] = torch.zeros(1, 1, size, size, dtype=dtype).masked_fill_(hidden, -torch.inf)
        return self._made[block, dtype]

    def dense_mask(self) -> Tensor:
        """`mask` of all tokens, [1, 1, T, T]."""
        if "dense" not in self._made:
            self._made["dense"] = self.mask()[None, None]
        return self._made["dense"]

    def block_mask(self) -> Any:
        """FlexAttention's form of the mask."""
        if "flex" not in self._made:
            from torch.nn.attention.flex_attention import create_block_mask

            ends, size = self.ends, len(self.ends)

            def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return (key <= query) & (query < ends[key])

            self._made["flex"] = create_block_mask(sees, None, None, size, size, device=ends.device)
        return self._made["flex"]


def tree_attention(packed: PackedRows) -> TreeAttention:
    """Divide the pairs of a pack into blocks, each stretch of siblings in the cheaper of the two ways."""
    parent, ends = packed.parent.tolist(), packed.ends.tolist()
    begins = [t for t in range(len(ends)) if t == 0 or parent[t] != t - 1 or ends[t] != ends[t - 1]]
    stretches: list[tuple[int, int, list[Block]]] = []  # from right to left; (first, last, blocks)
    for first, last in reversed(list(zip(begins, [*begins[1:], len(ends)], strict=True))):
        end = ends[first]
        blocks = _causal(first, last)
        if last < end:
            blocks.append(Block(last, end, first, last, "full"))
        while stretches and stretches[-1][0] < end:
            blocks += stretches.pop()[2]
        blocks = _cheaper(first, end, blocks)
        if stretches and parent[stretches[-1][0]] == parent[first]:
            _, right_end, right = stretches[-1]
            both = _cheaper(first, right_end, blocks + right)
            if len(both) == 1:
                stretches[-1] = (first, right_end, both)
                continue
        stretches.append((first, end, blocks))
    every = [block for _, _, blocks in stretches for block in blocks]
    return TreeAttention(packed.ends, tuple(sorted(every, key=lambda block: (block.kind == "full", block))))


def _causal(first: int, last: int) -> list[Block]:
    """The square of a run, divided where that saves more pairs than two calls cost."""
    size = last - first
    if size * size <= 8 * CALL_PAIRS:
        return [Block(first, last, first, last, "causal")]
    middle = first + -(-size // 64) * 32  # the kernel takes 32 queries at a time
    rectangle = Block(middle, last, first, middle, "full")
    return [*_causal(first, middle), *_causal(middle, last), rectangle]


def _cheaper(first: int, last: int, blocks: list[Block]) -> list[Block]:
    masked = Block(first, last, first, last, "masked")
    return [masked] if masked.cost < sum(block.cost for block in blocks) else blocks


class _BlockAttention(torch.autograd.Function):
    """Attention of [1, H, T, d] queries, keys and values on the CPU, block by block, with torch's own kernel.

    Backward, the kernel gets the output and log-sum-exp of the whole rows, from which it recomputes the block's part of
    the softmax, so the gradients of the parts add up. Sums are kept in float32 for operands of lower precision.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: TreeAttention, scale: float | None
    ) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        output, lse = torch.empty_like(query, dtype=wide), query.new_empty(query.shape[:3], dtype=wide)
        for block in tree.blocks:
            rows, columns = slice(block.first, block.last), slice(block.key_first, block.key_last)
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, rows],
                key[:, :, columns],
                value[:, :, columns],
                is_causal=block.kind == "causal",
                attn_mask=tree.bias(block, query.dtype),
                scale=scale,
            )
            if block.kind != "full":
                output[:, :, rows], lse[:, :, rows] = part, part_lse
                continue
            # The part's share of the softmax is e^part_lse / (e^lse + e^part_lse).
            total = lse[:, :, rows]
            output[:, :, rows].lerp_(part.to(wide), torch.sigmoid(part_lse - total).unsqueeze(-1))
            torch.logaddexp(total, part_lse, out=total)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.tree, ctx.scale = tree, scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        gradients = [torch.empty_like(operand, dtype=wide) for operand in (query, key, value)]
        for block in ctx.tree.blocks:
            rows, columns = slice(block.first, block.last), slice(block.key_first, block.key_last)
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                upstream[:, :, rows],
                query[:, :, rows],
                key[:, :, columns],
                value[:, :, columns],
                output[:, :, rows],
                lse[:, :, rows],
                0.0,
                block.kind == "causal",
                attn_mask=ctx.tree.bias(block, query.dtype),
                scale=ctx.scale,
            )
            for gradient, part, place in zip(gradients, parts, (rows, columns, columns), strict=True):
                if block.kind == "full":
                    gradient[:, :, place] += part
                else:
                    gradient[:, :, place] = part
        return *(gradient.to(query.dtype) for gradient in gradients), None, None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    tree: TreeAttention | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """An attention of transformers' `AttentionInterface`: that of `tree`, or `sdpa` where the model was given none.

    query: [1, H, T, d]. key, value: [1, K, T, d], H a multiple of K. Result: [1, T, H, d].
    """
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    kind = query.device.type
    if dropout == 0 and kind == "cpu" and query.shape[-1] == value.shape[-1]:
        if torch.is_autocast_enabled(kind):
            query, key, value = (operand.to(torch.get_autocast_dtype(kind)) for operand in (query, key, value))
        if len(tree.blocks) == 1:
            mask = tree.bias(tree.blocks[0], query.dtype)
            return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling)
        repeats = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
        return _BlockAttention.apply(query, key, value, tree, scaling).transpose(1, 2), None
    if dropout == 0 and kind == "cuda" and query.shape[2] > GPU_DENSE_TOKENS:
        return flex_attention_forward(module, query, key, value, tree.block_mask(), scaling)[0], None
    return sdpa_attention_forward(module, query, key, value, tree.dense_mask(), dropout, scaling)


AttentionInterface.register(IMPLEMENTATION, attention_forward)
# For calls without a tree; one with a tree brings a four-dimensional mask, which transformers leaves as it is.
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
