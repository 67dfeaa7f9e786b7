"""Branch decisions against the loop that rollout code runs today and against vectorised torch.

Counted bytes: every input once and the children once. At these sizes time is the cost of a call, not of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from arpo_ext import ops

from . import _harness
from ._harness import Case, Options, Provider

_BASE, _WEIGHT, _THRESHOLD = 0.5, 0.2, 0.5


def python_loop(
    entropy_now: Tensor, entropy_root: Tensor, tree: Tensor, room: Tensor, key: Tensor, turn: Tensor
) -> list[int]:
    """As published rollout code does it: dictionaries of Python numbers, one path after the other."""
    left = dict(enumerate(room.tolist()))
    by_tree: dict[int, list[int]] = {}
    for index in range(len(tree)):
        by_tree.setdefault(tree[index].item(), []).append(index)
    children = [0] * len(tree)
    for prompt, indices in by_tree.items():
        wishes = []
        for index in indices:
            probability = _BASE + _WEIGHT * (entropy_now[index].item() - entropy_root[index].item())
            if probability > _THRESHOLD:
                wishes.append((-probability, key[index].item(), index))
        for _, _, index in sorted(wishes):
            if left[prompt] <= 0:
                break
            children[index] = 1
            left[prompt] -= 1
    return children


def vectorised(
    entropy_now: Tensor, entropy_root: Tensor, tree: Tensor, room: Tensor, key: Tensor, turn: Tensor
) -> Tensor:
    """For one child a wish: the rank of each wish within its tree, from two sorts, against the tree's room."""
    score = _BASE + _WEIGHT * (entropy_now - entropy_root)
    wishing = (score > _THRESHOLD).nonzero().squeeze(1)
    order = wishing[torch.argsort(score[wishing], descending=True, stable=True)]
    order = order[torch.argsort(tree[order], stable=True)]
    sorted_tree = tree[order]
    first = torch.searchsorted(sorted_tree, sorted_tree)
    rank = torch.arange(len(order), device=tree.device) - first
    children = torch.zeros_like(tree, dtype=torch.int32)
    children[order] = (rank < room[sorted_tree]).to(torch.int32)
    return children


def made_inputs(paths: int, trees: int, device: str) -> tuple[Tensor, ...]:
    """Paths in random order; a third of the trees has less room than wishes."""
    generator = torch.Generator().manual_seed(paths)
    entropy_now, entropy_root = torch.rand(2, paths, generator=generator).mul(3).unbind()
    tree = torch.arange(paths)[torch.randperm(paths, generator=generator)] % trees
    room = torch.randint(1, 9, (trees,), generator=generator, dtype=torch.int32)
    key = torch.randint(2**62, (paths,), generator=generator)
    turn = torch.randint(6, (paths,), generator=generator, dtype=torch.int32)
    return tuple(tensor.to(device) for tensor in (entropy_now, entropy_root, tree, room, key, turn))


def cases(options: Options) -> Iterator[Case]:
    # 16 prompts of 8 paths that just came back from their tools; a large rollout; far more than a rollout has.
    shapes = [(64, 8)] if options.smoke else [(128, 16), (4096, 256), (65_536, 4096)]
    for paths, trees in shapes:
        inputs = made_inputs(paths, trees, options.device)
        expected = torch.tensor(python_loop(*inputs), dtype=torch.int32)

        def differing(result: Any, expected: Tensor = expected) -> float:
            return float((torch.as_tensor(result).cpu() != expected).sum())

        def calling(
            function: Callable[..., Any], inputs: Sequence[Tensor] = inputs, **arguments: str
        ) -> Callable[[], Callable[[], Any]]:
            return lambda: lambda: function(*inputs, **arguments)

        yield Case(
            {"op": "branch_points", "L": paths, "T": trees, "policy": "paper"},
            sum(tensor.numel() * tensor.element_size() for tensor in inputs) + 4 * paths,
            [
                Provider("arpo-ext", calling(ops.branch_points)),
                Provider("arpo-ext reference", calling(ops.branch_points, backend="reference")),
                Provider("torch vectorised", calling(vectorised)),
                Provider("Python loop", calling(python_loop)),
            ],
            differing,
            0.0,
        )


def main(argv: Sequence[str] | None = None) -> int:
    return _harness.main(argv, ("branch_points",))


if __name__ == "__main__":
    raise SystemExit(main())
