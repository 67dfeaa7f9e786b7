"""One path while it is open, and what its token budget still allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from arpo_ext.config import RolloutConfig
from arpo_ext.render import Renderer
from arpo_ext.rollout.branching import path_key
from arpo_ext.rollout.tree import GrowingTree
from arpo_ext.types import Branch, StopReason, ToolCall, ToolResult


@dataclass
class OpenPath:
    """A path between two of its events.

    tree: position of its prompt. lineage: see `branching.path_key`. tip: segment that the next one hangs from.
    tokens: everything the model saw so far; used: how many of them follow the prompt. calls: tool calls it wrote.
    head: tokens of the running turn that it shares with the path it left. turn: tool results it read.
    root: normalised entropy of its first window, a branch has that of the path it left.
    window: normalised entropy of its last window. asked: the branch decision of the running window is taken or not
    wanted. probe_entropy, branch: of that window.
    streak: decisions in a row that wished for children. monitored: normalised entropies of its windows, for a path that
    only measures and never forks; else None. told: it got the message that no further call is run.
    good_calls: those whose tools gave a good answer; pending: the one that waits for its answer.
    limit: what `used` may grow to. expires: on the clock of `time.monotonic`, when it is cut.
    """

    tree: int
    lineage: tuple[int, ...]
    tip: int
    tokens: tuple[int, ...]
    used: int = 0
    head: tuple[int, ...] = ()
    calls: int = 0
    turn: int = 0
    root: float | None = None
    window: float | None = None
    asked: bool = False
    probe_entropy: float | None = None
    branch: Branch | None = None
    streak: int = 0
    monitored: list[float] | None = None
    told: bool = False
    good_calls: tuple[ToolCall, ...] = ()
    pending: ToolCall | None = None
    limit: int = 0
    expires: float = math.inf

    @property
    def key(self) -> int:
        return path_key(self.lineage)

    def sibling(self, ordinal: int) -> OpenPath:
        """A path that samples again from this one's tip. One decision serves a turn: it does not ask again."""
        return replace(self, lineage=(*self.lineage, self.turn, ordinal), asked=True, probe_entropy=None, branch=None)

    def sibling_at(self, token: int, before: Sequence[int]) -> OpenPath:
        """A path that samples this one's turn again from its token `token` on; `before`: the turn's tokens up to it."""
        return replace(
            self.sibling(token),
            tokens=(*self.tokens, *before),
            used=self.used + len(before),
            head=(*self.head, *before),
            monitored=None,
        )

    def ask(self, call: ToolCall) -> ToolCall:
        """`call` with the history that a tool which keeps state along a path needs."""
        self.pending = call
        return replace(call, history=tuple(c.text for c in self.good_calls if c.name == call.name))

    def take_answer(self, result: ToolResult) -> None:
        if self.pending is not None and result.ok:
            self.good_calls = (*self.good_calls, self.pending)
        self.pending = None

    def advance(self, segment: int, tokens: Sequence[int]) -> None:
        self.tip = segment
        self.head = ()
        self.tokens = (*self.tokens, *tokens)
        self.used += len(tokens)


@dataclass(frozen=True)
class Budget:
    """What a path and its tree may still add. max_model_len: longest sequence the engine takes."""

    config: RolloutConfig
    renderer: Renderer
    max_model_len: int

    def open(self, path: OpenPath, tree: GrowingTree) -> None:
        """Give a path that starts its tokens: at most an even share of what the tree has left for all that will start.

        So no path takes what others need, whatever the order in which they end.
        """
        path.limit = self.config.max_response_tokens
        if tree.spare is not None:
            share = min(tree.spare // (self.config.paths - tree.started), path.limit - path.used)
            tree.spare -= share
            path.limit = path.used + share
        path.expires = math.inf
        tree.started += 1

    def close(self, path: OpenPath, tree: GrowingTree) -> None:
        """Take back what a path that ended did not use."""
        if tree.spare is not None:
            tree.spare += path.limit - path.used

    def tokens_left(self, path: OpenPath) -> int:
        return min(path.limit - path.used, self.max_model_len - len(path.tokens))

    def result_limit(self, path: OpenPath) -> int | None:
        """Tokens a tool result may take so that a quarter of what is left stays for the answer; None if too few."""
        left = self.tokens_left(path)
        limit = left - max(1, left // 4)
        return limit if limit > self.renderer.result_overhead else None

    def answer_call(
        self, path: OpenPath, tree: GrowingTree, tokens: Sequence[int]
    ) -> ToolCall | ToolResult | StopReason:
        """What follows a turn of `tokens` that ended on a closing tool tag, which is counted here.

        A call to run; or a result that says why none is run; or the end of the path: no room for a result and an
        answer, or a further call after the message that the limit is reached.
        """
        path.calls += 1
        if path.told:
            return StopReason.TOOL
        if self.result_limit(path) is None:
            return StopReason.LENGTH
        name = self.renderer.closing_name(tokens)
        reached = self._limit_reached(path, tree)
        if reached is not None:
            path.told = True
            return ToolResult(name, f"not run: the limit of {reached} is reached, answer now", ok=False)
        call = self.renderer.parse_call(tokens)
        if call is None:
            return ToolResult(name, f"malformed call: expected <{name}> text </{name}>", ok=False)
        tree.calls += 1
        return call

    def _limit_reached(self, path: OpenPath, tree: GrowingTree) -> str | None:
        if path.calls > self.config.max_tool_calls:
            return f"{self.config.max_tool_calls} tool calls"
        shared = self.config.max_tree_tool_calls
        if shared is not None and tree.calls >= shared:
            return f"{shared} tool calls for all answers"
        return None
