"""The rollouts of `_rollout_sim` for real: vLLM decodes, tools sleep, the wall clock counts.

A random model decides nothing, so lengths, calls and latencies are the workload's: each turn decodes exactly as many
tokens as it says and then counts as a call or as the end. The engine's steps are timed, so that the simulation of the
same trace can be given the speed that this run had.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from arpo_ext.config import EngineConfig, RolloutConfig
from arpo_ext.rollout import Completion, Probe, Sampler, SampleRequest, collect
from arpo_ext.tools.pool import ToolPool
from arpo_ext.types import Prompt, StopReason, ToolCall, ToolResult

from ._rollout_sim import Engine, Workload

PROMPT_TOKENS, RESULT_TOKENS, VOCAB = 64, 32, 2048
_RESULT, _FIRST_TURN, _FIRST_PATH = 1, 2, 34


@dataclass(frozen=True)
class Step:
    """One step of the engine: sequences it decoded a token of, how many of them were new, seconds."""

    sequences: int
    new: int
    seconds: float


def save_tiny_model(folder: Path, *, vocab: int, max_tokens: int, hidden: int = 64) -> None:
    """A random two-layer Qwen2 in float32 with a tokenizer of `vocab` words; without an end token it never stops."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=max_tokens,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


class PlayedRenderer:
    """Prompts and results are runs of tokens; a result ends in the path and the turn that it answers."""

    result_overhead = RESULT_TOKENS
    stop_token_ids: ClassVar[list[int]] = []
    stop_strings: ClassVar[list[str]] = []
    eos_token_ids: ClassVar[list[int]] = []
    tokenizer = None

    def __init__(self) -> None:
        self.calls: dict[tuple[int, ...], str] = {}

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        return [_FIRST_PATH + int(prompt.id)] * PROMPT_TOKENS

    def result_tokens(self, text: str, limit: int | None = None) -> list[int]:
        path, turn = map(int, text.split())
        return [_RESULT] * (RESULT_TOKENS - 2) + [_FIRST_PATH + path, _FIRST_TURN + turn]

    def parse_call(self, tokens: Sequence[int]) -> ToolCall:
        return ToolCall("search", self.calls[tuple(tokens)])

    def closing_name(self, tokens: Sequence[int]) -> str:
        return "search"

    def answer_text(self, tokens: Sequence[int]) -> str:
        return ""

    decode = answer_text


class PlayedSampler:
    """Decodes the workload's lengths on a real sampler and notes what every step took."""

    def __init__(self, engine: Sampler, renderer: PlayedRenderer, workload: Workload) -> None:
        self.vocab_size, self.max_model_len = engine.vocab_size, engine.max_model_len
        self.steps: list[Step] = []
        self._engine, self._renderer, self._workload = engine, renderer, workload
        self._open: dict[int, tuple[int, int]] = {}
        self._started: Counter[int] = Counter()
        self._submitted = 0

    @property
    def num_unfinished(self) -> int:
        return self._engine.num_unfinished

    def submit(self, request: SampleRequest) -> None:
        path, turn = self._place(request.tokens)
        self._open[request.id] = path, turn
        self._submitted += 1
        self._engine.submit(replace(request, max_tokens=self._workload.length(path, turn)))

    def _place(self, tokens: Sequence[int]) -> tuple[int, int]:
        if len(tokens) > PROMPT_TOKENS:
            return tokens[-2] - _FIRST_PATH, tokens[-1] - _FIRST_TURN + 1
        prompt = tokens[0] - _FIRST_PATH
        self._started[prompt] += 1
        return prompt * self._workload.paths + self._started[prompt] - 1, 0

    def step(self) -> list[Probe | Completion]:
        new, self._submitted = self._submitted, 0
        sequences = self._engine.num_unfinished
        started = time.perf_counter()
        events = self._engine.step()
        self.steps.append(Step(sequences, new, time.perf_counter() - started))
        return [self._ended(event) if isinstance(event, Completion) else event for event in events]

    def _ended(self, completion: Completion) -> Completion:
        path, turn = self._open.pop(completion.id)
        assert len(completion.tokens) == self._workload.length(path, turn)
        calls = turn < self._workload.turns
        if calls:
            assert completion.tokens not in self._renderer.calls
            self._renderer.calls[completion.tokens] = f"{path} {turn}"
        return replace(completion, stop_reason=StopReason.TOOL if calls else StopReason.EOS)

    def abort(self, id: int) -> None:
        self._engine.abort(id)

    def reset_prefix_cache(self) -> None:
        self._engine.reset_prefix_cache()


