"""Fused ops of agentic reinforcement learning. Each has a plain torch reference and takes `backend=`."""

from arpo_ext.ops._dispatch import BackendError, available_backends, build_info
from arpo_ext.ops._invalid_labels import invalid_labels
from arpo_ext.ops._result_memory import empty_cache
from arpo_ext.ops.branch_points import aepo_initial_paths, branch_points, branch_scores
from arpo_ext.ops.branch_tokens import TokenBranches, branch_tokens, future_value
from arpo_ext.ops.expand_advantages import expand_advantages, first_occurrences
from arpo_ext.ops.group_advantages import Advantages, group_advantages
from arpo_ext.ops.linear_logprob_entropy import linear_logprob_entropy
from arpo_ext.ops.logits_stats import LogitsStats, logits_stats
from arpo_ext.ops.logprob_entropy import EntropyWriter, entropy, logprob, logprob_entropy, logprob_entropy_into
from arpo_ext.ops.policy_loss import PolicyLossSums, policy_loss

__all__ = [
    "Advantages",
    "BackendError",
    "EntropyWriter",
    "LogitsStats",
    "PolicyLossSums",
    "TokenBranches",
    "aepo_initial_paths",
    "available_backends",
    "branch_points",
    "branch_scores",
    "branch_tokens",
    "build_info",
    "empty_cache",
    "entropy",
    "expand_advantages",
    "first_occurrences",
    "future_value",
    "group_advantages",
    "invalid_labels",
    "linear_logprob_entropy",
    "logits_stats",
    "logprob",
    "logprob_entropy",
    "logprob_entropy_into",
    "policy_loss",
]
