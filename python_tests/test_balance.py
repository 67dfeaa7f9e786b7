"""Trees change ranks as seldom as it takes to even out what the ranks have to read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from test_distributed import start
from tiny import forked_tree

from arpo_ext.config import TrainConfig
from arpo_ext.training.advantages import credit_trees
from arpo_ext.training.balance import balance, plan_moves, trained_tokens
from arpo_ext.types import StopReason


def loads_after(costs, moves):
    loads = [sum(own) for own in costs]
    for source, index, target in moves:
        loads[source] -= costs[source][index]
        loads[target] += costs[source][index]
    return loads


@pytest.mark.parametrize(
    ("costs", "moves", "loads"),
    [
        ([[5, 5], [5, 5]], [], [10, 10]),
        ([[9]], [], [9]),
        ([[], []], [], [0, 0]),
        ([[7, 3, 2], []], [(0, 0, 1)], [5, 7]),
        ([[10], [1]], [], [10, 1]),
        ([[4, 4, 4], [2], [0]], [(0, 0, 2), (0, 1, 1)], [4, 6, 4]),
    ],
)
def test_moves_by_hand(costs, moves, loads):
    assert plan_moves(costs) == moves
    assert loads_after(costs, moves) == loads


@given(st.lists(st.lists(st.integers(0, 1000), max_size=12), min_size=1, max_size=6))
def test_no_tree_moves_twice_and_the_heaviest_rank_gets_no_heavier(costs):
    moves = plan_moves(costs)
    assert len({(source, index) for source, index, _ in moves}) == len(moves)
    loads = loads_after(costs, moves)
    assert max(loads) <= max(sum(own) for own in costs)
    assert min(loads) >= min(sum(own) for own in costs)
    largest = max((cost for own in costs for cost in own), default=0)
    assert max(loads) <= sum(loads) / len(loads) + largest


def test_many_trees_end_up_even():
    generator = torch.Generator().manual_seed(0)
    costs = torch.randint(100, 4000, (8, 16), generator=generator).tolist()
    costs[3] = [4 * cost for cost in costs[3]]
    loads = loads_after(costs, plan_moves(costs))
    assert max(sum(own) for own in costs) > 2.5 * sum(map(sum, costs)) / 8
    assert max(loads) < 1.02 * sum(loads) / 8


def test_only_paths_that_teach_something_count():
    (credited,) = credit_trees([forked_tree((1.0, 0.0, 0.5))], estimator="grpo")
    # Prompt 2, turn 2, result 3, then 1, 3 and, on its own, 5 tokens; the last leaf's advantage is 0.
    assert trained_tokens(credited.tree, TrainConfig()) == 2 + 2 + 3 + 1 + 3
    assert trained_tokens(credited.tree, TrainConfig(packing="rows")) == (7 + 1) + (7 + 3)
    assert trained_tokens(credited.tree, TrainConfig(kl_coef=0.1)) == 16
    assert trained_tokens(credited.tree, TrainConfig(packing="rows", kl_coef=0.1)) == 8 + 10 + 7


def dealt_ranks():
    """Rank 0 brings four trees and rank 1 a flat one: two trees cross over, whole."""
    config, parts, _ = start("none")
    accelerator = parts["accelerator"]
    rank = accelerator.process_index
    spread, flat = (1.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    named = [("a", spread), ("b", spread), ("c", spread), ("d", spread)] if rank == 0 else [("e", flat)]
    own = credit_trees([forked_tree(rewards, prompt_id=name) for name, rewards in named], estimator="grpo")
    assert own[0].tree.leaves[0].end is StopReason.EOS
    dealt, imbalance = balance(accelerator, own, config)
    assert imbalance == 1.0
    names = [credited.tree.prompt_id for credited in dealt]
    assert names == (["c", "d"] if rank == 0 else ["e", "a", "b"])
    for credited in dealt[1:]:
        (expected,) = credit_trees([forked_tree(spread, prompt_id=credited.tree.prompt_id)], estimator="grpo")
        assert credited.tree == expected.tree
        assert torch.equal(credited.segment, expected.segment)
    nothing, imbalance = balance(accelerator, [], config)
    assert (nothing, imbalance) == ([], 0.0)


@pytest.mark.slow
def test_trees_cross_between_processes():
    run_ranks("import test_balance as t; t.dealt_ranks()")
