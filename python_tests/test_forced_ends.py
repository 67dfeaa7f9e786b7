"""Paths that were cut from outside: in files, rewards, reports and training. They count, but teach nothing."""

import threading
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from scripted import PROMPTS, collect_scripted, one_call, rollout_config
from tiny import forked_tree

from arpo_ext.config import RewardConfig, TrainConfig
from arpo_ext.data import append_trees
from arpo_ext.evaluation.report import write_report
from arpo_ext.render import Renderer
from arpo_ext.rewards import score_tree
from arpo_ext.rollout import read_trees
from arpo_ext.rollout.tree import GrowingTree
from arpo_ext.training.advantages import credit_trees
from arpo_ext.training.batch import plan_updates, tree_rows
from arpo_ext.types import Prompt, StopReason


def _with_cut_path(tree, parent, reason=StopReason.TIMEOUT):
    """The tree with one more path, cut behind segment `parent`."""
    prompt = Prompt(tree.prompt_id, ({"role": "user", "content": "?"},), tree.answers)
    growing = GrowingTree(prompt, list(tree.segments), list(tree.leaves), started=len(tree.leaves) + 1)
    growing.cut(parent, reason)
    return growing.freeze(policy=tree.policy, seed=tree.seed)


def _scored(tree):
    return replace(
        tree, leaves=tuple(replace(leaf, reward=-1.0) if leaf.reward is None else leaf for leaf in tree.leaves)
    )


def _tensors(value):
    """Every tensor in a dataclass, in the order of its fields."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for f in fields(value) for t in _tensors(getattr(value, f.name))] if is_dataclass(value) else []


@pytest.mark.parametrize("parent", [0, 2])
@pytest.mark.parametrize("credit", ["soft", "hard"])
@pytest.mark.parametrize("loss_scale", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("reason", [StopReason.TIMEOUT, StopReason.CANCELLED])
def test_training_is_as_if_a_cut_path_had_never_been(parent, credit, loss_scale, reason):
    config = TrainConfig(credit=credit, loss_scale=loss_scale)
    plain = forked_tree((1.0, 0.0, 0.5))
    updates = []
    for tree in (plain, _scored(_with_cut_path(plain, parent, reason))):
        (credited,) = credit_trees([tree], estimator="grpo")
        updates.append(plan_updates([credited], config, seed=0, pad_token=0)[0])
    whole, cut = updates
    assert whole.normalizer == cut.normalizer > 0
    assert len(whole.micro_batches) == len(cut.micro_batches) == 1
    for left, right in zip(*(_tensors(update.micro_batches[0]) for update in updates), strict=True):
        assert torch.equal(left.nan_to_num(7), right.nan_to_num(7))


def test_the_row_of_a_cut_path_trains_no_token():
    (credited,) = credit_trees([_scored(_with_cut_path(forked_tree(), 2))], estimator="grpo")
    *rows, cut = tree_rows(credited, TrainConfig())
    assert cut.tokens.tolist() == [6, 7, 8, 9, 3, 10, 4]
    assert not cut.trained.any()
    assert not cut.weight.any()
    assert all(row.trained.any() for row in rows)


def test_trees_of_nothing_but_cut_paths_are_skipped():
    tree = forked_tree()
    ended = replace(tree, leaves=tuple(replace(leaf, end=StopReason.CANCELLED) for leaf in tree.leaves))
    for trees in ([ended], [ended, tree]):
        credited = credit_trees(trees, estimator="grpo")
        assert [leaf.advantage for leaf in credited[0].tree.leaves] == [0.0] * 3
        (update,) = plan_updates(credited, TrainConfig(), seed=0, pad_token=0)
        assert update.normalizer == (0 if len(trees) == 1 else 13)


def test_a_cut_path_needs_no_reward():
    (credited,) = credit_trees([_with_cut_path(forked_tree(), 0)], estimator="grpo")
    assert credited.tree.leaves[-1].advantage == 0.0


def test_cut_paths_are_scored_shown_written_and_read(tag_tokenizer, tmp_path):
    renderer = Renderer(tag_tokenizer, ["search", "python"])
    cancel = threading.Event()
    config = rollout_config(paths=4, initial_paths=1)
    collected, _ = collect_scripted(
        renderer, one_call, config, prompts=PROMPTS[:1], cancel=cancel, progress=lambda ended: cancel.set()
    )
    tree = score_tree(collected.trees[0], RewardConfig())
    assert {leaf.end for leaf in tree.leaves} == {StopReason.EOS, StopReason.CANCELLED}
    assert all(leaf.reward == -1 for leaf in tree.leaves if leaf.end.is_forced)
    append_trees(tmp_path / "trees.jsonl", [tree])
    assert read_trees(tmp_path / "trees.jsonl") == [tree]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "train", "reward/mean": 0.5}\n')
    assert "cancelled" in write_report(tmp_path).read_text()
