"""The estimators as loops in plain Python, and forests to run them on. What test_group_advantages*.py share."""

import math
import statistics

import torch
from hypothesis import strategies as st

WITH_SUBGROUP = ("tree_grpo", "tree_grpo_sum", "appo")


def zscores(values, keys, eps=1e-6, std=statistics.stdev):
    groups = {}
    for value, key in zip(values, keys, strict=True):
        groups.setdefault(key, []).append(value)
    flat = {key for key, group in groups.items() if max(group) == min(group)}
    mean = {key: math.fsum(group) / len(group) for key, group in groups.items()}
    spread = {key: 1.0 if key in flat else std(group) + eps for key, group in groups.items()}
    pairs = zip(values, keys, strict=True)
    return [0.0 if key in flat else (value - mean[key]) / spread[key] for value, key in pairs]


def naive(reward, tree, estimator, eps=1e-6, length=None, subgroup=None):
    length = length or [1] * len(reward)
    if estimator == "none":
        return list(reward)
    if estimator in ("grpo", "at2po"):
        return zscores(reward, tree, eps)
    if estimator in WITH_SUBGROUP:
        pairs = list(zip(tree, subgroup, strict=True))
        if estimator == "appo":
            return zscores(reward, pairs, eps, statistics.pstdev)
        outer = zscores(reward, tree, eps)
        if estimator == "tree_grpo":
            return zscores(outer, pairs, eps)
        return [a + b for a, b in zip(outer, zscores(reward, pairs, eps), strict=True)]
    groups = {}
    for leaf, t in enumerate(tree):
        groups.setdefault(t, []).append(leaf)
    flat = {t: len({reward[leaf] for leaf in group}) == 1 for t, group in groups.items()}
    advantages = [0.0] * len(reward)
    for t, group in groups.items():
        if flat[t]:
            continue
        rewards = [reward[leaf] for leaf in group]
        n, total, tokens = len(group), math.fsum(rewards), sum(length[leaf] for leaf in group)
        scored = math.fsum(length[leaf] * reward[leaf] for leaf in group)
        if estimator == "grpo_passk":
            best, second = sorted(rewards, reverse=True)[:2]
            winner = next(leaf for leaf in group if reward[leaf] == best)
            advantages[winner] = (best - second) / (statistics.stdev(rewards) + eps)
            continue
        for leaf in group:
            r = reward[leaf]
            if estimator in ("dr_grpo", "reinforce_pp_baseline"):
                advantages[leaf] = r - total / n
            elif estimator == "rloo":
                advantages[leaf] = r - (total - r) / (n - 1)
            elif tokens > 0:
                assert estimator == "opo"
                advantages[leaf] = r - scored / tokens
    if estimator != "reinforce_pp_baseline":
        return advantages
    tokens = sum(length)
    mean = math.fsum(n * a for n, a in zip(length, advantages, strict=True)) / max(tokens, 1)
    spread = math.fsum(n * (a - mean) ** 2 for n, a in zip(length, advantages, strict=True))
    if tokens < 2 or spread == 0:
        return [0.0] * len(reward)
    std = math.sqrt(spread / (tokens - 1))
    return [0.0 if flat[t] else (a - mean) / (std + eps) for a, t in zip(advantages, tree, strict=True)]


def naive_segments(advantage, parent, leaf_segment, weight=None):
    """Mean [S] and pair [S, 2] of the leaves below each segment."""
    weight = weight or [1.0] * len(advantage)
    below = leaves_below(parent, leaf_segment)
    mean = [math.fsum(advantage[i] for i in leaves) / len(leaves) if leaves else 0.0 for leaves in below]
    pair = [
        [
            math.fsum(weight[i] * max(advantage[i], 0.0) for i in leaves),
            math.fsum(weight[i] * min(advantage[i], 0.0) for i in leaves),
        ]
        for leaves in below
    ]
    return mean, pair


def leaves_below(parent, leaf_segment):
    below = [[] for _ in parent]
    for leaf, segment in enumerate(leaf_segment):
        while segment >= 0:
            below[segment].append(leaf)
            segment = parent[segment]
    return below


