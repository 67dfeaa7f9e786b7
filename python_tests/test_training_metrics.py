"""Metrics of a step are over everything that was collected, on whatever rank."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from tiny import forked_tree, tree

from arpo_ext.training import metrics as module
from arpo_ext.training.metrics import memory_metrics, tree_metrics
from arpo_ext.types import ToolResult


def step_trees():
    """Two trees: one with a tool call shared by two of three leaves, one whose leaves all have one reward."""
    forked = forked_tree(rewards=(1.0, 0.0, -1.0))
    segments = list(forked.segments)
    segments[1] = replace(segments[1], entropies=(0.5, 1.5), probe_entropy=1.0)
    segments[2] = replace(segments[2], tool=ToolResult("python", "", ok=True, seconds=0.25))
    leaves = [replace(leaf, accuracy=accuracy) for leaf, accuracy in zip(forked.leaves, (1.0, 0.0, 0.0), strict=True)]
    flat = tree([(-1, (6,), False), (0, (7, 8), True), (1, (9,), False)], [(2, 0.5), (1, 0.5)])
    failed = replace(flat.segments[2], tool=ToolResult("python", "", ok=False, seconds=0.75))
    flat = replace(flat, segments=(*flat.segments[:2], failed))
    return [replace(forked, segments=tuple(segments), leaves=tuple(leaves)), flat]


EXPECTED = {
    "reward/mean": 0.2,
    "reward/std": math.sqrt(2.5 / 5 - 0.04),
    "reward/accuracy": 1 / 3,
    "reward/format": 4 / 5,
    "reward/flat_groups": 0.5,
    "rollout/entropy": 1.0,
    "rollout/entropy_probe": 1.0,
    "tokens/unique": 16 + 4,
    "tokens/paths": (8 + 10 + 7) + (4 + 3),
    "tools/python/calls": 2,
    "tools/python/success": 0.5,
    "tools/python/seconds": 0.5,
}


def test_by_hand():
    assert tree_metrics(Accelerator(), step_trees()) == pytest.approx(EXPECTED)


def test_ranks_add_up(monkeypatch):
    one, other = step_trees()
    there = module._counted([other])
    monkeypatch.setattr(module, "gather_object", lambda own: [*own, there])
    assert tree_metrics(Accelerator(), [one]) == pytest.approx(EXPECTED)


def test_nothing_collected_is_not_a_number():
    found = tree_metrics(Accelerator(), [])
    assert math.isnan(found["reward/mean"])
    assert found["tokens/unique"] == 0
    assert not any(name.startswith("tools/") for name in found)


def test_memory_is_that_of_this_process():
    block = torch.ones(16 << 20)
    assert memory_metrics(torch.device("cpu"))["memory/peak_gib"] > block.nbytes / 2**30
