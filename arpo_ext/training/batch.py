"""From credited trees to rows, one per leaf, its whole path; and from rows to micro-batches.

Only tokens the model sampled are trained: never the prompt, a tool result or any other text put into the path.
A row whose advantages are all zero adds nothing to the gradient (unless there is a KL or an entropy term) and is left
out, but its share stays in the normaliser, so leaving it out changes the cost and not the update.

The loss reads the trained tokens of every row; how the model reads the rows (`train.packing`) does not change it:

tree: every prefix that rows share once (`packing`). What the model says of a token is then handed to all its rows, so
any loss over rows is exact, with its gradient. Padding and masks are not needed.

rows: padded on the right. No attention mask is made: with causal attention a token never sees the padding behind it,
the padding's own outputs are not read, and kernels keep their fast causal form (a dense mask costs twice the time).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arpo_ext.config import TrainConfig
from arpo_ext.training.advantages import CreditedTree
from arpo_ext.training.attention import TreeAttention, tree_attention
from arpo_ext.training.objective import TokenColumns
from arpo_ext.training.packing import pack, split
from arpo_ext.types import RolloutTree, Segment


@dataclass(frozen=True)
class Row:
    """tokens: int64 [T]. trained: bool [T], True where the model learns to write the token; False at position 0."""

    tokens: Tensor
    trained: Tensor


@dataclass(frozen=True)
class PolicyRow(Row):
    """The path of one leaf. All [T] float32; what stands at untrained tokens is never read, except weight, 0 there.

    sampler_logprob: as recorded while sampling, NaN where none was. advantage: per token. weight: the token's share in
    the loss before normalisation. turn: int64 [T], which turn of the model within the row; read at trained tokens only.
    share: what the row adds to the normaliser.
    """

    sampler_logprob: Tensor
    advantage: Tensor
    weight: Tensor
    turn: Tensor
    share: float


@dataclass(frozen=True)
class TokenBatch:
    """Padded rows, or one row that is a pack of rows, and the tokens of them that are trained.

    tokens: int64 [B, T]. keep: int64 [P], positions whose logits are needed, in a pack more than once where a fork
    follows. labels: int64 [B, P], the token after each kept position. mask: bool [B, P], whether it is trained in that
    row. positions: int64 [1, T] and tree: of a pack, else None.
    """

    tokens: Tensor
    keep: Tensor
    labels: Tensor
    mask: Tensor
    positions: Tensor | None = None
    tree: TreeAttention | None = None

    def to(self, device: torch.device) -> TokenBatch:
        own = (getattr(self, name) for name in self.__dataclass_fields__)
        moved = (part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in own)
        batch = TokenBatch(*moved)
        return batch if batch.tree is None else replace(batch, tree=batch.tree.to(device))


@dataclass(frozen=True)
class PolicyBatch:
    """A micro-batch of policy rows.

    columns: of their N trained tokens, row by row. index: int64 [N], where each stands in `text.labels`, flattened.
    """

    text: TokenBatch
    index: Tensor
    columns: TokenColumns

    def to(self, device: torch.device) -> PolicyBatch:
        return PolicyBatch(self.text.to(device), self.index.to(device, non_blocking=True), self.columns.to(device))


@dataclass(frozen=True)
class Update:
    """What one optimiser step trains on.

    normalizer: sum of the shares of all its rows, those left out included. spare: some of the rows left out, to measure
    entropy and sampler gap with when nothing is trained.
    """

    micro_batches: list[PolicyBatch]
    normalizer: float
    spare: PolicyBatch


def plan_updates(trees: Sequence[CreditedTree], config: TrainConfig, *, seed: int, pad_token: int) -> list[Update]:
    """`config.updates_per_step` updates over disjoint, randomly drawn sets of trees; fewer trees leave some empty."""
    order = list(range(len(trees)))
    if config.updates_per_step > 1:
        random.Random(seed).shuffle(order)
    updates = []
    for part in range(config.updates_per_step):
        indices = order[part :: config.updates_per_step]
        rows = [row for index in indices for row in tree_rows(trees[index], config)]
        always = config.kl_coef > 0 or config.entropy_coef > 0
        effective = [bool((row.trained if always else row.advantage * row.weight).any()) for row in rows]
        kept = [row for row, counts in zip(rows, effective, strict=True) if counts]
        idle = [row for row, counts in zip(rows, effective, strict=True) if row.trained.any() and not counts]
        measured = idle[: config.micro_batch_rows]
        spare = policy_batch(measured, config, pad_token) if measured else weightless_batch(pad_token)
        normalizer = sum(row.share for row in rows)
        updates.append(Update(micro_batches(kept, config, pad_token), normalizer, spare))
    return updates


def tree_rows(credited: CreditedTree, config: TrainConfig) -> list[PolicyRow]:
    """One row per leaf of the tree; nothing is trained in that of a path that was cut from outside.

    credit soft: every token has the advantage of its own leaf. hard, turn: that of its segment.
    loss_scale, |y_i| being the trained tokens of row i, which needs at least one:

        token_mean     weight 1        share |y_i|          DAPO
        sequence_mean  weight 1/|y_i|  share 1              GRPO; ARPO Eq. 6
        sequence_sum   weight 1        share 1              RLOO
        constant       weight 1        share loss_length    Dr. GRPO
    """
    tree = credited.tree
    parts = [_segment_columns(segment, tree.prompt_id, config) for segment in tree.segments]
    rows = []
    for leaf in tree.leaves:
        path = tree.path(leaf.segment)
        tokens, trained, sampler_logprob = (torch.cat([parts[i][column] for i in path]) for column in range(3))
        trained[:1] = False
        if leaf.end.is_forced:
            # Where a path was cut says nothing about the tokens before.
            trained[:] = False
        if config.credit != "soft":
            lengths = torch.tensor([len(tree.segments[i].tokens) for i in path])
            advantage = credited.segment[path].repeat_interleave(lengths)
        else:
            advantage = torch.full(tokens.shape, leaf.advantage)
        if credited.factor is not None:
            advantage = advantage * torch.cat([credited.factor[i] for i in path])
        length = int(trained.sum())
        weight = trained / max(length, 1) if config.loss_scale == "sequence_mean" else trained.float()
        share = {"token_mean": length, "constant": config.loss_length}.get(config.loss_scale, 1) if length else 0
        rows.append(PolicyRow(tokens, trained, sampler_logprob, advantage, weight, _turns(tree, path), float(share)))
    return rows


def _turns(tree: RolloutTree, path: Sequence[int]) -> Tensor:
    """Number of the turn of every token of a path: sampled segments with nothing between them are one turn."""
    sampled = [tree.segments[i].sampled for i in path]
    begins = torch.tensor([now and not before for before, now in zip([False, *sampled], sampled, strict=False)])
    lengths = torch.tensor([len(tree.segments[i].tokens) for i in path])
    return (begins.cumsum(0) - 1).clamp(min=0).repeat_interleave(lengths)


def _segment_columns(segment: Segment, prompt_id: str, config: TrainConfig) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, trained and sampler_logprob of one segment."""
    tokens = torch.tensor(segment.tokens, dtype=torch.int64)
    if segment.logprobs:
        logprob = torch.tensor(segment.logprobs, dtype=torch.float32)
    elif segment.sampled and segment.tokens and config.old_logprob == "sampler":
        raise ValueError(
            f"tree {prompt_id!r} has a sampled segment without logprobs; "
            "expected the sampler's, or train.old_logprob=trainer"
        )
    else:
        logprob = torch.full(tokens.shape, torch.nan)
    return tokens, torch.full(tokens.shape, segment.sampled), logprob