def naive_turn(advantage, parent, leaf_segment, entropy, weight):
    """AT2PO: (value [S], pair [S, 2])."""

    below = leaves_below(parent, leaf_segment)
    items = [[] for _ in parent]
    for i, end in enumerate(leaf_segment):
        items[end].append((entropy[end], advantage[i]))
    values = [0.0] * len(parent)
    for s in reversed(range(len(parent))):
        if below[s]:
            total = math.fsum(math.exp(h) for h, _ in items[s])
            values[s] = math.fsum(math.exp(h) * v for h, v in items[s]) / total
            if parent[s] >= 0:
                items[parent[s]].append((entropy[s], values[s]))
    return values, shared_pair(values, below, weight)


def naive_prefix(advantage, parent, leaf_segment, subgroup, weight):
    """APPO: (value [S], pair [S, 2])."""
    values, initial_below = [], []
    for leaves in leaves_below(parent, leaf_segment):
        initial = [i for i in leaves if subgroup[i] == 0]
        branches = [i for i in leaves if subgroup[i] != 0]
        own = math.fsum(advantage[i] for i in initial) / max(len(initial), 1)
        gained = math.fsum(advantage[i] for i in branches) / max(len(branches), 1)
        values.append(own + gained if initial else 0.0)
        initial_below.append(initial)
    return values, shared_pair(values, initial_below, weight)


def shared_pair(values, below, weight):
    totals = [math.fsum(weight[i] for i in leaves) for leaves in below]
    return [[w * max(v, 0.0), w * min(v, 0.0)] for w, v in zip(totals, values, strict=True)]


def float32(values):
    return torch.tensor(values, dtype=torch.float32)


def int64(values):
    return torch.tensor(values, dtype=torch.int64)


def close(got, expected, scale=1.0):
    torch.testing.assert_close(got.cpu(), float32(expected), rtol=2e-6, atol=2e-6 * scale, equal_nan=True)


def made_forest(leaves, trees, seed, *, shuffled=True):
    """Rewards, tree ids, parents and leaf segments of a random forest whose leaves come in random order."""
    generator = torch.Generator().manual_seed(seed)
    tree = torch.randint(trees, (leaves,), generator=generator)
    if not shuffled:
        # Together, but not in the order of their numbers.
        tree = torch.randperm(trees, generator=generator)[tree.sort().values]
    reward = torch.randint(-1, 3, (leaves,), generator=generator) / 2
    parent, ends = [-1] * trees, []
    for t in tree.tolist():
        segment = t
        for _ in range(int(torch.randint(1, 6, (), generator=generator))):
            parent.append(segment)
            segment = len(parent) - 1
        ends.append(segment)
    return reward, tree, torch.tensor(parent), torch.tensor(ends)


def extras(leaves, segments, seed):
    """length, subgroup, segment_entropy and leaf_weight for a forest."""
    generator = torch.Generator().manual_seed(seed + 1)
    return {
        "length": torch.randint(0, 50, (leaves,), generator=generator),
        "subgroup": torch.randint(0, min(3, leaves), (leaves,), generator=generator),
        "segment_entropy": torch.rand(segments, generator=generator) * 3,
        "leaf_weight": torch.rand(leaves, generator=generator),
    }


@st.composite
def groups(draw):
    """Rewards, and for each a tree, a subgroup and a length."""
    reward = st.one_of(st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, 1.0, -1.0]))
    rewards = draw(st.lists(reward, max_size=20))
    ids = st.lists(st.integers(0, max(len(rewards) - 1, 0)), min_size=len(rewards), max_size=len(rewards))
    few = st.lists(st.integers(0, max(min(len(rewards), 3) - 1, 0)), min_size=len(rewards), max_size=len(rewards))
    lengths = st.lists(st.integers(0, 9), min_size=len(rewards), max_size=len(rewards))
    return rewards, draw(st.one_of(ids, few)), draw(few), draw(lengths)


@st.composite
def forests(draw):
    """Rewards, trees, parents and ends: any forest, with segments above no leaf and leaves that end inside a tree."""
    segments = draw(st.integers(1, 12))
    parent = [draw(st.integers(-1, s - 1)) for s in range(segments)]
    leaves = draw(st.integers(0, 10))
    ends = [draw(st.integers(0, segments - 1)) for _ in range(leaves)]
    rewards = [draw(st.sampled_from([0.0, 0.1, 1.0, -1.0, 0.5])) for _ in range(leaves)]
    trees = [draw(st.integers(0, max(leaves // 3, 0))) for _ in range(leaves)]
    return rewards, trees, parent, ends
