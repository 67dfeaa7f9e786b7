"""Advantages of whole steps: statistics over ranks, overlong paths, estimators, what is refused."""

import threading
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch
from advantage_cases import naive
from tiny import forked_tree, tree

from arpo_ext.config import TrainConfig
from arpo_ext.training.advantages import credit_trees
from arpo_ext.training.batch import tree_rows
from arpo_ext.types import Leaf, Segment, StopReason

# Rewards and path lengths of the three leaves of `forked_tree`: 3, 5 and 5 trained tokens.
LENGTHS = (3, 5, 5)


def with_entropies(rollout_tree, seed):
    generator = torch.Generator().manual_seed(seed)
    segments = [
        replace(s, entropies=tuple(torch.rand(len(s.tokens), generator=generator).tolist()) if s.sampled else ())
        for s in rollout_tree.segments
    ]
    return replace(rollout_tree, segments=tuple(segments))


def made_trees(count=5):
    rewards = [(1.0, 0.0, 0.2), (3.0, 1.0, 1.0), (0.0, 0.0, 0.0), (2.0, 5.0, 0.5), (1.0, 1.0, 0.0)]
    return [with_entropies(forked_tree(own, prompt_id=str(i)), i) for i, own in enumerate(rewards[:count])]


def on_ranks(shares, **options):
    """`credit_trees` on each share of the trees in a thread of its own, sums joined as a process group joins them."""
    barrier, board, results = threading.Barrier(len(shares)), {}, {}

    def rank(index):
        def global_sum(values):
            board[index] = list(values)
            barrier.wait(timeout=10)
            total = [sum(column) for column in zip(*board.values(), strict=True)]
            barrier.wait(timeout=10)
            return total

        results[index] = credit_trees(shares[index], global_sum=global_sum, **options)

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return [credited for index in range(len(shares)) for credited in results[index]]


@pytest.mark.parametrize("split", [(5,), (3, 2), (5, 0), (1, 1, 3)])
def test_statistics_of_the_step_are_over_all_ranks(split):
    trees, shares, start = made_trees(), [], 0
    for size in split:
        shares.append(trees[start : start + size])
        start += size
    got = on_ranks(shares, estimator="none", whiten=True, entropy_advantage=0.5)

    rewards = [leaf.reward for t in trees for leaf, n in zip(t.leaves, LENGTHS, strict=True) for _ in range(n)]
    mean, std = fmean(rewards), stdev(rewards)
    entropies = [h for t in trees for leaf in t.leaves for s in t.response_segments(leaf) for h in s.entropies]
    for credited, own in zip(got, trees, strict=True):
        expected = [(leaf.reward - mean) / std for leaf in own.leaves]
        assert [leaf.advantage for leaf in credited.tree.leaves] == pytest.approx(expected, rel=1e-4)
        for factor, segment in zip(credited.factor, own.segments, strict=True):
            z = [(h - fmean(entropies)) / stdev(entropies) for h in segment.entropies]
            assert factor.tolist() == pytest.approx([1 + 0.5 * x for x in z] or [1.0] * len(segment.tokens), rel=1e-5)


def test_the_factor_reaches_the_advantage_of_every_token():
    (credited,) = credit_trees(made_trees(1), estimator="grpo", entropy_advantage=0.3)
    for leaf, row in zip(credited.tree.leaves, tree_rows(credited, TrainConfig()), strict=True):
        factor = torch.cat([credited.factor[i] for i in credited.tree.path(leaf.segment)])
        assert row.advantage.tolist() == pytest.approx((leaf.advantage * factor).tolist(), rel=1e-6)
        assert len(set(row.advantage[row.trained].tolist())) == int(row.trained.sum())


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "opo", "grpo_passk", "none"])
def test_every_estimator_of_the_config_sees_rewards_trees_and_lengths(estimator):
    trees = made_trees(2)
    got = [leaf.advantage for credited in credit_trees(trees, estimator=estimator) for leaf in credited.tree.leaves]
    rewards = [leaf.reward for t in trees for leaf in t.leaves]
    assert got == pytest.approx(naive(rewards, [0] * 3 + [1] * 3, estimator, length=[*LENGTHS * 2]), rel=1e-5)
    assert estimator in str(TrainConfig.model_fields["estimator"].annotation)


