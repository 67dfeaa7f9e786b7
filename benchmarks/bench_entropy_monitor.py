"""What the entropy processor takes of vLLM's decoding steps: its own time inside them, and `logprobs=10` beside it.

    python -m benchmarks.bench_entropy_monitor [--smoke] [--json FILE]

A tiny random model on vLLM in this process, every token of every sequence measured. Counted are steps that decode one
token of all sequences, on the clock of the process, so that neither threads nor the machine's other work hide anything.
Entropies are checked against the definition before anything is timed: a step's own logprobs, full vocabulary.

`share` is the time inside the processor over that of its step, the median over steps; `all` is the processor and the
reading of what it noted over the whole run. `logprobs=10` is the step with ten logprobs a token over that without.

Left out: the GPU, where the processor is kernels in the stream of the step (not yet measured).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

SHAPES = ((512, 16), (512, 64), (512, 128), (151_936, 16))


@dataclass
class Clock:
    """Process seconds inside the processor and in reading its log."""

    inside: float = 0.0
    reading: float = 0.0


@dataclass
class Row:
    """vocab: V. share: medians over `steps`; step_ms: of a step without ten logprobs."""

    vocab: int
    sequences: int
    steps: int = 0
    step_ms: float = 0.0
    share: float = 0.0
    all: float = 0.0
    logprobs_10: float = 0.0
    shares: list[float] = field(default_factory=list, repr=False)


def _save_model(folder: Path, vocab: int) -> Any:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return model


@contextmanager
def _clocked() -> Iterator[Clock]:
    from arpo_ext.rollout.vllm_entropy import EntropyProcessor
    from arpo_ext.rollout.vllm_worker import WorkerExtension

    clock = Clock()

    def timed(function: Callable[..., Any], counter: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **options)
            finally:
                setattr(clock, counter, getattr(clock, counter) + time.process_time() - started)

        return call

    def clocked(owner: type, name: str, counter: str) -> Any:
        return mock.patch.object(owner, name, timed(getattr(owner, name), counter))

    with (
        clocked(EntropyProcessor, "apply", "inside"),
        clocked(EntropyProcessor, "update_state", "inside"),
        clocked(WorkerExtension, "arpo_read_entropies", "reading"),
    ):
        yield clock


def _steps(sampler: Any, clock: Clock, sequences: int, tokens: int, seed: int, top: int) -> tuple[list[Any], list[Any]]:
    """[(process seconds, seconds inside)] of the steps in which all decode, and the completions."""
    from arpo_ext.rollout import Completion, SampleRequest

    for i in range(sequences):
        sampler.submit(SampleRequest(i, tuple(range(1, 33)), tokens, tokens, seed * sequences + i, top_logprobs=top))
    steps, done = [], []
    while sampler.num_unfinished:
        inside, started = clock.inside, time.process_time()
        events = sampler.step()
        steps.append((time.process_time() - started, clock.inside - inside))
        done += [event for event in events if isinstance(event, Completion)]
    # The first computes the prompts, the last reports everything.
    return steps[2:-1], done


def _check(model: Any, completion: Any, prompt: Sequence[int]) -> None:
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion.tokens]])).logits[0, len(prompt) - 1 : -1].double()
    logprob = torch.log_softmax(logits, -1)
    expected = -(logprob.exp() * logprob).sum(-1)
    torch.testing.assert_close(torch.tensor(completion.entropies).double(), expected, atol=1e-4, rtol=1e-4)


def measure(vocab: int, sequences: int, *, tokens: int, rounds: int) -> Row:
    """One model; ways take turns, round by round."""
    from arpo_ext.config import EngineConfig, RolloutConfig
    from arpo_ext.rollout.vllm_sampler import VllmSampler

    row, plain, ten, total, monitoring = Row(vocab, sequences), [], [], 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder, _clocked() as clock:
        model = _save_model(Path(folder), vocab)
        engine = EngineConfig(max_model_len=256, max_num_seqs=sequences, threads=1)
        rollout = RolloutConfig(probe_tokens=tokens, max_response_tokens=tokens)
        # Nothing ends a sequence before its last token.
        endless = SimpleNamespace(stop_token_ids=[], stop_strings=[], eos_token_ids=[], tokenizer=None)
        sampler = VllmSampler(folder, engine, rollout, endless, seed=0)
        try:
            _, done = _steps(sampler, clock, sequences, 8, 0, 0)
            _check(model, done[0], range(1, 33))
            for number in range(1, rounds + 1):
                before, started = clock.inside + clock.reading, time.process_time()
                steps, _ = _steps(sampler, clock, sequences, tokens, number, 0)
                total += time.process_time() - started
                monitoring += clock.inside + clock.reading - before
                plain += steps
                ten += _steps(sampler, clock, sequences, tokens, number, 10)[0]
        finally:
            sampler.close()
    row.shares = [inside / step for step, inside in plain]
    row.steps, row.share, row.all = len(plain), median(row.shares), monitoring / total
    row.step_ms = 1e3 * median(step for step, _ in plain)
    row.logprobs_10 = 1e3 * median(step for step, _ in ten) / row.step_ms
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_entropy_monitor", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--smoke", action="store_true", help="one small shape, a few steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args(argv)
    shapes, tokens, rounds = ((64, 4),) if options.smoke else SHAPES, 16 if options.smoke else 64, options.rounds
    print(f"{'V':>8}{'sequences':>11}{'steps':>7}{'step ms':>9}{'share':>8}{'all':>8}{'logprobs=10':>13}")
    table = []
    for vocab, sequences in shapes:
        row = measure(vocab, sequences, tokens=tokens, rounds=1 if options.smoke else rounds)
        print(f"{vocab:>8,}{sequences:>11}{row.steps:>7}{row.step_ms:>9.2f}", end="")
        print(f"{row.share:>8.2%}{row.all:>8.2%}{row.logprobs_10:>12.2f}x")
        table.append({name: value for name, value in asdict(row).items() if name != "shares"})
    if options.json:
        Path(options.json).write_text(json.dumps({"tokens": tokens, "rounds": rounds, "rows": table}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
