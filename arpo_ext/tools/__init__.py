"""Tools the model may call while it is sampled: a protocol, a pool that runs them, Python and search."""

from arpo_ext.tools.base import Tool, build_tools
from arpo_ext.tools.pool import ToolPool, ToolStats

__all__ = ["Tool", "ToolPool", "ToolStats", "build_tools"]
