"""Group and tree advantages against the loops that trainers run today and against vectorised torch.

Counted bytes: every input once and every result once. At these sizes time is mostly the cost of a call. Advantages by
token, beside verl's, are in `bench_expand_advantages`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from arpo_ext import ops

from . import _harness
from ._harness import Case, Options, Provider

_EPS = 1e-6

Loop = Callable[..., Any]


def dictionary_loop(reward: Tensor, tree: Tensor) -> Tensor:
    """GRPO as trainers write it: a dictionary of lists by group, then one assignment a row."""
    groups, mean, std = defaultdict(list), {}, {}
    for i in range(len(reward)):
        groups[tree[i].item()].append(reward[i])
    for index, scores in groups.items():
        if len(scores) == 1:
            mean[index], std[index] = torch.tensor(0.0), torch.tensor(1.0)
        else:
            stacked = torch.stack(scores)
            mean[index], std[index] = stacked.mean(), stacked.std()
    advantage = reward.clone()
    for i in range(len(reward)):
        index = tree[i].item()
        advantage[i] = (reward[i] - mean[index]) / (std[index] + _EPS)
    return advantage


def vectorised(reward: Tensor, tree: Tensor) -> Tensor:
    """GRPO with index_add into a row per group."""
    zeros = torch.zeros(int(tree.max()) + 1, device=reward.device)
    count = zeros.index_add(0, tree, torch.ones_like(reward))
    mean = zeros.index_add(0, tree, reward) / count
    deviation = reward - mean[tree]
    variance = zeros.index_add(0, tree, deviation.square()) / (count - 1).clamp(min=1)
    return deviation / (variance.sqrt()[tree] + _EPS)


def tree_loop(reward: Tensor, tree: Tensor, parent: Tensor, leaf_segment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every leaf walks to its root and adds itself to a list at each segment."""
    return _walked(dictionary_loop(reward, tree), parent, leaf_segment)


def _walked(leaf: Tensor, parent: Tensor, leaf_segment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    below = defaultdict(list)
    for i in range(len(leaf)):
        value, segment = leaf[i].item(), leaf_segment[i].item()
        while segment >= 0:
            below[segment].append(value)
            segment = parent[segment].item()
    rows = [below[s] for s in range(len(parent))]
    mean = torch.tensor([sum(row) / len(row) if row else 0.0 for row in rows])
    pair = torch.tensor([[sum(max(a, 0.0) for a in row), sum(min(a, 0.0) for a in row)] for row in rows])
    return leaf, mean, pair


def tree_grpo_loop(
    reward: Tensor, tree: Tensor, parent: Tensor, leaf_segment: Tensor, subgroup: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tree-GRPO's rule by two dictionaries, z by prompt and then z of that by tree; then as `tree_loop`."""
    by_prompt = dictionary_loop(reward, tree)
    leaf = dictionary_loop(by_prompt, tree * (int(subgroup.max()) + 1) + subgroup)
    return _walked(leaf, parent, leaf_segment)


def tree_vectorised(
    reward: Tensor, tree: Tensor, parent: Tensor, leaf_segment: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All leaves step up together, one generation at a time, adding themselves with index_add."""
    leaf = vectorised(reward, tree)
    columns = torch.stack([torch.ones_like(leaf), leaf, leaf.clamp(min=0), leaf.clamp(max=0)], dim=1)
    totals = torch.zeros(len(parent), 4, device=leaf.device)
    position = leaf_segment
    while len(position) > 0:
        totals.index_add_(0, position, columns)
        position = parent[position]
        columns, position = columns[position >= 0], position[position >= 0]
    return leaf, totals[:, 1] / totals[:, 0].clamp(min=1), totals[:, 2:]


def made_trees(trees: int, leaves_each: int, depth: int, device: str) -> tuple[Tensor, ...]:
    """Rewards in {0, 0.1, 1, 1.1}, and trees whose leaves fork from a trunk of tool calls: 2 segments to a call."""
    generator = torch.Generator().manual_seed(trees)
    leaves = trees * leaves_each
    reward = torch.tensor([0.0, 0.1, 1.0, 1.1])[torch.randint(4, (leaves,), generator=generator)]
    parent, ends = [], []
    for _ in range(trees):
        root = len(parent)
        parent.append(-1)
        trunk = [root]
        for _ in range(2 * depth):
            parent.append(trunk[-1])
            trunk.append(len(parent) - 1)
        for _ in range(leaves_each):
            parent.append(trunk[int(torch.randint(len(trunk), (), generator=generator))])
            ends.append(len(parent) - 1)
    tree = torch.arange(leaves) // leaves_each
    return tuple(tensor.to(device) for tensor in (reward, tree, torch.tensor(parent), torch.tensor(ends)))


def _distance(result: Any, expected: Sequence[Tensor]) -> float:
    results = result if isinstance(result, tuple) else (result,)
    pairs = zip((r for r in results if r is not None), expected, strict=True)
    return max(float((a.cpu().double() - b.cpu().double()).abs().max()) for a, b in pairs)


def _leaf_case(estimator: str, inputs: Sequence[Tensor], group: int, loop: Loop, vector: Loop | None) -> Case:
    """inputs: reward and tree, and for trees of segments parent and leaf_segment; for tree_grpo subgroup too."""
    reward, tree, *more = inputs
    names = dict(zip(("parent", "leaf_segment", "subgroup"), more, strict=False)) | {"estimator": estimator}
    exact = ops.group_advantages(reward.double(), tree, **names, backend="reference")
    expected = [tensor for tensor in exact if tensor is not None]

    def ours(backend: str) -> Callable[[], Callable[[], Any]]:
        return lambda: lambda: ops.group_advantages(reward, tree, **names, backend=backend)

    columns = {"op": "group_advantages", "estimator": estimator, "L": len(reward), "group": group}
    others = [Provider("torch vectorised", lambda: lambda: vector(*inputs))] if vector else []
    if reward.device.type == "cpu" or len(reward) < 10_000:  # reading numbers off a GPU one by one takes minutes
        others.append(Provider("Python loop", lambda: lambda: loop(*inputs)))
    return Case(
        columns | {"S": len(more[0]) if more else 0},
        sum(t.numel() * t.element_size() for t in inputs) + 4 * sum(t.numel() for t in expected),
        [
            Provider("arpo-ext", ours("auto")),
            Provider("arpo-ext reference", ours("reference")),
            *others,
        ],
        lambda result: _distance(result, expected),
        2e-5,
    )


def cases(options: Options) -> Iterator[Case]:
    device = options.device
    shapes = [(4, 8)] if options.smoke else [(64, 8), (512, 16), (4096, 16)]
    for shape in shapes:
        yield _leaf_case("grpo", made_trees(*shape, 0, device)[:2], shape[1], dictionary_loop, vectorised)
    for shape in shapes[:2]:
        inputs = made_trees(*shape, 3, device)
        yield _leaf_case("grpo", inputs, shape[1], tree_loop, tree_vectorised)
        # Two trees a prompt.
        reward, tree, parent, ends = inputs
        inputs = (reward, tree // 2, parent, ends, tree % 2)
        yield _leaf_case("tree_grpo", inputs, 2 * shape[1], tree_grpo_loop, None)


def main(argv: Sequence[str] | None = None) -> int:
    return _harness.main(argv, ("group_advantages",))


if __name__ == "__main__":
    raise SystemExit(main())
