"""A vocabulary divided over the ranks of a process group: which part is here, and a row's sums from those of all.

Each rank sums up its own columns; one all-gather of four numbers a row and rank brings them together, and every rank
merges them in the order of the ranks, in float64, so that all get the same result to the last bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor


class Shard(NamedTuple):
    """This rank's columns: `start` and up of `total`. group "": no group, all columns are here."""

    group: str
    ranks: int
    start: int
    total: int


def shard_of(
    group: torch.distributed.ProcessGroup | None, columns: int, vocab_start: int | None, vocab_total: int | None
) -> Shard:
    if (vocab_start is None) != (vocab_total is None) or (group is None and vocab_start is not None):
        raise ValueError(
            "vocab_start and vocab_total go together, and with a group; got "
            f"group={'None' if group is None else 'a group'}, vocab_start={vocab_start}, vocab_total={vocab_total}"
        )
    if group is None:
        return Shard("", 1, 0, columns)
    if not isinstance(group, torch.distributed.ProcessGroup):
        # A rank outside a new group is given a number instead of it.
        got = "that of a group this rank is not in" if isinstance(group, int) else type(group).__name__
        raise ValueError(f"group must be a torch.distributed.ProcessGroup this rank belongs to, got {got}")
    start = group.rank() * columns if vocab_start is None else vocab_start
    total = group.size() * columns if vocab_total is None else vocab_total
    if not 0 <= start <= total - columns:
        raise ValueError(f"a shard of {columns} columns from column {start} does not fit a vocabulary of {total}")
    return Shard(group.group_name, group.size(), start, total)


def gather(
    running: Tensor, shard: Shard, columns: int, mask: Tensor | None, temperatures: Tensor | None, temperature: float
) -> Tensor:
    """`running` [..., 4] (see `_shards`) of this rank's columns -> that of the whole vocabulary."""
    if not shard.group:
        return running
    rows = running.shape[:-1]
    mask, temperatures = (t if t is None or t.shape != rows else t.reshape(-1) for t in (mask, temperatures))
    # The last row says which columns these are, so that a gap or an overlap shows without another collective.
    # Filled on the device: a tensor made from numbers would be copied to a GPU while the host waits.
    place = [running.new_full((1, 1), number) for number in (shard.start, columns, shard.total, 0)]
    mine = torch.cat((running.view(-1, 4), torch.cat(place, 1)))
    every = torch.ops._c10d_functional.all_gather_into_tensor(mine, shard.ranks, shard.group)
    every = torch.ops._c10d_functional.wait_tensor(every).view(shard.ranks, -1, 4)
    return torch.ops.arpo_ext.merge_shards(every, mask, temperatures, temperature).view(*rows, 4)


def all_reduce(tensor: Tensor, group: str) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(tensor, "sum", group))


def _merge(sums: Tensor, divisor: Tensor | float) -> Tensor:
    """[ranks, N, 4] -> [N, 4]. What every shard but the winning one left out becomes an ordinary element."""
    maxima, s, a, label_logits = sums.unbind(2)
    maximum, winner = maxima.max(0)  # NaN wins
    s_total, a_total = torch.zeros_like(maximum), torch.zeros_like(maximum)
    label_logit = torch.full_like(maximum, torch.nan)
    for rank in range(len(sums)):
        empty = maxima[rank].isneginf()
        shift = torch.where(empty, 0, maxima[rank] - maximum)
        factor = torch.where(empty, 0, (shift / divisor).exp())
        others = s[rank] + (winner != rank)
        s_total += factor * others
        a_total += factor * (a[rank] + shift * others)
        label_logit = torch.where(label_logit.isnan(), label_logits[rank], label_logit)
    return torch.stack((maximum, s_total, a_total, label_logit), 1)


def _gaps(places: Tensor) -> Tensor:
    """Whether columns [ranks, 4] (start, count, total, -) leave one out, hold one twice or are none: 0-d."""
    starts, counts, totals, _ = places.t()
    order = (2 * starts + (counts > 0)).argsort()  # a rank without columns stands before the one that begins there
    ends = (starts + counts)[order]
    wanted = torch.cat((torch.zeros_like(ends[:1]), ends[:-1]))
    return ((starts[order] != wanted) | (totals != ends[-1])).any() | (ends[-1] == 0)


torch.library.define(
    "arpo_ext::merge_shards", "(Tensor every, Tensor? mask, Tensor? temperatures, float temperature) -> Tensor"
)


@torch.library.impl("arpo_ext::merge_shards", "default")
def _merge_shards(every, mask, temperatures, temperature):
    sums, places = every[:, :-1], every[:, -1]
    gaps = _gaps(places)
    if every.device.type == "cpu" and gaps:
        parts = [
            (f"{start} to {start + count - 1}" if count else "none") + f" of {total}"
            for start, count, total, _ in places.long().tolist()
        ]
        raise ValueError(
            f"the ranks' columns must make up the vocabulary, got {', '.join(parts)}; "
            "unequal shards need vocab_start and vocab_total"
        )
    divisor = temperature if temperatures is None else temperatures.double()
    merged = _merge(sums, divisor)
    if mask is not None:
        merged = torch.where(mask.unsqueeze(1), merged, sums[0])
    # On a GPU nobody waits to read the answer: every row becomes NaN.
    return torch.where(gaps, torch.nan, merged)


@torch.library.register_fake("arpo_ext::merge_shards")
def _merge_shards_fake(every, mask, temperatures, temperature):
    return every.new_empty((every.shape[1] - 1, 4))
