"""What the collector asks of a generation engine: submit token ids, step, receive probes and completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from arpo_ext.types import StopReason


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Continue `tokens` by at most `max_tokens` tokens.

    id: unique among unfinished requests. probe_tokens: leading tokens whose entropies are reported as a `Probe`.
    seed: of this request's draws, in [0, 2**63). greedy: take the most probable token. top_logprobs: of how many most
    probable tokens the log-probabilities are reported with each of the probed ones; slow.
    """

    id: int
    tokens: tuple[int, ...]
    max_tokens: int
    probe_tokens: int
    seed: int
    greedy: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class Probe:
    """The first `probe_tokens` entropies (nats) of a request that goes on sampling; top_logprobs as in `Completion`."""

    id: int
    entropies: tuple[float, ...]
    top_logprobs: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of a request. A request that ends within its first `probe_tokens` tokens sends no `Probe`.

    tokens: what was sampled, the token that stopped it included; never empty.
    logprobs: natural-log probability of each token under the distribution it was drawn from (greedy: temperature 1).
    entropies: of that distribution at the leading tokens, in nats; at least min(probe_tokens, len(tokens)) of them.
    top_logprobs: at the first min(probe_tokens, len(tokens)) tokens, where asked for: those of the most probable tokens
    and of the sampled one where it is not among them, in any order.
    cached_tokens: leading tokens of the request whose keys and values the engine had; None: not known.
    """

    id: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    stop_reason: StopReason
    top_logprobs: tuple[tuple[float, ...], ...] = ()
    cached_tokens: int | None = None


class Sampler(Protocol):
    """A generation engine that decodes many requests together.

    vocab_size: entries of a row of logits. max_model_len: longest sequence, prompt included.
    """

    vocab_size: int
    max_model_len: int

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and neither completed nor aborted."""

    def submit(self, request: SampleRequest) -> None: ...

    def step(self) -> Sequence[Probe | Completion]:
        """Decode one token of every running request; what became due, possibly nothing."""

    def abort(self, id: int) -> None:
        """Drop an unfinished request; unknown ids are ignored."""

    def push_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load weights under their checkpoint names and drop every cached prefix. SamplerError if requests are open."""

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes. SamplerError if requests are open or the engine refuses."""
