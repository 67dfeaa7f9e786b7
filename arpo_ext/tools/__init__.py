"""Tools the model may call while it is sampled: a protocol, a pool that runs them, Python and search."""

from arpo_ext.tools.base import Tool, build_tools, open_pool
from arpo_ext.tools.lane import Retry
from arpo_ext.tools.pool import ToolPool, ToolStats

__all__ = ["Retry", "Tool", "ToolPool", "ToolStats", "build_tools", "open_pool"]
