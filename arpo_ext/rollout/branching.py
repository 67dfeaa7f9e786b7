"""Where a path forks while it is sampled: windows of entropies in, decisions out.

The rule itself is `ops.branch_points`; this file says what it is asked. A window is the first k entropies after a tool
result (ARPO Eq. 3 to 5), normalised, against the baseline of its path; the policy `reference` takes windows and
baselines as ARPO's published code does (vllm_rollout_with_tools.py). Policies that wait for complete paths are in
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
from arpo_ext.errors import SamplerError
from arpo_ext.rollout.sampler import Completion, Probe
from arpo_ext.types import Branch

_log = logging.getLogger(__name__)

# (position of the prompt, *lineage) -> first window ever measured of a path there.
Baselines = dict[tuple[int, ...], float]

# Log-probabilities that the published code asks for at every token.
_TOP_LOGPROBS = 10


@dataclass(frozen=True, slots=True)
class Window:
    """A path that asks. tree: position of its prompt. entropy: normalised; root: that of the path's first window.

    streak: how many of its last decisions in a row wished for children.
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
    sum(H) / V, the paper's Eq. 4. baselines: what `reference` with `stale_baseline` remembers. The published code never
    empties its dictionary, whose keys count the rollouts of a batch, so whoever wants its behaviour passes the same one
    to every call; None: a new one, as in its first batch. Forks have their lineage for a key here, not the order in
    which they happened to start.

    top_logprobs: how many of them the sampler has to report. decides_on_results: a path asks when its tool result is
    there, with the last window it has; else when the window after the result is complete. forgets_baseline: a fork does
    not inherit that of its path.
    """

    def __init__(self, config: RolloutConfig, vocab_size: int, seed: int, baselines: Baselines | None = None) -> None:
        self.config = config
        faults = config.reference if config.policy == "reference" else None
        self.top_logprobs = _TOP_LOGPROBS if faults and faults.top_logprobs_sum else 0
        self.decides_on_results = bool(faults and faults.window_before_call)
        self.forgets_baseline = bool(faults and faults.own_baseline)
        self._baselines = ({} if baselines is None else baselines) if faults and faults.stale_baseline else None
        self.vocab_size = vocab_size
        self.seed = seed
        # As the op rounds it.
        self._threshold = torch.tensor(config.threshold, dtype=torch.float32).item()
        self._sum = 0.0
        self._count = 0
        if config.policy == "paper" and config.base == config.threshold:
            _warn_of_sign_rule(config.base)

    def measure(self, event: Probe | Completion) -> float:
        """The one number of the window that begins a turn. SamplerError if `top_logprobs` were asked for in vain."""
        if not self.top_logprobs:
            return self.normalize(event.entropies[: self.config.probe_tokens])
        window = event.top_logprobs[: self.config.probe_tokens]
        if not window:
            raise SamplerError(f"the sampler reported no logprobs beside the sampled ones; expected {_TOP_LOGPROBS}")
        terms = (-math.exp(p) * p for token in window for p in token if p > -math.inf)
        return sum(terms) / max(math.log(self.vocab_size), 1e-9)

    def root(self, tree: int, lineage: tuple[int, ...], window: float) -> float:
        """Baseline of a path that has none yet and whose window this is."""
        return window if self._baselines is None else self._baselines.setdefault((tree, *lineage), window)

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
        # The published code flips its coin anew for each sibling.
        coins = self.config.branch_width if self.config.policy == "reference" else 1
        asked = [pair for pair in zip(windows, baselines, strict=True) for _ in range(coins)]
        keys = [path_key((w.key, coin)) if coin else w.key for w in windows for coin in range(coins)]
        scores, children = self._points(asked, keys, room, self.config.branch_width // coins)
        return [
            Branch(
                score=max(scores[first : first + coins]),
                room=room[window.tree],
                children=sum(children[first : first + coins]),
            )
            for first, window in zip(range(0, len(asked), coins), windows, strict=True)
        ]

    def streak(self, before: int, branch: Branch | None) -> int:
        """Decisions in a row that wished for children, given how many came before this one.

        Whether there was room for them does not count: room depends on the other paths and on what ended first.
        """
        return before + 1 if branch is not None and branch.score > self._threshold else 0

    def _points(
        self, asked: Sequence[tuple[Window, float]], keys: Sequence[int], room: Sequence[int], width: int
    ) -> tuple[list[float], list[int]]:
        """Scores and granted children of windows beside their baselines."""
        windows = [window for window, _ in asked]
        inputs = (
            torch.tensor([w.entropy for w in windows], dtype=torch.float32),
            torch.tensor([baseline for _, baseline in asked], dtype=torch.float32),
            torch.tensor([w.tree for w in windows], dtype=torch.int64),
            torch.tensor(room, dtype=torch.int32),
            torch.tensor(keys, dtype=torch.int64),
            torch.tensor([w.turn for w in windows], dtype=torch.int32),
        )
        rule = {
            "policy": self.config.policy,
            "base": self.config.base,
            "weight": self.config.weight,
            "threshold": self.config.threshold,
            "width": width,
            "seed": self.seed,
        }
        if self.config.policy == "aepo":
            streak = torch.tensor([w.streak for w in windows], dtype=torch.int32)
            rule |= {"penalty": self.config.penalty, "streak": streak}
        return ops.branch_scores(*inputs, **rule)[0].tolist(), ops.branch_points(*inputs, **rule).tolist()

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