def micro_batches(rows: Sequence[PolicyRow], config: TrainConfig, pad_token: int) -> list[PolicyBatch]:
    """Of `micro_batch_tokens` distinct tokens or `micro_batch_rows` rows; how they are cut does not change the loss."""
    if config.packing == "tree":
        parts = [[rows[i] for i in pack] for pack in split([row.tokens for row in rows], config.micro_batch_tokens)]
    else:
        rows, size = sorted(rows, key=lambda row: len(row.tokens)), config.micro_batch_rows
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [policy_batch(part, config, pad_token) for part in parts]


def policy_batch(rows: Sequence[PolicyRow], config: TrainConfig, pad_token: int) -> PolicyBatch:
    if config.packing == "tree":
        text, index = packed_batch(rows)
    else:
        text = token_batch(rows, pad_token)
        index = text.mask.flatten().nonzero()[:, 0]
    sampler_logprob, advantage, weight, turn = (
        torch.cat([getattr(row, name)[row.trained] for row in rows])
        for name in ("sampler_logprob", "advantage", "weight", "turn")
    )
    number = torch.arange(len(rows)).repeat_interleave(torch.tensor([int(row.trained.sum()) for row in rows]))
    _, turn = (number * (turn.max() + 1) + turn).unique(return_inverse=True)
    old_logprob = sampler_logprob if config.old_logprob == "sampler" else None
    return PolicyBatch(text, index, TokenColumns(sampler_logprob, advantage, weight, number, turn, old_logprob))


def packed_batch(rows: Sequence[Row]) -> tuple[TokenBatch, Tensor]:
    """A pack of rows, and where in its labels each trained token of each row stands, int64 [N]."""
    packed = pack([row.tokens for row in rows])
    places = torch.cat([place[row.trained] for place, row in zip(packed.rows, rows, strict=True)])
    trained, index = places.unique(return_inverse=True)
    labels = packed.tokens[trained][None]
    mask = torch.ones(labels.shape, dtype=torch.bool)
    tree = tree_attention(packed)
    return TokenBatch(packed.tokens[None], packed.parent[trained], labels, mask, packed.depth[None], tree), index


def token_batch(rows: Sequence[Row], pad_token: int) -> TokenBatch:
    tokens = _padded([row.tokens for row in rows], pad_token)
    trained = _padded([row.trained for row in rows], False)
    keep = trained.any(dim=0).nonzero()[:, 0] - 1
    return TokenBatch(tokens, keep, tokens[:, keep + 1], trained[:, keep + 1])


def weightless_batch(pad_token: int) -> PolicyBatch:
    """Two tokens, one position, nothing trained: what a rank runs while another still has micro-batches."""
    tokens, zero, first = torch.full((1, 2), pad_token), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    text = TokenBatch(tokens, first, tokens[:, 1:], torch.zeros(1, 1, dtype=torch.bool))
    return PolicyBatch(text, first, TokenColumns(zero, zero, zero, first, first, ref_logprob=zero))


def _padded(columns: Sequence[Tensor], fill: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(columns), batch_first=True, padding_value=fill)