@pytest.mark.parametrize(
    ("length", "penalty"), [(8, 0.0), (15, 0.0), (16, 0.0), (17, 0.25), (19, 0.75), (20, 1.0), (23, 1.0)]
)
def test_overlong_paths_lose_reward_over_the_last_share_of_the_budget(length, penalty):
    # A tool result of 3 tokens counts, the prompt of 50 does not.
    long = tree(
        [
            (-1, (5,) * 50, False),
            (0, (6,) * (length - 4), True),
            (1, (7,) * 3, False),
            (2, (8,), True),
            (0, (9,), True),
        ],
        [(3, 1.0), (4, 1.0)],
    )
    (credited,) = credit_trees([long], estimator="none", overlong_share=0.2, response_limit=20)
    assert [leaf.advantage for leaf in credited.tree.leaves] == pytest.approx([1.0 - penalty, 1.0])
    # What is logged stays what the scorer gave.
    assert [leaf.reward for leaf in credited.tree.leaves] == [1.0, 1.0]


def test_equal_entropies_or_rewards_change_nothing():
    flat = [
        replace(
            t, segments=tuple(replace(s, entropies=(0.5,) * len(s.tokens) if s.sampled else ()) for s in t.segments)
        )
        for t in made_trees(1)
    ]
    (credited,) = credit_trees(flat, estimator="grpo", entropy_advantage=0.2)
    assert torch.cat(credited.factor).eq(1).all()
    (credited,) = credit_trees([forked_tree((1.0, 1.0, 1.0))], estimator="none", whiten=True)
    assert [leaf.advantage for leaf in credited.tree.leaves] == [0.0, 0.0, 0.0]


def test_paths_cut_from_outside_move_no_statistic():
    whole = made_trees(2)
    # Another path, forked below the tool result and cut: its reward means nothing, its entropies are not known.
    cut = [
        replace(
            t,
            segments=(*t.segments, Segment(2, (9, 9), sampled=True)),
            leaves=(*t.leaves, Leaf(len(t.segments), StopReason.TIMEOUT, reward=50.0)),
        )
        for t in whole
    ]
    options = {"estimator": "rloo", "whiten": True, "entropy_advantage": 0.2, "credit": "hard"}
    for with_cut, without in zip(credit_trees(cut, **options), credit_trees(whole, **options), strict=True):
        expected = [leaf.advantage for leaf in without.tree.leaves] + [0.0]
        assert [leaf.advantage for leaf in with_cut.tree.leaves] == expected
        assert torch.equal(with_cut.segment[:-1], without.segment)
        assert torch.equal(torch.cat(with_cut.factor[:-1]), torch.cat(without.factor))
        settings = TrainConfig(old_logprob="trainer", credit="hard", loss_scale="sequence_sum")
        *_, last = tree_rows(with_cut, settings)
        assert not last.trained.any()
        assert last.share == 0


def test_what_credit_needs_and_does_not_find_is_named():
    silent = forked_tree(logprob=None)
    with pytest.raises(ValueError, match=r"without logprobs; train\.credit=turn weighs by them"):
        credit_trees([silent], estimator="grpo", credit="turn")
    with pytest.raises(ValueError, match=r"0 entropies for 2 tokens; train\.entropy_advantage expects rollout"):
        credit_trees([forked_tree()], estimator="grpo", entropy_advantage=0.2)


def test_no_trees_are_no_advantages():
    assert credit_trees([], estimator="grpo", whiten=True, entropy_advantage=0.1, credit="hard") == []
