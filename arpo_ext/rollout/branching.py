"""Where a path forks while it is sampled: windows of entropies in, decisions out.

The rule itself is `ops.branch_points`; this file says what it is asked. A window is the first k entropies after a tool
result (ARPO Eq. 3 to 5), normalised, against the baseline of its path. Policies that wait for complete paths are in
`expansion`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from arpo_ext import ops
from arpo_ext.config import RolloutConfig
from arpo_ext.types import Branch

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Window:
    """A path that asks. tree: position of its prompt. entropy: normalised; root: that of the path's first window.

    streak: how many of its last decisions in a row were positive.
    """

    tree: int
    key: int
    turn: int
    entropy: float
    root: float
    streak: int = 0


def path_key(lineage: Sequence[int]) -> int:
    """64-bit key of a path: (initial path, turn of a fork, ordinal of its sibling, turn, ...), never arrival order."""
    digest = hashlib.blake2b(struct.pack(f"<{len(lineage)}q", *lineage), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def draw_seed(seed: int, tree: int, key: int, turn: int) -> int:
    """Seed of one request's draws, in [0, 2**63): the same path draws alike whatever it is batched with."""
    digest = hashlib.blake2b(struct.pack("<4q", seed, tree, key, turn), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Brancher:
    """The branch rule of one collect call and the running mean it may compare with.

    vocab_size: V of the normaliser. `mean_over_log_vocab`: mean(H) / ln V, between 0 and 1; `sum_over_vocab`:
    sum(H) / V, the paper's Eq. 4.
    """

    def __init__(self, config: RolloutConfig, vocab_size: int, seed: int) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.seed = seed
        self._sum = 0.0
        self._count = 0
        if config.policy == "paper" and config.base == config.threshold:
            _warn_of_sign_rule(config.base)

    def normalize(self, entropies: Sequence[float]) -> float:
        """The window's one number; NaN for an empty window."""
        if not entropies:
            return math.nan
        if self.config.normalizer == "sum_over_vocab":
            return sum(entropies) / self.vocab_size
        return sum(entropies) / (len(entropies) * max(math.log(self.vocab_size), 1e-9))

    def decide(self, windows: Sequence[Window], room: Sequence[int]) -> list[Branch | None]:
        """One decision a window; `room` is the number of paths each tree may still start.

        All windows of one call see the same baseline, so their order changes nothing. None under `chain`, `at2po`
        and `appo`, which take no decisions here. With `post_tool` the first windows have nothing to be compared with
        and count as no change.
        """
        if self.config.policy in ("chain", "at2po", "appo"):
            return [None] * len(windows)
        baselines = [self._baseline(window) for window in windows]
        for window in windows:
            if math.isfinite(window.entropy):
                self._sum += window.entropy
                self._count += 1
        if not windows:
            return []
        inputs = (
            torch.tensor([w.entropy for w in windows], dtype=torch.float32),
            torch.tensor(baselines, dtype=torch.float32),
            torch.tensor([w.tree for w in windows], dtype=torch.int64),
            torch.tensor(room, dtype=torch.int32),
            torch.tensor([w.key for w in windows], dtype=torch.int64),
            torch.tensor([w.turn for w in windows], dtype=torch.int32),
        )
        rule = {
            "policy": self.config.policy,
            "base": self.config.base,
            "weight": self.config.weight,
            "threshold": self.config.threshold,
            "width": self.config.branch_width,
            "seed": self.seed,
        }
        if self.config.policy == "aepo":
            streak = torch.tensor([w.streak for w in windows], dtype=torch.int32)
            rule |= {"penalty": self.config.penalty, "streak": streak}
        scores = ops.branch_scores(*inputs, **rule)[0].tolist()
        children = ops.branch_points(*inputs, **rule).tolist()
        return [
            Branch(score=score, room=room[window.tree], children=granted)
            for window, score, granted in zip(windows, scores, children, strict=True)
        ]

    def _baseline(self, window: Window) -> float:
        if self.config.baseline == "root":
            return window.root
        return self._sum / self._count if self._count else window.entropy


@functools.cache
def _warn_of_sign_rule(base: float) -> None:
    _log.warning(
        "rollout.base and rollout.threshold are both %s: a path forks whenever its entropy rose, "
        "whatever rollout.weight is",
        base,
    )
