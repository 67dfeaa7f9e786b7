"""Choice of token positions to branch at, against the loop over tokens that rollout code runs and vectorised torch.

Counted bytes: entropy, mask and value once, the tree's and room's numbers, and the chosen rows, tokens and scores.
`future_value`, the second score, is a case of its own, against the product with a T x T matrix of powers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from arpo_ext import ops

from . import _harness
from ._harness import Case, Options, Provider

_EPS = 1e-6
_ROWS_A_TREE, _ROOM, _COUNT = 4, 8, 8


def python_loop(
    entropy: Tensor, mask: Tensor, tree: Tensor, room: Tensor, value: Tensor
) -> list[list[tuple[int, int]]]:
    """As published rollout code does it: one number after the other out of the tensors, then a sort of tuples."""

    def z_scores(numbers: list[float]) -> list[float]:
        mean = sum(numbers) / len(numbers)
        std = (sum((x - mean) ** 2 for x in numbers) / len(numbers)) ** 0.5
        return [(x - mean) / (std + _EPS) for x in numbers]

    found: dict[int, list[tuple[bool, float, int, int]]] = {}
    for row in range(len(entropy)):
        places = [t for t in range(entropy.shape[1]) if mask[row, t].item()]
        of_entropy = z_scores([entropy[row, t].item() for t in places])
        of_value = z_scores([value[row, t].item() for t in places])
        for t, a, b in zip(places, of_entropy, of_value, strict=True):
            found.setdefault(tree[row].item(), []).append((not (a > 0 and b > 0), -a * b, row, t))
    return [
        [(row, t) for _, _, row, t in sorted(found[prompt])[: min(room[prompt].item(), _COUNT)]]
        for prompt in range(len(room))
    ]


def vectorised(entropy: Tensor, mask: Tensor, tree: Tensor, room: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Where the rows of a tree are adjacent and equally many, with strict positions enough: masked sums and a topk."""
    counts = mask.sum(1, keepdim=True)

    def z_scores(x: Tensor) -> Tensor:
        mean = (x * mask).sum(1, keepdim=True) / counts
        deviation = (x - mean) * mask
        return deviation / ((deviation.square().sum(1, keepdim=True) / counts).sqrt() + _EPS)

    a, b = z_scores(entropy), z_scores(value)
    score = torch.where(mask & (a > 0) & (b > 0), a * b, -torch.inf)
    flat = score.view(len(room), -1).topk(_COUNT).indices
    row = flat // entropy.shape[1] + torch.arange(len(room), device=flat.device).unsqueeze(1) * _ROWS_A_TREE
    return row, flat % entropy.shape[1]


def made_tokens(rows: int, positions: int, device: str) -> tuple[Tensor, ...]:
    """entropy, mask, tree, room and value; a quarter of the tokens is not sampled."""
    generator = torch.Generator().manual_seed(rows)
    entropy = torch.rand(rows, positions, generator=generator).mul(3)
    mask = torch.rand(rows, positions, generator=generator) > 0.25
    value = torch.rand(rows, positions, generator=generator).mul(0.4).add(0.8)
    tree = torch.arange(rows) // _ROWS_A_TREE
    room = torch.full((rows // _ROWS_A_TREE,), _ROOM, dtype=torch.int32)
    return tuple(tensor.to(device) for tensor in (entropy, mask, tree, room, value))


def _choice_case(rows: int, positions: int, device: str) -> Case:
    inputs = made_tokens(rows, positions, device)
    expected = torch.tensor(python_loop(*made_tokens(rows, positions, "cpu")))

    def differing(result: Any) -> float:
        """Number of places that hold another row or token than the loop's."""
        if isinstance(result, list):
            chosen = torch.tensor(result)
        else:
            chosen = torch.stack([part.cpu().long() for part in result[:2]], dim=-1)
        return float((chosen != expected).any(-1).sum())

    def calling(function: Callable[..., Any], **arguments: Any) -> Callable[[], Callable[[], Any]]:
        return lambda: lambda: function(*inputs, **arguments)

    return Case(
        {"op": "branch_tokens", "B": rows, "T": positions},
        sum(tensor.numel() * tensor.element_size() for tensor in inputs) + 20 * expected[..., 0].numel(),
        [
            Provider("arpo-ext", calling(ops.branch_tokens, count=_COUNT)),
            Provider("arpo-ext reference", calling(ops.branch_tokens, count=_COUNT, backend="reference")),
            Provider("torch vectorised", calling(vectorised)),
            # Reading numbers off a GPU one by one, or more of them than these, takes minutes.
            *([Provider("Python loop", calling(python_loop))] if rows <= 64 and device == "cpu" else []),
        ],
        differing,
        0.0,
    )


def by_matrix(log_ratio: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Each row times the T x T matrix of gamma**(k - t), as published code does it."""
    steps = torch.arange(log_ratio.shape[1], device=log_ratio.device)
    distance = steps.unsqueeze(1) - steps
    powers = torch.where(distance >= 0, gamma ** distance.clamp(min=0), 0.0).to(log_ratio.dtype)
    return (torch.where(mask, log_ratio, 0.0) @ powers).clamp(-20, 20).exp().clamp(0.8, 1.2)


def _value_case(rows: int, positions: int, device: str) -> Case:
    _, mask, *_ = made_tokens(rows, positions, device)
    log_ratio = torch.randn(rows, positions, generator=torch.Generator().manual_seed(1)).mul(0.05).to(device)
    expected = by_matrix(log_ratio.double(), mask, 1.0)

    def ours(backend: str) -> Callable[[], Callable[[], Any]]:
        return lambda: lambda: ops.future_value(log_ratio, mask, gamma=1.0, clip=0.2, backend=backend)

    return Case(
        {"op": "branch_tokens", "B": rows, "T": positions, "of": "future_value"},
        9 * log_ratio.numel(),
        [
            Provider("arpo-ext", ours("auto")),
            Provider("torch vectorised", lambda: lambda: by_matrix(log_ratio, mask, 1.0)),
        ],
        lambda result: float((result.double() - expected).abs().max()),
        1e-4,
        limit="copy",
    )


def cases(options: Options) -> Iterator[Case]:
    # 16 prompts of 4 rows; a large rollout.
    shapes = [(8, 128)] if options.smoke else [(64, 1024), (128, 2048)]
    for rows, positions in shapes:
        yield _choice_case(rows, positions, options.device)
        yield _value_case(rows, positions, options.device)


def main(argv: Sequence[str] | None = None) -> int:
    return _harness.main(argv, ("branch_tokens",))


if __name__ == "__main__":
    raise SystemExit(main())
