"""Fused ops of agentic reinforcement learning. Each has a plain torch reference and takes `backend=`."""

from arpo_ext.ops._dispatch import BackendError, available_backends, build_info

__all__ = ["BackendError", "available_backends", "build_info"]