class SleepingTool:
    """Answers the call `path turn` after its latency, all calls at once if need be."""

    name, timeout_s = "search", 600.0

    def __init__(self, workload: Workload) -> None:
        self.workers = workload.all_paths
        self._workload = workload

    def start(self) -> None: ...

    def run(self, text: str) -> ToolResult:
        path, turn = map(int, text.split())
        time.sleep(self._workload.latency_s(path, turn))
        return ToolResult(self.name, text, ok=True)

    def close(self) -> None: ...


def rollout_config(workload: Workload) -> RolloutConfig:
    return RolloutConfig(
        paths=workload.paths,
        initial_paths=workload.paths,
        policy="chain",
        max_tool_calls=workload.turns,
        max_response_tokens=1 << 15,
        entropies="probe",
        deterministic=False,
    )


@contextmanager
def vllm_engine(workload: Workload, max_num_seqs: int = 512) -> Iterator[Sampler]:
    """A `VllmSampler` of a tiny random model that fits the workload's longest path."""
    from arpo_ext.rollout.vllm_sampler import VllmSampler

    longest = PROMPT_TOKENS + workload.turns * RESULT_TOKENS + (workload.turns + 1) * round(1.5 * workload.tokens) + 8
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model(Path(folder), vocab=VOCAB, max_tokens=longest)
        engine = EngineConfig(max_model_len=longest, max_num_seqs=max_num_seqs)
        sampler = VllmSampler(folder, engine, rollout_config(workload), PlayedRenderer(), seed=0)
        try:
            # The first requests pay for what the engine compiles and allocates.
            lock_step_s(sampler, replace(workload, turns=0, prompts=min(8, workload.prompts)))
            yield sampler
        finally:
            sampler.close()


def _prompts(workload: Workload) -> list[Prompt]:
    return [Prompt(str(p), ({"role": "user", "content": "?"},), ()) for p in range(workload.prompts)]


def collect_s(engine: Sampler, workload: Workload) -> tuple[float, list[Step]]:
    """Seconds on the wall clock that `collect` takes, and the steps it made."""
    renderer = PlayedRenderer()
    sampler = PlayedSampler(engine, renderer, workload)
    engine.reset_prefix_cache()
    with ToolPool([SleepingTool(workload)]) as tools:
        started = time.perf_counter()
        collected = collect(
            _prompts(workload),
            sampler=sampler,
            tools=tools,
            renderer=renderer,
            config=rollout_config(workload),
            seed=workload.seed,
        )
        seconds = time.perf_counter() - started
    assert sum(tree.counts["tool_calls"] for tree in collected.trees) == workload.all_paths * workload.turns
    return seconds, sampler.steps


def lock_step_s(engine: Sampler, workload: Workload) -> tuple[float, list[Step]]:
    """Seconds that rounds take: sample the turn of every path, then wait for every tool, then the next turn."""
    renderer = PlayedRenderer()
    sampler = PlayedSampler(engine, renderer, workload)
    engine.reset_prefix_cache()
    prompts = [prompt for prompt in _prompts(workload) for _ in range(workload.paths)]
    contexts = [tuple(renderer.prompt_tokens(prompt)) for prompt in prompts]
    ids = itertools.count()
    with ToolPool([SleepingTool(workload)]) as tools:
        started = time.perf_counter()
        for turn in range(workload.turns + 1):
            paths = {next(ids): path for path in range(len(contexts))}
            for id, path in paths.items():
                sampler.submit(SampleRequest(id, contexts[path], 1, 20, seed=id))
            answers = {}
            while sampler.num_unfinished:
                for event in sampler.step():
                    if isinstance(event, Completion):
                        path = paths[event.id]
                        contexts[path] = (*contexts[path], *event.tokens)
                        answers[path] = event.tokens
            if turn < workload.turns:
                futures = {path: tools.submit(renderer.parse_call(tokens)) for path, tokens in answers.items()}
                wait(futures.values())
                for path, future in futures.items():
                    contexts[path] = (*contexts[path], *renderer.result_tokens(future.result().text))
        seconds = time.perf_counter() - started
    return seconds, sampler.steps


def fitted_engine(steps: Sequence[Step], max_num_seqs: int = 512) -> Engine:
    """The cost of a step by least squares with no part below 0, scaled to the time that all steps took together."""
    columns = np.array([[1.0, step.sequences, step.new] for step in steps])
    seconds = np.array([step.seconds for step in steps])
    best, least = np.zeros(3), math.inf
    for used in (list(used) for count in (1, 2, 3) for used in itertools.combinations(range(3), count)):
        cost = np.zeros(3)
        cost[used] = np.linalg.lstsq(columns[:, used], seconds, rcond=None)[0]
        error = float(np.square(columns @ cost - seconds).sum())
        if error < least and (cost >= 0).all():
            best, least = cost, error
    best *= seconds.sum() / (columns @ best).sum()
    return Engine(*map(float, best), max_num_seqs)
