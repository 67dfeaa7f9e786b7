"""Training: scored rollout trees in, weights out. Everything that samples, scores or shows is an argument."""

from arpo_ext.training.loop import train
from arpo_ext.training.sft import sft
from arpo_ext.training.weights import named_weights

__all__ = ["named_weights", "sft", "train"]
