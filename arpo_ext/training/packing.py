"""Rows that share beginnings, laid out as a tree: every distinct prefix once.

Rows in lexicographic order are the depth-first preorder of their prefix tree, and what two neighbours have in common is
the longest that a row has in common with any row before it. So a row adds the tokens behind its common prefix with the
row before, whether that prefix is a shared turn, a shared question or the system prompt of all questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedRows:
    """T distinct prefixes in depth-first preorder, each standing for its last token. All int64.

    tokens: [T]. depth: [T], position of the token in its rows. parent: [T], index of the token before it, -1 at a first
    token. ends: [T], one past the last token of its subtree: token q sees token k where k <= q < ends[k].
    rows: for every row, in the order given, the index of each of its tokens.
    """

    tokens: Tensor
    depth: Tensor
    parent: Tensor
    ends: Tensor
    rows: tuple[Tensor, ...]


def pack(rows: Sequence[Tensor]) -> PackedRows:
    """Lay out rows (int64 [T_i], any order, equal ones and prefixes of each other allowed)."""
    values = [row.numpy() for row in rows]
    order = sorted(range(len(rows)), key=lambda i: values[i].tolist())
    places: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(rows)
    tokens, depth, parent = [], [], []
    ends = np.empty(sum(map(len, values)), dtype=np.int64)
    count, path, before = 0, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for i in order:
        shared, length = common_prefix(before, values[i]), len(values[i])
        ends[path[shared:]] = count
        new = np.arange(count, count + length - shared)
        tokens.append(values[i][shared:])
        depth.append(np.arange(shared, length))
        parent.append(np.concatenate([path[shared - 1 : shared] if shared else [-1], new])[: len(new)])
        path, before = np.concatenate([path[:shared], new]), values[i]
        places[i], count = path, count + len(new)
    ends[path] = count
    columns = [
        torch.from_numpy(np.concatenate([before[:0], *parts]).astype(np.int64)) for parts in (tokens, depth, parent)
    ]
    return PackedRows(*columns, torch.from_numpy(ends[:count]), tuple(map(torch.from_numpy, places)))


def split(rows: Sequence[Tensor], budget: int) -> list[list[int]]:
    """Numbers of the rows of each pack of at most `budget` distinct tokens; a longer row is a pack of its own.

    Rows that share most stay together: a full pack is cut where its rows have least in common, in its second half.
    """
    values = [row.numpy() for row in rows]
    order = sorted(range(len(rows)), key=lambda i: values[i].tolist())
    shared = [0, *(common_prefix(values[a], values[b]) for a, b in pairwise(order))]
    packs, start = [], 0
    while start < len(order):
        sizes = [len(values[order[start]])]
        while start + len(sizes) < len(order):
            size = sizes[-1] + len(values[order[start + len(sizes)]]) - shared[start + len(sizes)]
            if size > budget:
                break
            sizes.append(size)
        stop = start + len(sizes)
        if stop < len(order):
            half = [cut for cut in range(start + 1, stop + 1) if 2 * sizes[cut - start - 1] >= min(budget, sizes[-1])]
            stop = min(half, key=lambda cut: (shared[cut], -cut))
        packs.append(order[start:stop])
        start = stop
    return packs


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading elements that are equal."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    return int(different.argmax()) if different.any() else length
