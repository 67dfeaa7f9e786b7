"""What it costs to know entropies while vLLM decodes: none, ours, and `logprobs=10`; with and without prefix cache.

One engine and one rollout for all: sequences that sample, read a result, sample on. Every request can be told to be
measured or not, to report ten logprobs or not, and to read the prefix cache or not, so all six ways take turns,
rollout by rollout, on the same weights and memory. What is compared are steps that decode a token of every sequence,
on the clock of the process; and the seconds and prompt tokens of whole rollouts, where the prefix cache shows.

Every way asks for the sampled token's own logprob, which a trainer needs. Left out: the processor's part of a step by
itself; in the way without entropies it is loaded and finds nothing to do.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from arpo_ext.config import EngineConfig

from ._rollout_real import save_tiny_model

MONITORS = ("none", "entropy", "logprobs=10")
BLOCK = 32


@dataclass(frozen=True)
class Shape:
    """turns: samples of each sequence, with a result of `result` tokens between them. vocab: V of the model."""

    sequences: int = 16
    prompt: int = 128
    turns: int = 3
    tokens: int = 32
    result: int = 64
    vocab: int = 151_936

    @property
    def max_tokens(self) -> int:
        return self.prompt + self.turns * self.tokens + (self.turns - 1) * self.result


@dataclass
class Measured:
    """Of one way, over its rounds. step_s: process time of steps in which all sequences decode; computed: prompt
    tokens that were not in the cache; run_s: process time of a rollout.
    """

    step_s: list[float] = field(default_factory=list)
    run_s: list[float] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)


@contextmanager
def engine(shape: Shape) -> Iterator[Any]:
    """An `Engine` in this process, where its clock sees all work, one step at a time."""
    from arpo_ext.rollout.vllm_engine import Engine

    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model(Path(folder), vocab=shape.vocab, max_tokens=shape.max_tokens)
        config = EngineConfig(max_model_len=shape.max_tokens, max_num_seqs=shape.sequences, block_size=BLOCK)
        core = Engine(folder, config, columns=shape.tokens, seed=0, deterministic=True)
        try:
            yield core
        finally:
            core.close()


def measure(core: Any, shape: Shape, rounds: int) -> dict[tuple[str, bool], Measured]:
    """{(monitor, prefix cache): measured}; a round plays every way once, in rotating order, from an empty cache."""
    ways = list(itertools.product(MONITORS, (True, False)))
    measured = {way: Measured() for way in ways}
    for number in range(rounds + 1):
        for way in (*ways[number % len(ways) :], *ways[: number % len(ways)]):
            core.reset_prefix_cache()
            result = _play(core, shape, *way, seed=number)
            if number:  # the first round warms up
                measured[way].step_s += result.step_s
                measured[way].run_s += result.run_s
                measured[way].computed += result.computed
    return measured


def _play(core: Any, shape: Shape, monitor: str, cache: bool, seed: int) -> Measured:
    contexts = [[2 + sequence % 4] * shape.prompt for sequence in range(shape.sequences)]
    result = Measured(computed=[0])
    started = time.process_time()
    for turn in range(shape.turns):
        for sequence, context in enumerate(contexts):
            if turn:
                context += [1] * shape.result
            params = _params(shape, monitor, cache, row=sequence, seed=seed * shape.sequences + sequence)
            core.add(str(sequence), context, params)
        begun: set[str] = set()
        running = shape.sequences
        while running:
            before = time.process_time()
            outputs = core.step()
            seconds = time.process_time() - before
            new = [output for output in outputs if output.request_id not in begun]
            begun.update(output.request_id for output in new)
            result.computed[0] += sum(len(o.prompt_token_ids) - (o.num_cached_tokens or 0) for o in new)
            if len(outputs) == shape.sequences and not new:
                result.step_s.append(seconds)
            running -= sum(output.finished for output in outputs)
            for output in outputs:
                contexts[int(output.request_id)] += output.outputs[0].token_ids
    result.run_s.append(time.process_time() - started)
    return result


def _params(shape: Shape, monitor: str, cache: bool, row: int, seed: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from arpo_ext.rollout.vllm_entropy import entropy_args

    return SamplingParams(
        temperature=1.0,
        seed=seed,
        max_tokens=shape.tokens,
        ignore_eos=True,
        logprobs=10 if monitor == "logprobs=10" else 0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_reading_prefix_cache=not cache,
        extra_args=entropy_args(row, shape.tokens) if monitor == "entropy" else None,
    )


def rows(measured: dict[tuple[str, bool], Measured]) -> list[dict[str, Any]]:
    """One row a way; `of_none` is the share of the step without entropies, same use of the cache."""
    table = []
    for (monitor, cache), result in measured.items():
        step_s = median(result.step_s)
        table.append(
            {
                "monitor": monitor,
                "prefix_cache": cache,
                "steps": len(result.step_s),
                "step_ms": 1e3 * step_s,
                "of_none": step_s / median(measured["none", cache].step_s),
                "rollout_s": median(result.run_s),
                "prompt_tokens": median(result.computed),
            }
        )
    return table
