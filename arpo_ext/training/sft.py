"""The cold start: next-token training on demonstrations, with tool results and prompts masked out of the loss.

What it leaves out: packing of several demonstrations into one row, evaluation, and resuming; it is meant for minutes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from arpo_ext.config import Config
from arpo_ext.data import Demo, draw_order
from arpo_ext.errors import DataError
from arpo_ext.tracking import Tracker
from arpo_ext.training.batch import Row, TokenBatch, token_batch
from arpo_ext.training.checkpoint import save_model
from arpo_ext.training.forward import token_statistics
from arpo_ext.training.prepare import apply_gradients, backward_sum, prepare, until_synchronised
from arpo_ext.training.schedule import set_learning_rate
from arpo_ext.training.step import global_sum

_SILENT_ROW = Row(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool))


def sft(config: Config, *, model: nn.Module, tokenizer: Any, demos: Sequence[Demo], tracker: Tracker) -> None:
    """Train `model` on `demos` and leave its folder in `config.output_dir / "model"`.

    Loss: mean of -log p over the trained tokens of the step's `batch_size` demonstrations. They are a random mixture,
    drawn epoch by epoch; only the micro-batches of one step are sorted by length. (Batches sorted over the whole set
    hold one kind of demonstration each, and the model swings from kind to kind.) `sft/tokens_per_s` counts padding.
    """
    settings = config.sft
    rows = encode_demos(demos, tokenizer, max_tokens=settings.max_tokens, vocab_size=model.config.vocab_size)
    accelerator, model, optimizer = prepare(model, settings)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    pad_token = tokenizer.pad_token_id or 0
    tracker.rewind(-1, kinds=("sft",))
    with tracker.progress(settings.steps, "sft steps", leave=True) as bar:
        for step in range(1, settings.steps + 1):
            started = time.perf_counter()
            lr = set_learning_rate(optimizer, step, settings)
            drawn = draw_order(len(rows), config.seed, (step - 1) * settings.batch_size, settings.batch_size)
            # Ranks must run equal numbers of micro-batches; a silent row has nothing to learn.
            chosen = [rows[i] for i in drawn] + [_SILENT_ROW] * (-len(drawn) % ranks)
            normalizer = sum(int(row.trained.sum()) for row in chosen)
            batches = token_batches(chosen[rank::ranks], settings.micro_batch_size, pad_token)
            loss = torch.zeros((), device=accelerator.device)
            for batch in until_synchronised(accelerator, model, batches):
                part = masked_loss(model, batch.to(accelerator.device)) / normalizer
                backward_sum(accelerator, part)
                loss += part.detach()
            apply_gradients(accelerator, model, optimizer, settings.grad_clip)
            total, padded = global_sum(accelerator, [float(loss), sum(batch.tokens.numel() for batch in batches)])
            speed = padded / (time.perf_counter() - started)
            tracker.log(step, "sft", {"sft/loss": total, "sft/lr": lr, "sft/tokens_per_s": speed})
            bar.set_postfix({"loss": f"{total:.3f}"}, refresh=False)
            bar.update()
    save_model(config.output_dir / "model", accelerator=accelerator, model=model, tokenizer=tokenizer)


def encode_demos(demos: Sequence[Demo], tokenizer: Any, *, max_tokens: int, vocab_size: int) -> list[Row]:
    """Each demonstration as one row. Texts get no token beyond their own, but special tokens in them count as such.

    DataError names the first demonstration (from 0) that is too long, holds an unknown token or teaches nothing.
    """
    texts = [segment.text for demo in demos for segment in demo.segments if segment.text is not None]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    rows = []
    for index, demo in enumerate(demos):
        pieces = [next(encoded) if s.tokens is None else s.tokens for s in demo.segments]
        tokens = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64)
        trained = torch.tensor([s.train for s, piece in zip(demo.segments, pieces, strict=True) for _ in piece])
        trained[:1] = False
        if len(tokens) > max_tokens:
            raise DataError(
                f"demonstration {index} has {len(tokens)} tokens; expected at most sft.max_tokens={max_tokens}"
            )
        if not bool(trained.any()):
            raise DataError(f"demonstration {index} has no token to learn after its first; expected at least one")
        if int(tokens.max()) >= vocab_size:
            raise DataError(
                f"demonstration {index} holds token {int(tokens.max())}; the model knows 0 to {vocab_size - 1}"
            )
        rows.append(Row(tokens, trained))
    if not rows:
        raise DataError("got no demonstrations; expected at least one")
    return rows


def token_batches(rows: Sequence[Row], size: int, pad_token: int) -> list[TokenBatch]:
    """Rows sorted by length and cut into micro-batches of `size`."""
    rows = sorted(rows, key=lambda row: len(row.tokens))
    return [token_batch(rows[i : i + size], pad_token) for i in range(0, len(rows), size)]


def masked_loss(model: nn.Module, batch: TokenBatch) -> torch.Tensor:
    """Sum of -log p over the trained tokens, 0-d."""
    logprob, _ = token_statistics(model, batch, temperature=1.0)
    return -logprob.sum()
