"""Agentic Reinforced Policy Optimization: fused ops, branching rollouts and a thin trainer."""

__version__ = "0.1.0"
