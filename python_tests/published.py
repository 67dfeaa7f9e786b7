"""Every algorithm of `arpo_ext.algorithms` once more, as its paper writes it: plain torch, rollout by rollout.

A rollout is what one leaf's path comes to. Sums run over rollouts and their tokens in the papers' order, each token of
each rollout by itself; ratios, means and advantages are made anew in every function that needs them.
"""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

import torch

EPS = 1e-6


@dataclass
class Rollout:
    """new [n] with gradient, old [n]: log-probabilities of the tokens the model wrote. turn, segment: of each of them.

    length: tokens after the prompt, tool results included. tree: the RolloutTree; leaf: its number there.
    """

    tree: object
    leaf: int
    new: torch.Tensor
    old: torch.Tensor
    entropy: list
    turn: list
    segment: list
    length: int

    @property
    def reward(self):
        return self.tree.leaves[self.leaf].reward


def rollouts_of(trees, logprobs_of):
    """logprobs_of(tokens): log-probability of every token after the first."""
    rollouts = []
    for tree in trees:
        for number, leaf in enumerate(tree.leaves):
            path = tree.path(leaf.segment)
            every = logprobs_of(tree.path_tokens(leaf.segment))
            new, old, entropy, turns, segments = [], [], [], [], []
            position, turn, sampled_before = 0, -1, False
            for index in path:
                segment = tree.segments[index]
                turn += segment.sampled and not sampled_before
                sampled_before = segment.sampled
                for offset in range(len(segment.tokens)):
                    if segment.sampled:
                        new.append(every[position - 1])
                        old.append(segment.logprobs[offset])
                        entropy.append(segment.entropies[offset])
                        turns.append(turn)
                        segments.append(index)
                    position += 1
            length = position - len(tree.segments[0].tokens)
            rollouts.append(
                Rollout(tree, number, torch.stack(new), torch.tensor(old), entropy, turns, segments, length)
            )
    return rollouts


def group(rollouts, of):
    return [other for other in rollouts if other.tree is of.tree]


def normalised(rollouts, of, reward=lambda rollout: rollout.reward):
    rewards = [reward(other) for other in group(rollouts, of)]
    if len(set(rewards)) == 1:
        return 0.0
    return (reward(of) - fmean(rewards)) / (stdev(rewards) + EPS)


def surrogate(ratio, advantage, low, high):
    """PPO: min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def token_ratios(rollout):
    return (rollout.new - rollout.old).exp()


def grpo(rollouts):
    total = 0.0
    for o in rollouts:
        total += surrogate(token_ratios(o), normalised(rollouts, o), 0.2, 0.2).mean()
    return -total / len(rollouts)


arpo = grpo


def arpo_hard(rollouts):
    total = 0.0
    for o in rollouts:
        shared = [
            fmean(
                normalised(rollouts, p) for p in group(rollouts, o) if s in o.tree.path(o.tree.leaves[p.leaf].segment)
            )
            for s in o.segment
        ]
        total += surrogate(token_ratios(o), torch.tensor(shared), 0.2, 0.2).mean()
    return -total / len(rollouts)


def turn_values(rollouts, tree):
    """AT2PO's value of every segment that leads to a leaf, from the leaves up."""
    own = {p.leaf: normalised(rollouts, p) for p in rollouts if p.tree is tree}

    def surprise(index):
        segment = tree.segments[index]
        return -fmean(segment.logprobs) if segment.sampled else 0.0

    def value(index):
        ending = [(surprise(index), own[i]) for i, leaf in enumerate(tree.leaves) if leaf.segment == index]
        children = [(surprise(c), value(c)) for c, s in enumerate(tree.segments) if s.parent == index]
        items = [(h, v) for h, v in ending + children if v is not None]
        if not items:
            return None
        return sum(math.exp(h) * v for h, v in items) / sum(math.exp(h) for h, _ in items)

    return {index: value(index) for index in range(len(tree.segments))}


