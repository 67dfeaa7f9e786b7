"""Trees that change their rank before an update, so that no rank computes while the others wait.

Each rank trains what it has sampled, and trees differ in length and in how many of their paths teach anything. All
ranks wait for the one with the most, so some of its trees go to the one with the least, as few as it takes. Losses and
gradients are sums over all ranks, so who computes what does not change them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import distributed

from arpo_ext.config import TrainConfig
from arpo_ext.training.advantages import CreditedTree
from arpo_ext.types import RolloutTree


def balance(
    accelerator: Accelerator, trees: Sequence[CreditedTree], config: TrainConfig
) -> tuple[list[CreditedTree], float]:
    """The trees this rank is to train, and the largest share of tokens of a rank over the mean one; call it on all.

    The order of the trees that stay is kept; those that come follow.
    """
    costs = gather_object([[trained_tokens(credited.tree, config) for credited in trees]])
    moves = sorted((source, target, index) for source, index, target in plan_moves(costs))
    rank, kept, came = accelerator.process_index, dict(enumerate(trees)), []
    # Every rank goes through the transfers in one order, so none waits for one that waits for it.
    for (source, target), group in groupby(moves, key=lambda move: move[:2]):
        if rank == source:
            sent = [kept.pop(index) for _, _, index in group]
            distributed.send_object_list([sent], dst=target, device=accelerator.device)
        elif rank == target:
            received = [None]
            distributed.recv_object_list(received, src=source, device=accelerator.device)
            came.extend(received[0])
    loads = [sum(own) for own in costs]
    for source, target, index in moves:
        loads[source] -= costs[source][index]
        loads[target] += costs[source][index]
    return [*kept.values(), *came], max(loads) * len(loads) / max(1, sum(loads))


def trained_tokens(tree: RolloutTree, config: TrainConfig) -> int:
    """Tokens that the model reads to train the tree, near enough: those of paths with an advantage."""
    always = config.kl_coef > 0 or config.entropy_coef > 0
    read = [leaf for leaf in tree.leaves if not leaf.end.is_forced and (always or leaf.advantage)]
    paths = [tree.path(leaf.segment) for leaf in read]
    segments = {i for path in paths for i in path} if config.packing == "tree" else [i for path in paths for i in path]
    return sum(len(tree.segments[i].tokens) for i in segments)


def plan_moves(costs: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """(source rank, index of its tree, target rank): trees to move so that loads become more even.

    costs: of the trees of every rank. Each tree moves once at most. As long as a tree of the heaviest rank is smaller
    than what it has more than the lightest, the one nearest to half of that goes there.
    """
    loads = [sum(own) for own in costs]
    movable = [dict(enumerate(own)) for own in costs]
    moves = []
    while True:
        source, target = max(range(len(loads)), key=loads.__getitem__), min(range(len(loads)), key=loads.__getitem__)
        gap = loads[source] - loads[target]
        fitting = [index for index, cost in movable[source].items() if 0 < cost < gap]
        if not fitting:
            return moves
        best = min(fitting, key=lambda index: abs(2 * movable[source][index] - gap))
        cost = movable[source].pop(best)
        loads[source] -= cost
        loads[target] += cost
        moves.append((source, best, target))
