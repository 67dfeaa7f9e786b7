"""Exact entropies inside vLLM: a logits processor that changes nothing and notes what it sees.

It runs behind bias, masks and penalties and before the temperature in both of vLLM's model runners, so the logits are
those the token is drawn from but for the temperature, which `EntropyLog` applies. Pass it as "module:Class"
(`ENTROPY_PROCESSOR`). Never declare it as a `vllm.logits_processors` entry point: the V2 runner then refuses every
start in that environment that finds a V1 class there.

A request takes part through `SamplingParams.extra_args`, see `entropy_args`; or, where
`additional_config["entropy_jsonl"]` names a file, every request does and its entropies are written there
(`vllm_entropy_file`). With tensor parallelism every rank that sees gathered logits computes the same; the first one's
are read, and what follows from them is decided in the driver alone. Left out: speculative decoding on the V1 runner,
which takes no custom processors at all; sampling sharded over the batch, where no rank sees every row.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import get_pp_group, get_tp_group
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

from arpo_ext.rollout.entropy_log import EntropyLog
from arpo_ext.rollout.vllm_entropy_file import JSONL, LIMIT, EntropyFile

try:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2
except ImportError:
    # vLLM before 0.32 has one interface only.
    LogitsProcessorV2 = LogitsProcessor

ENTROPY_PROCESSOR = f"{__name__}:EntropyProcessor"
COLUMNS = "entropy_columns"
_ROW = "entropy_row"
_BASES = (LogitsProcessor,) if LogitsProcessorV2 is LogitsProcessor else (LogitsProcessor, LogitsProcessorV2)


def entropy_args(row: int, limit: int) -> dict[str, int]:
    """`extra_args` of a request: record its first `limit` entropies in row `row` of the log."""
    return {_ROW: row, LIMIT: limit}


class EntropyProcessor(*_BASES):
    """Serves V1 as (vllm_config, device, is_pin_memory) and V2 as (vllm_config, req_states).

    The log has a row per `max_num_seqs` and `additional_config["entropy_columns"]` columns (default: max_model_len).
    ValueError with batch-sharded sampling or where `entropy_jsonl` cannot be written.
    """

    def __init__(self, vllm_config: Any, device_or_states: Any, is_pin_memory: bool = False) -> None:
        self._states = None if isinstance(device_or_states, torch.device) else device_or_states
        self._device = device_or_states if self._states is None else device_or_states.device
        self._pin = is_pin_memory
        rows = vllm_config.scheduler_config.max_num_seqs
        columns = vllm_config.additional_config.get(COLUMNS, vllm_config.model_config.max_model_len)
        if vllm_config.parallel_config.enable_batch_sharded_sampling:
            raise ValueError(
                "enable_batch_sharded_sampling is on; expected it off, so that one rank sees every request"
            )
        self.log = EntropyLog(rows, columns, self._device)
        self.file = _open_file(vllm_config.additional_config.get(JSONL), self.log, self._states)
        # V1, by batch index: log row, limit, temperature, the request's growing list of output tokens.
        self._open: dict[int, tuple[int, int, float, list[int]]] = {}
        self._arrange()
        if self._states is not None:
            slots = self._states.max_num_reqs
            self._slots: list[tuple[int, int, float]] = [(0, 0, 1.0)] * slots
            self._staged = True
            self.apply_staged_writes()

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        args = sampling_params.extra_args or {}
        for name in (_ROW, LIMIT):
            if name in args and not (isinstance(args[name], int) and args[name] >= 0):
                raise ValueError(f"extra_args[{name!r}] is {args[name]!r}; expected a non-negative integer")
        if _ROW in args and LIMIT not in args:
            raise ValueError(f"extra_args has {_ROW!r} without {LIMIT!r}; expected both")

    def is_argmax_invariant(self) -> bool:
        """False, although it is: vLLM runs the invariant ones after the temperature and not for greedy batches."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: follow requests through the batch."""
        if batch_update is None:
            return
        tracked = self._open
        for index in batch_update.removed:
            tracked.pop(index, None)
        for index, params, _, output in batch_update.added:
            wanted = self._wanted(params, output=output)
            tracked.pop(index, None)
            if wanted is not None:
                tracked[index] = (*wanted, output)
        for source, target, direction in batch_update.moved:
            moved, replaced = tracked.pop(source, None), tracked.pop(target, None)
            if moved is not None:
                tracked[target] = moved
            if replaced is not None and direction is MoveDirectionality.SWAP:
                tracked[source] = replaced
        self._arrange()

    def _arrange(self) -> None:
        """The batch as lists by batch index, so that a token costs no look-ups. Rows not followed have limit 0."""
        size = max(self._open, default=-1) + 1
        entries = [self._open.get(index, (0, 0, 1.0, [])) for index in range(size)]
        self._starts = [row * self.log.columns for row, _, _, _ in entries]
        self._limits = [limit for _, limit, _, _ in entries]
        self._outputs = [output for _, _, _, output in entries]
        temperatures = [temperature for _, _, temperature, _ in entries]
        self._temperature = temperatures[0] if len(set(temperatures)) == 1 else temperatures

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: take a slot over. True although nothing is modified: else `apply` may be skipped."""
        wanted = self._wanted(sampling_params, slot=req_idx)
        self._slots[req_idx] = wanted or (0, 0, 1.0)
        self._staged = True
        return wanted is not None

    def apply_staged_writes(self) -> None:
        """V2: copy the slots to the device, once a step at most."""
        if self._staged:
            rows, limits, temperatures = zip(*self._slots, strict=True)
            self._row = torch.tensor(rows, dtype=torch.int64).to(self._device)
            self._limit = torch.tensor(limits, dtype=torch.int64).to(self._device)
            self._temperatures = torch.tensor(temperatures, dtype=torch.float32).to(self._device)
            self._staged = False

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Record, and return `logits` untouched."""
        if ctx is None:
            self._record_batch(logits)
        else:
            self._record_slots(logits, ctx)
        return logits

    def _record_batch(self, logits: torch.Tensor) -> None:
        """V1: row i of the logits is request i of the batch; its next token is output token len(output)."""
        discard = self.log.discard
        lengths = map(len, self._outputs)
        cells = [
            start + length if length < limit else discard
            for start, length, limit in zip(self._starts, lengths, self._limits, strict=True)
        ]
        cells += [discard] * (logits.shape[0] - len(cells))
        left_out = cells.count(discard)
        if left_out == len(cells):
            return
        mask = self._send([cell != discard for cell in cells], torch.bool) if left_out else None
        temperature = self._temperature
        if isinstance(temperature, list):
            padding = [1.0] * (len(cells) - len(temperature))
            temperature = self._send(temperature + padding, torch.float32)
        on_cpu = self._device.type == "cpu"
        self.log.record(logits, cells if on_cpu else self._send(cells, torch.int64), temperature, mask)

    def _record_slots(self, logits: torch.Tensor, ctx: Any) -> None:
        """V2: rows name their slot and position; a row at position p feeds the token p + 1 of its sequence."""
        slots = ctx.expanded_idx_mapping.long()
        column = ctx.pos.long() + 1 - self._states.prompt_len.gpu[slots].long()
        # Rows of a prompt chunk lie before the first output token.
        wanted = (column >= 0) & (column < self._limit[slots])
        cells = torch.where(wanted, self._row[slots] * self.log.columns + column, self.log.discard)
        self.log.record(logits, cells, self._temperatures[slots], wanted)

    def _wanted(self, params: Any, **place: Any) -> tuple[int, int, float] | None:
        """Row, limit and temperature of a request that takes part. Greedy sampling has temperature 0: measured at 1."""
        if self.file is not None:
            return self.file.place(params, **place)
        args = params.extra_args or {}
        # A row that the log does not have would end the engine, and anyone may ask a server for one.
        if args.get(_ROW, self.log.rows) >= self.log.rows:
            return None
        return args[_ROW], min(args[LIMIT], self.log.columns), params.temperature or 1.0

    def _send(self, values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, pin_memory=self._pin).to(self._device, non_blocking=True)


def _open_file(path: str | None, log: EntropyLog, states: Any) -> EntropyFile | None:
    """The JSONL file, on the one rank whose tokens are those of the server."""
    if path is None or get_tp_group().rank_in_group or not get_pp_group().is_last_rank:
        return None
    try:
        return EntropyFile(path, log, states)
    except OSError as error:
        raise ValueError(
            f"additional_config[{JSONL!r}] is {path!r}, got {error.strerror}; expected a file to write"
        ) from None