def arpo_turn(rollouts):
    total = 0.0
    for o in rollouts:
        values = turn_values(rollouts, o.tree)
        advantage = torch.tensor([values[s] for s in o.segment])
        total += surrogate(token_ratios(o), advantage, 0.2, 0.2).mean()
    return -total / len(rollouts)


def at2po(rollouts):
    total = 0.0
    for o in rollouts:
        values = turn_values(rollouts, o.tree)
        terms = 0.0
        for turn in sorted(set(o.turn)):
            inside = torch.tensor([t == turn for t in o.turn])
            ratio = (o.new - o.old)[inside].mean().exp()
            segment = o.segment[o.turn.index(turn)]
            terms += inside.sum() * surrogate(ratio, values[segment], 3e-3, 4e-3)
        total += terms / len(o.new)
    return -total / len(rollouts)


def aepo(rollouts):
    entropies = [h for o in rollouts for h in o.entropy]
    mean, std = fmean(entropies), stdev(entropies)
    total, tokens = 0.0, 0
    for o in rollouts:
        accuracy = normalised(rollouts, o)
        for new, old, entropy in zip(o.new, o.old, o.entropy, strict=True):
            advantage = accuracy * (1 + 0.2 * (entropy - mean) / std)
            delta = (new - old).exp()
            upper = (1 + 0.2) / delta.detach() * delta
            clipped = torch.maximum(delta, torch.tensor(1 - 0.2))
            clipped = upper if float(clipped.detach()) > 1 + 0.2 else clipped
            total += torch.minimum(delta * advantage, clipped * advantage)
            tokens += 1
    return -total / tokens


def dr_grpo(rollouts, length=1024):
    total = 0.0
    for o in rollouts:
        advantage = o.reward - fmean(p.reward for p in group(rollouts, o))
        total += surrogate(token_ratios(o), advantage, 0.2, 0.2).sum() / length
    return -total / len(rollouts)


def dapo(rollouts, limit=20):
    cache = 0.2 * limit

    def shaped(o):
        if o.length <= limit - cache:
            return o.reward
        return o.reward + max(-1.0, ((limit - cache) - o.length) / cache)

    total, tokens = 0.0, 0
    for o in rollouts:
        total += surrogate(token_ratios(o), normalised(rollouts, o, shaped), 0.2, 0.28).sum()
        tokens += len(o.new)
    return -total / tokens


def globally_normalised(rollouts, reward):
    tokens = [reward(o) for o in rollouts for _ in o.new]
    mean, std = fmean(tokens), stdev(tokens)
    return lambda o: (reward(o) - mean) / (std + EPS)


def reinforce_pp(rollouts, reward=lambda o: o.reward):
    advantage = globally_normalised(rollouts, reward)
    total, tokens = 0.0, 0
    for o in rollouts:
        total += surrogate(token_ratios(o), advantage(o), 0.2, 0.2).sum()
        tokens += len(o.new)
    return -total / tokens


def reinforce_pp_baseline(rollouts):
    return reinforce_pp(rollouts, lambda o: o.reward - fmean(p.reward for p in group(rollouts, o)))


def rloo(rollouts):
    total = 0.0
    for o in rollouts:
        others = [p.reward for p in group(rollouts, o) if p is not o]
        total += surrogate(token_ratios(o), o.reward - fmean(others), 0.2, 0.2).sum()
    return -total / len(rollouts)


def gspo(rollouts):
    total = 0.0
    for o in rollouts:
        ratio = ((o.new - o.old).sum() / len(o.new)).exp()
        total += surrogate(ratio, normalised(rollouts, o), 3e-4, 4e-4)
    return -total / len(rollouts)


def cispo(rollouts):
    total, tokens = 0.0, 0
    for o in rollouts:
        weight = token_ratios(o).detach().clamp(max=5.0)
        total += (weight * normalised(rollouts, o) * o.new).sum()
        tokens += len(o.new)
    return -total / tokens
