"""Entropies of a vLLM server's requests in a JSONL file: what the entropy processor does when it runs alone.

One line per finished or aborted request, appended when the engine lets go of it:
`{"request", "prompt_tokens", "completion_tokens", "temperature", "entropies"}`. `request` is the engine's id, which
begins with the id of the response. `entropies` are in nats, at the sampling temperature, one per completion token, at
most `entropy_limit` of them. A stop string is found outside the engine: such a request counts the tokens that the
engine had sampled when it was told.

A request is followed by what the scheduler tells every worker, because neither interface of the logits processors
says when a request ends or what it is called.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.v1.worker.worker_base import WorkerWrapperBase

from arpo_ext.rollout.entropy_log import EntropyLog

JSONL = "entropy_jsonl"
LIMIT = "entropy_limit"

# A name below vLLM's, whose handlers are set up in every process of the server.
_logger = init_logger("vllm.arpo_ext")


@dataclass
class _Followed:
    """One request. row: of the log, None while preempted. before: entropies recorded until then."""

    id: str
    params: Any
    prompt_tokens: int
    limit: int
    row: int | None
    slot: int = -1
    output: Sequence[int] = ()
    before: tuple[float, ...] = ()

    @property
    def temperature(self) -> float:
        return self.params.temperature or 1.0


class EntropyFile:
    """Gives requests rows of `log` while they run and writes their entropies when they end.

    states: slots of the V2 runner; None for V1. OSError if `path` cannot be appended to.
    """

    def __init__(self, path: str | Path, log: EntropyLog, states: Any = None) -> None:
        self._log, self._states = log, states
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._free = list(range(log.rows))
        self._followed: dict[str, _Followed] = {}
        # Parameters are what a processor is handed of a request. V1 keeps the first, V2 resumes with a copy.
        self._by_params: dict[int, _Followed] = {}
        _tell_processors_what_is_scheduled()

    def place(self, params: Any, *, slot: int = -1, output: Sequence[int] = ()) -> tuple[int, int, float] | None:
        """Row, limit and temperature of a request that enters the batch; V2 names its slot, V1 its output tokens."""
        request = self._by_params.get(id(params))
        if request is None:
            return None
        request.slot, request.output = slot, output
        if request.row is None and not self._free:
            return None
        if request.row is None:
            request.row = self._free.pop()
            if request.before:
                # What an earlier request left there would pass for this one's.
                self._log.clear(request.row)
        return request.row, request.limit, request.temperature

    def schedule(self, step: Any) -> None:
        """Take note of a step that is about to run; `step` is vLLM's SchedulerOutput."""
        for id in step.finished_req_ids:
            self._write(id)
        for id in step.preempted_req_ids or ():
            request = self._followed.get(id)
            if request is not None and request.row is not None:
                request.before, request.output = self._recorded(request), self._output(request)
                request.slot = -1
                self._free.append(request.row)
                request.row = None
        for new in step.scheduled_new_reqs:
            if new.sampling_params is not None:
                self._follow(new)

    def _follow(self, new: Any) -> None:
        request = self._followed.get(new.req_id)
        if request is not None:
            self._by_params.pop(id(request.params), None)
        if id(new.sampling_params) in self._by_params:
            # Several samples of one prompt share them where the engine runs in this process.
            new.sampling_params = copy(new.sampling_params)
        params = new.sampling_params
        if request is None:
            limit = min((params.extra_args or {}).get(LIMIT, self._log.columns), self._log.columns)
            request = _Followed(new.req_id, params, new.prompt_len, limit, row=None)
            self._followed[new.req_id] = request
        request.params = params
        self._by_params[id(params)] = request

    def _recorded(self, request: _Followed) -> tuple[float, ...]:
        """What the log and an earlier row hold of a request, NaN where it has nothing."""
        if request.row is None:
            return request.before
        (values,) = self._log.read([request.row], [request.limit])
        before = request.before or (math.nan,) * request.limit
        return tuple(old if math.isnan(new) else new for new, old in zip(values, before, strict=True))

    def _write(self, finished: str) -> None:
        request = self._followed.pop(finished, None)
        if request is None:
            return
        self._by_params.pop(id(request.params), None)
        count = _accepted(self._output(request), request.params)
        entropies = self._recorded(request)[:count]
        if request.row is not None:
            self._free.append(request.row)
        line = {
            "request": request.id,
            "prompt_tokens": request.prompt_tokens,
            "completion_tokens": count,
            "temperature": request.temperature,
            "entropies": [None if math.isnan(entropy) else float(f"{entropy:.8g}") for entropy in entropies],
        }
        try:
            # One call: other engines of the same server append to the same file.
            os.write(self._file, (json.dumps(line) + "\n").encode())
        except OSError as error:
            _logger.error("entropies of request %s are lost: %s", request.id, error.strerror)

    def _output(self, request: _Followed) -> Sequence[int]:
        if self._states is None or request.slot < 0:
            return request.output
        total = int(self._states.total_len.gpu[request.slot])
        return self._states.all_token_ids.gpu[request.slot, request.prompt_tokens : total].tolist()


def _accepted(tokens: Sequence[int], params: Any) -> int:
    """How many sampled tokens the scheduler kept: asynchronous scheduling samples one more after the last."""
    tokens = tokens[: params.max_tokens]
    stops = {params.eos_token_id, *(params.stop_token_ids or ())}
    return next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))


def _tell_processors_what_is_scheduled() -> None:
    """Make every worker of this process show each step to its entropy processors before it runs it. Idempotent."""
    run = WorkerWrapperBase.execute_model
    if getattr(run, "shows_steps", False):
        return

    def execute_model(wrapper: Any, scheduler_output: Any) -> Any:
        for processor in processors_of(wrapper.worker.model_runner):
            file = getattr(processor, "file", None)
            if file is not None:
                file.schedule(scheduler_output)
        return run(wrapper, scheduler_output)

    execute_model.shows_steps = True
    WorkerWrapperBase.execute_model = execute_model


def processors_of(runner: Any) -> list[Any]:
    """Logits processors of a V1 or V2 model runner."""
    if hasattr(runner, "input_batch"):
        return list(runner.input_batch.logitsprocs.all)
    return list(runner.sampler.logits_processors)
