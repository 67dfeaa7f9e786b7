"""Rollout trees: sampled by an engine, interrupted by tools, forked where the model is uncertain."""

from arpo_ext.rollout.collect import Collected, collect
from arpo_ext.rollout.sampler import Completion, Probe, Sampler, SampleRequest
from arpo_ext.rollout.tree import check_tree, read_trees, split

__all__ = [
    "Collected",
    "Completion",
    "Probe",
    "SampleRequest",
    "Sampler",
    "check_tree",
    "collect",
    "read_trees",
    "split",
]
