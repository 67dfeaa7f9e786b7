"""Rows, credit and micro-batches of trees worked by hand."""

import json

import pytest
import torch
from tiny import forked_tree, tree

from arpo_ext.config import TrainConfig
from arpo_ext.training.advantages import credit_trees
from arpo_ext.training.batch import Row, plan_updates, policy_batch, token_batch, tree_rows, weightless_batch
from arpo_ext.types import RolloutTree

# Rewards 1, 0, 0: mean 1/3, unbiased standard deviation 1/sqrt(3).
GOOD, BAD = 2 / 3 * 3**0.5, -1 / 3 * 3**0.5


def rows_of(rollout_tree, **settings):
    (credited,) = credit_trees([rollout_tree], estimator="grpo")
    return tree_rows(credited, TrainConfig(**settings))


def test_a_row_is_the_whole_path_and_trains_sampled_tokens_only():
    first, second, third = rows_of(forked_tree())
    assert first.tokens.tolist() == [6, 7, 8, 9, 3, 10, 4, 11]
    assert first.trained.tolist() == [False, False, True, True, False, False, False, True]
    assert second.tokens.tolist() == [6, 7, 8, 9, 3, 10, 4, 12, 13, 2]
    assert third.trained.tolist() == [False] * 2 + [True] * 5
    assert torch.equal(first.sampler_logprob.isnan(), ~first.trained)


def test_the_first_token_of_a_path_is_never_trained():
    (row,) = rows_of(tree([(-1, (), False), (0, (5, 6), True)], [(1, 1.0)]))
    assert row.trained.tolist() == [False, True]


def test_leaves_get_their_advantage_and_survive_the_file_format():
    (credited,) = credit_trees([forked_tree()], estimator="grpo")
    advantages = [leaf.advantage for leaf in credited.tree.leaves]
    assert advantages == pytest.approx([GOOD, BAD, BAD], rel=1e-5)
    again = RolloutTree.from_json(json.loads(json.dumps(credited.tree.to_json())))
    assert [leaf.advantage for leaf in again.leaves] == advantages


def test_soft_credit_gives_every_row_its_own_advantage():
    for row, advantage in zip(rows_of(forked_tree(), credit="soft"), (GOOD, BAD, BAD), strict=True):
        assert row.advantage.tolist() == pytest.approx([advantage] * len(row.tokens), rel=1e-5)


def test_hard_credit_gives_shared_tokens_the_mean_of_their_leaves():
    first, second, third = rows_of(forked_tree(), credit="hard")
    shared = (GOOD + BAD) / 2
    # Prompt: mean over all three leaves, which is 0. Turn 1 and the tool result: mean over the two leaves below.
    assert first.advantage.tolist() == pytest.approx([0] * 2 + [shared] * 5 + [GOOD], rel=1e-5, abs=1e-6)
    assert second.advantage.tolist() == pytest.approx([0] * 2 + [shared] * 5 + [BAD] * 3, rel=1e-5, abs=1e-6)
    assert third.advantage.tolist() == pytest.approx([0] * 2 + [BAD] * 5, rel=1e-5, abs=1e-6)


def test_groups_are_trees():
    credited = credit_trees([forked_tree((1.0, 0.0, 0.0)), forked_tree((5.0, 5.0, 5.0))], estimator="grpo")
    assert [leaf.advantage for leaf in credited[1].tree.leaves] == [0.0, 0.0, 0.0]
    assert credited[0].tree.leaves[0].advantage == pytest.approx(GOOD, rel=1e-5)
    assert [len(c.segment) for c in credited] == [6, 6]


def test_a_tree_without_leaves_has_no_rows():
    empty = tree([(-1, (5,), False)], [])
    credited = credit_trees([empty, forked_tree()], estimator="grpo")
    assert tree_rows(credited[0], TrainConfig()) == []
    assert credited[1].tree.leaves[0].advantage == pytest.approx(GOOD, rel=1e-5)
    assert tree_rows(credit_trees([empty], estimator="grpo")[0], TrainConfig()) == []


def test_unscored_trees_are_refused():
    with pytest.raises(ValueError, match="tree 'p' has a leaf without a reward; expected scored trees"):
        credit_trees([forked_tree((1.0, None, 0.0))], estimator="grpo")


