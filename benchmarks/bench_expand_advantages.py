"""One advantage a token, from rewards and masks by token and a name for each row's group, against verl's estimators.

verl's registered functions get rewards [L, T], an int64 mask [L, T] and an array of uuids. With `inputs=leaves` ours
begins with what our ops take and trees have: one reward and one group number a row and a bool mask. With `inputs=verl`
it begins with verl's, so that summing the rewards and numbering the names is part of its time; reading those 50 MB is
most of it. Counted bytes: what our form reads and the result, once; for the packed form leaf, length and result.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arpo_ext import ops

from . import _harness, _peers
from ._harness import Case, Options, Provider
from .bench_group_advantages import made_trees

_TOLERANCE = 2e-5


def _rows_case(estimator: str, inputs: str, rows: int, tokens: int, group: int, device: str) -> Case:
    reward = made_trees(rows // group, group, 0, device)[0]
    generated = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(0)).to(device) > 0.25
    mask = generated.long()
    token_reward = torch.zeros(rows, tokens, device=device)
    token_reward[:, -1] = reward
    names = np.array([str(uuid.UUID(int=row // group)) for row in range(rows)], dtype=object)
    tree = torch.arange(rows, device=device) // group
    leaf = ops.group_advantages(reward.double(), tree, estimator=estimator, backend="reference").leaf
    expected = leaf.unsqueeze(1) * mask

    def from_tokens() -> Tensor:
        groups = ops.first_occurrences(names).to(device, non_blocking=True)
        leaves = ops.group_advantages(token_reward.sum(1), groups, estimator=estimator).leaf
        return ops.expand_advantages(leaves, mask)

    def from_leaves() -> Tensor:
        return ops.expand_advantages(ops.group_advantages(reward, tree, estimator=estimator).leaf, generated)

    def verl(name: str) -> Callable[[], Callable[[], Any]]:
        def make() -> Callable[[], Tensor]:
            call = _peers.verl_advantage(name)
            return lambda: call(token_reward, mask, names)[0]

        return make

    ours, read = {
        "leaves": (from_leaves, reward.nbytes + tree.nbytes + generated.nbytes),
        "verl": (from_tokens, token_reward.nbytes + mask.nbytes),
    }[inputs]
    return Case(
        {
            "op": "expand_advantages",
            "estimator": estimator,
            "L": rows,
            "T": tokens,
            "group": group,
            "inputs": inputs,
        },
        read + 4 * expected.numel(),
        [
            Provider("arpo-ext", lambda: ours),
            Provider(f"verl {estimator}", verl(estimator)),
            Provider(f"verl {estimator}_vectorized", verl(f"{estimator}_vectorized")),
        ],
        lambda result: float((result.double() - expected).abs().max()),
        _TOLERANCE,
        limit="copy",
    )


def _packed_case(rows: int, tokens: int, device: str) -> Case:
    generator = torch.Generator().manual_seed(rows)
    leaf = torch.randn(rows, generator=generator).to(device)
    length = torch.randint(tokens // 2, tokens, (rows,), generator=generator).to(device)
    total = int(length.sum())
    expected = torch.repeat_interleave(leaf, length)
    return Case(
        {"op": "expand_advantages", "L": rows, "tokens": total},
        12 * rows + 4 * total,
        [
            Provider("arpo-ext", lambda: lambda: ops.expand_advantages(leaf, length=length, total=total)),
            Provider("torch vectorised", lambda: lambda: leaf.repeat_interleave(length, output_size=total)),
        ],
        lambda result: float((result - expected).abs().max()),
        0.0,
        limit="copy",
    )


def cases(options: Options) -> Iterator[Case]:
    rows, tokens, group = (32, 64, 8) if options.smoke else (2048, 2048, 16)
    for estimator in ("grpo", "rloo"):
        for inputs in ("leaves", "verl"):
            yield _rows_case(estimator, inputs, rows, tokens, group, options.device)
    yield _packed_case(rows, tokens, options.device)


def main(argv: Sequence[str] | None = None) -> int:
    return _harness.main(argv, ("expand_advantages",))


if __name__ == "__main__":
    raise SystemExit(main())
