"""What one collect call measured: times and counts while it runs, one dictionary of numbers at its end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from arpo_ext.rollout.sampler import Completion, SampleRequest
from arpo_ext.types import RolloutTree, StopReason, ToolResult


@dataclass
class Meter:
    """calls: tool calls handed to the tools; of those, abandoned: not waited for, hits: answered from a cache.
    refused: calls answered without a tool. fresh: paths started to fill a tree up.
    """

    began: float = field(default_factory=lambda: time.perf_counter())
    decode_s: float = 0.0
    tool_wait_s: float = 0.0
    tool_s: float = 0.0
    requests: int = 0
    context_tokens: int = 0
    cached_tokens: int | None = None
    cached_requests: int = 0
    calls: int = 0
    refused: int = 0
    abandoned: int = 0
    hits: int = 0
    fresh: int = 0

    def count_request(self, request: SampleRequest) -> None:
        self.requests += 1
        self.context_tokens += len(request.tokens)

    def count_completion(self, completion: Completion) -> None:
        if completion.cached_tokens is not None:
            self.cached_tokens = (self.cached_tokens or 0) + completion.cached_tokens
            self.cached_requests += completion.cached_tokens > 0

    def count_result(self, result: ToolResult) -> None:
        self.hits += result.cached
        self.tool_s += result.seconds

    def summary(self, trees: Sequence[RolloutTree]) -> dict[str, float]:
        """Numbers of the call under names that start with `rollout/`.

        Work for a shared prefix or tool call counts once, but for each path in `tool_calls_per_path`.

        seconds: makespan, of which decode_seconds in the sampler, decode_idle_seconds outside of it, tool_wait_seconds
        with nothing to do but wait for tools. tool_seconds: of all calls that were waited for, added up.
        context_tokens: of all requests when they began, of which prefix_tokens_reused were cached (if the sampler says
        so), in prefix_cache_hits requests. forks_at_depth_D: forks behind D tool results, for each D that has some.
        """
        leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves]
        results = sum(s.tool is not None for tree, leaf in leaves for s in tree.response_segments(leaf))
        counts = [tree.counts for tree in trees]
        ends = Counter(leaf.end for _, leaf in leaves)
        seconds = time.perf_counter() - self.began
        metrics = {
            "rollout/tool_calls": self.calls,
            "rollout/tool_calls_refused": self.refused,
            "rollout/tool_calls_abandoned": self.abandoned,
            "rollout/tool_calls_per_path": results / max(1, len(leaves)),
            "rollout/tool_cache_hits": self.hits,
            "rollout/tool_seconds": self.tool_s,
            "rollout/tool_wait_seconds": self.tool_wait_s,
            "rollout/sampled_tokens": sum(c["sampled_tokens"] for c in counts),
            "rollout/requests": self.requests,
            "rollout/context_tokens": self.context_tokens,
            "rollout/forks": sum(c["forks"] for c in counts),
            "rollout/fresh_paths": self.fresh,
            "rollout/timed_out_paths": ends[StopReason.TIMEOUT],
            "rollout/cancelled_paths": ends[StopReason.CANCELLED],
            "rollout/seconds": seconds,
            "rollout/decode_seconds": self.decode_s,
            "rollout/decode_idle_seconds": seconds - self.decode_s,
        }
        for depth, forks in sorted(_forks_by_depth(trees).items()):
            metrics[f"rollout/forks_at_depth_{depth}"] = forks
        if self.cached_tokens is not None:
            metrics["rollout/prefix_tokens_reused"] = self.cached_tokens
            metrics["rollout/prefix_cache_hits"] = self.cached_requests
        return {name: float(value) for name, value in metrics.items()}


def _forks_by_depth(trees: Sequence[RolloutTree]) -> Counter[int]:
    """Tool results before a fork -> forks there."""
    forks: Counter[int] = Counter()
    for tree in trees:
        depths: list[int] = []
        for segment in tree.segments:
            above = depths[segment.parent] if depths else 0
            depths.append(above + (segment.tool is not None))
            if segment.branch is not None and segment.branch.children:
                forks[depths[-1]] += segment.branch.children
    return forks