def test_a_turn_is_what_the_model_wrote_between_two_results():
    # Segments 1 and 2 are one turn that a fork cut in two; 4 is the turn after the tool result 3.
    cut = tree(
        [
            (-1, (5,), False),
            (0, (6, 7), True),
            (1, (8,), True),
            (2, (9, 10), False),
            (3, (11,), True),
            (1, (12,), True),
        ],
        [(4, 1.0), (5, 0.0)],
    )
    long, short = rows_of(cut)
    assert long.turn[long.trained].tolist() == [0, 0, 0, 1]
    assert short.turn[short.trained].tolist() == [0, 0, 0]
    for rows, expected in (([long], [0] * 3 + [1]), ([long, short, long], [0] * 3 + [1] + [2] * 3 + [3] * 3 + [4])):
        for packing in ("tree", "rows"):
            columns = policy_batch(rows, TrainConfig(packing=packing), 0).columns
            assert columns.turn.tolist() == expected
    assert columns.row.tolist() == [0] * 4 + [1] * 3 + [2] * 4


def test_weights_of_both_loss_scales():
    token = rows_of(forked_tree(), loss_scale="token_mean")
    assert [row.weight.sum().item() for row in token] == [3, 5, 5]
    sequence = rows_of(forked_tree(), loss_scale="sequence_mean")
    for row, sampled in zip(sequence, (3, 5, 5), strict=True):
        assert row.weight[row.trained].tolist() == pytest.approx([1 / sampled] * sampled)
        assert row.weight[~row.trained].eq(0).all()


def test_missing_sampler_logprobs_are_refused_where_they_are_needed():
    with pytest.raises(ValueError, match=r"without logprobs; expected the sampler's, or train\.old_logprob=trainer"):
        rows_of(forked_tree(logprob=None))
    assert len(rows_of(forked_tree(logprob=None), old_logprob="trainer")) == 3


@pytest.mark.parametrize(("loss_scale", "normalizer"), [("token_mean", 26.0), ("sequence_mean", 6.0)])
def test_rows_without_advantage_are_left_out_but_stay_in_the_normalizer(loss_scale, normalizer):
    credited = credit_trees([forked_tree(), forked_tree((1.0, 1.0, 1.0))], estimator="grpo")
    config = TrainConfig(loss_scale=loss_scale, packing="rows", micro_batch_rows=2)
    (update,) = plan_updates(credited, config, seed=0, pad_token=0)
    assert [batch.text.tokens.shape[0] for batch in update.micro_batches] == [2, 1]
    assert update.normalizer == pytest.approx(normalizer)


def test_updates_are_disjoint_sets_of_trees():
    trees = [forked_tree(prompt_id=str(i)) for i in range(5)]
    credited = credit_trees(trees, estimator="grpo")
    config = TrainConfig(updates_per_step=2, packing="rows", micro_batch_rows=100)
    plans = {seed: plan_updates(credited, config, seed=seed, pad_token=0) for seed in range(4)}
    for plan in plans.values():
        assert [batch.text.tokens.shape[0] for update in plan for batch in update.micro_batches] == [9, 6]
        assert sum(update.normalizer for update in plan) == 5 * 13
    many = TrainConfig(updates_per_step=3)
    assert [len(u.micro_batches) for u in plan_updates(credited[:2], many, seed=0, pad_token=0)] == [1, 1, 0]


def test_token_batch_keeps_positions_whose_next_token_is_trained():
    rows = [
        Row(torch.tensor([5, 6, 7]), torch.tensor([False, False, True])),
        Row(torch.tensor([8, 9, 10, 11, 12]), torch.tensor([False, True, False, False, True])),
    ]
    batch = token_batch(rows, pad_token=0)
    assert batch.tokens.tolist() == [[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]]
    assert batch.keep.tolist() == [0, 1, 3]
    assert batch.labels.tolist() == [[6, 7, 0], [9, 10, 12]]
    assert batch.mask.tolist() == [[False, True, False], [True, False, True]]


def test_the_weightless_batch_trains_nothing():
    batch = weightless_batch(pad_token=3)
    assert batch.text.tokens.tolist() == [[3, 3]]
    assert not batch.text.mask.any()
    assert not batch.columns.weight.any()
    assert batch.text.labels.shape == (1, 1)
    assert batch.columns.weight.shape == batch.columns.advantage.shape == (1,)
