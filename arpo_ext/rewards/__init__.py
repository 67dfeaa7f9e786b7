"""Rewards of complete responses: the paper's Eq. 8 over a format check and one of several accuracies."""

from arpo_ext.rewards.base import RewardResult, hierarchical_reward, score_tree

__all__ = ["RewardResult", "hierarchical_reward", "score_tree"]
