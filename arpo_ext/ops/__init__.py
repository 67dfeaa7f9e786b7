"""Fused ops of agentic reinforcement learning. Each has a plain torch reference and takes `backend=`."""

from arpo_ext.ops._dispatch import BackendError, available_backends, build_info
from arpo_ext.ops._logits import invalid_labels
from arpo_ext.ops.logprob_entropy import entropy, logprob, logprob_entropy, logprob_entropy_into

__all__ = [
    "BackendError",
    "available_backends",
    "build_info",
    "entropy",
    "invalid_labels",
    "logprob",
    "logprob_entropy",
    "logprob_entropy_into",
]
