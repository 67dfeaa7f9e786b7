"""The sampler on vLLM's engine: one `step` takes one token of every open request.

Left out here: where the engine runs (`vllm_engine`), entropies (`vllm_entropy`), which requests to make (`collect`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from arpo_ext.config import EngineConfig, RolloutConfig
from arpo_ext.errors import ConfigError, SamplerError
from arpo_ext.render import Renderer
from arpo_ext.rollout.sampler import Completion, Probe, SampleRequest
from arpo_ext.types import StopReason

# Before vllm itself, for which it sets the environment.
from arpo_ext.rollout.vllm_engine import Engine  # isort: skip

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from arpo_ext.rollout.vllm_entropy import entropy_args


@dataclass
class _Running:
    request: SampleRequest
    row: int
    cached_tokens: int | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[float, ...]] = field(default_factory=list)


class VllmSampler:
    """`Sampler` over vLLM.

    model_path: Hugging Face folder, sampled in the dtype it is stored in. renderer: says where a call ends. seed: of
    the engine; each request brings its own, so draws do not depend on what is decoded beside them.

    An engine in this process reseeds torch, numpy and random when it starts, as vLLM does. ConfigError on a
    `logit_bias` that names no single token or lies outside [-100, 100]. EngineError from any call once the engine's
    own process is gone; `close` works then, and another sampler can be made.
    """

    def __init__(
        self, model_path: str | Path, engine: EngineConfig, rollout: RolloutConfig, renderer: Renderer, seed: int
    ) -> None:
        self.max_model_len = engine.max_model_len
        self._rollout = rollout
        self._columns = min(
            engine.max_model_len,
            max(rollout.probe_tokens, rollout.max_response_tokens if rollout.entropies == "all" else 0),
        )
        self._tool_stops = {*renderer.stop_token_ids, *renderer.stop_strings}
        bias = _bias_by_token(rollout.logit_bias, renderer)
        self._engine = Engine(model_path, engine, columns=self._columns, seed=seed, deterministic=rollout.deterministic)
        self.vocab_size: int = self._engine.model_config.get_vocab_size()
        # A tokenizer may know tokens beyond the model's vocabulary: never sampled, and refused by vLLM.
        stops = [*renderer.stop_token_ids, *renderer.eos_token_ids]
        self._params = {
            "stop_token_ids": [token for token in stops if token < self.vocab_size],
            "stop": renderer.stop_strings,
            "include_stop_str_in_output": True,
            # Only stop strings need the text; the tokens are all that is kept.
            "detokenize": bool(renderer.stop_strings),
            "skip_special_tokens": False,
            "logit_bias": bias or None,
            "output_kind": RequestOutputKind.DELTA,
        }
        # The engine never holds more requests than it decodes at once, so the row of the entropy log that a request
        # writes to is its alone until it is read.
        self._rows = list(range(engine.max_num_seqs))
        self._queue: deque[SampleRequest] = deque()
        self._running: dict[str, _Running] = {}

    @property
    def num_unfinished(self) -> int:
        return len(self._queue) + len(self._running)

    def submit(self, request: SampleRequest) -> None:
        """ValueError if the request does not fit `max_model_len`."""
        if request.max_tokens < 1 or len(request.tokens) + request.max_tokens > self.max_model_len:
            raise ValueError(
                f"request {request.id} has {len(request.tokens)} tokens and asks for {request.max_tokens} more; "
                f"expected at least 1 and {self.max_model_len} (engine.max_model_len) together"
            )
        self._queue.append(request)

    def step(self) -> list[Probe | Completion]:
        while self._queue and self._rows:
            self._start(self._queue.popleft())
        finished: list[tuple[_Running, StopReason]] = []
        probed: list[_Running] = []
        for output in self._engine.step():
            running = self._running.get(output.request_id)
            if running is None:
                continue
            (delta,) = output.outputs
            running.cached_tokens = output.num_cached_tokens
            measured = len(running.tokens)
            running.tokens += delta.token_ids
            running.logprobs += [e[t].logprob for t, e in zip(delta.token_ids, delta.logprobs, strict=True)]
            if running.request.top_logprobs:
                left = running.request.probe_tokens - len(running.top_logprobs)
                running.top_logprobs += [tuple(e.logprob for e in entry.values()) for entry in delta.logprobs[:left]]
            if output.finished:
                finished.append((running, self._stop_reason(delta)))
            elif measured < running.request.probe_tokens <= len(running.tokens):
                probed.append(running)
        return self._report(probed, finished)

    def abort(self, id: int) -> None:
        self._queue = deque(request for request in self._queue if request.id != id)
        running = self._running.pop(str(id), None)
        if running is not None:
            self._engine.abort(str(id))
            self._rows.append(running.row)

    def push_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load weights under their checkpoint names, then forget every cached prefix."""
        self._require_idle("weights cannot be pushed")
        self._engine.load_weights(weights)
        self.reset_prefix_cache()

    def reset_prefix_cache(self) -> None:
        self._require_idle("the prefix cache cannot be reset")
        # Without this the first tokens come from the old weights' keys and values.
        self._engine.reset_prefix_cache()

    def close(self) -> None:
        """Stop the engine; the sampler cannot be used afterwards."""
        self._engine.close()

    def _start(self, request: SampleRequest) -> None:
        running = _Running(request, self._rows.pop())
        limit = self._columns if self._rollout.entropies == "all" else min(request.probe_tokens, self._columns)
        params = SamplingParams(
            temperature=0.0 if request.greedy else self._rollout.temperature,
            seed=request.seed,
            max_tokens=request.max_tokens,
            logprobs=request.top_logprobs,
            extra_args=entropy_args(running.row, limit),
            **self._params,
        )
        self._running[str(request.id)] = running
        self._engine.add(str(request.id), request.tokens, params)

    def _report(self, probed: list[_Running], finished: list[tuple[_Running, StopReason]]) -> list[Probe | Completion]:
        """Events with their entropies, read in one copy; the rows of finished requests become free."""
        counts = [r.request.probe_tokens for r in probed]
        for running, _ in finished:
            recorded = self._columns if self._rollout.entropies == "all" else running.request.probe_tokens
            counts.append(min(len(running.tokens), recorded))
        rows = [r.row for r in probed] + [r.row for r, _ in finished]
        if not rows:
            return []
        entropies = [tuple(e) for e in self._engine.call_workers("arpo_read_entropies", rows, counts)]
        events: list[Probe | Completion] = [
            Probe(r.request.id, e, tuple(r.top_logprobs)) for r, e in zip(probed, entropies[: len(probed)], strict=True)
        ]
        for (running, reason), entropy in zip(finished, entropies[len(probed) :], strict=True):
            del self._running[str(running.request.id)]
            self._rows.append(running.row)
            tokens, logprobs = tuple(running.tokens), tuple(running.logprobs)
            top, cached = tuple(running.top_logprobs), running.cached_tokens
            events.append(Completion(running.request.id, tokens, logprobs, entropy, reason, top, cached))
        return events

    def _stop_reason(self, output: Any) -> StopReason:
        if output.finish_reason == "length":
            return StopReason.LENGTH
        if output.finish_reason != "stop":
            raise SamplerError(f"vLLM ended a request with {output.finish_reason!r}; expected 'stop' or 'length'")
        return StopReason.TOOL if output.stop_reason in self._tool_stops else StopReason.EOS

    def _require_idle(self, refused: str) -> None:
        if self.num_unfinished:
            raise SamplerError(f"{refused} with {self.num_unfinished} unfinished requests; expected none")


def _bias_by_token(bias: dict[str, float], renderer: Renderer) -> dict[int, float]:
    by_token = {}
    for text, value in bias.items():
        ids = renderer.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ConfigError(f"rollout.logit_bias names {text!r}, which is {len(ids)} tokens; expected exactly one")
        if not -100 <= value <= 100:
            raise ConfigError(f"rollout.logit_bias of {text!r} is {value}; expected -100 to 100")
        by_token[ids[0]] = value
    return by_token
