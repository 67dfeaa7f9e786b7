"""The policy update: forward, fused statistics, loss (`objective`), backward, clip, AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from arpo_ext.config import TrainConfig
from arpo_ext.training.batch import PolicyBatch, Update, weightless_batch
from arpo_ext.training.forward import row_statistics
from arpo_ext.training.objective import objective
from arpo_ext.training.prepare import apply_gradients, backward_sum, until_synchronised


def policy_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    updates: Sequence[Update],
    config: TrainConfig,
    *,
    temperature: float,
    pad_token: int,
    reference: nn.Module | None = None,
) -> dict[str, float]:
    """Run the updates of one step. Returns the `train/*` metrics over all ranks; NaN where there was no token.

    Entropy and sampler gap are means over the trained tokens of rows with a non-zero advantage. The gap is taken in the
    first update, before any weight has moved. An update in which no rank has a row is skipped; if all are, the metrics
    are those of a few rows without advantage. reference: in evaluation mode; needed if `config.kl_coef` is above 0.
    """
    updates = [_filled_up(accelerator, update, pad_token) for update in updates]
    measure = partial(_with_logprobs, accelerator=accelerator, temperature=temperature)
    if config.old_logprob == "trainer" and len(updates) > 1:
        updates = [measure(update, "old_logprob", model) for update in updates]
    if reference is not None:
        updates = [measure(update, "ref_logprob", reference) for update in updates]
    records: list[list[dict[str, Tensor]]] = []
    norms: list[float] = []
    for update in updates:
        if not update.micro_batches:
            continue
        (normalizer,) = global_sum(accelerator, [update.normalizer])
        records.append([])
        for batch in until_synchronised(accelerator, model, update.micro_batches):
            loss, statistics = batch_loss(model, batch.to(accelerator.device), config, normalizer, temperature)
            backward_sum(accelerator, loss)
            records[-1].append(statistics)
        norms.append(apply_gradients(accelerator, model, optimizer, config.grad_clip))
    if not records:
        with torch.no_grad():
            measured = config.model_copy(update={"kl_coef": 0.0})
            _, statistics = batch_loss(model, updates[0].spare.to(accelerator.device), measured, 1.0, temperature)
        records, norms = [[statistics]], [0.0]
    return _metrics(accelerator, records, norms, referenced=reference is not None)


def batch_loss(
    model: nn.Module, batch: PolicyBatch, config: TrainConfig, normalizer: float, temperature: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics of one micro-batch, as `objective`."""
    logprob, entropy = row_statistics(model, batch, temperature)
    return objective(logprob, entropy, batch.columns, config, normalizer)


def global_sum(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Sum of each value over the ranks."""
    local = torch.tensor([values], dtype=torch.float64, device=accelerator.device)
    return accelerator.gather(local).sum(dim=0).tolist()


def global_max(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Largest of each value over the ranks."""
    local = torch.tensor([values], dtype=torch.float64, device=accelerator.device)
    return accelerator.gather(local).amax(dim=0).tolist()


def _filled_up(accelerator: Accelerator, update: Update, pad_token: int) -> Update:
    """The update with as many micro-batches as the rank with the most of them has."""
    count = int(global_max(accelerator, [len(update.micro_batches)])[0])
    padding = [weightless_batch(pad_token)] * (count - len(update.micro_batches))
    return replace(update, micro_batches=[*update.micro_batches, *padding])


def _with_logprobs(
    update: Update, column: str, model: nn.Module, *, accelerator: Accelerator, temperature: float
) -> Update:
    """The update with the column of its micro-batches filled by `model`."""

    @torch.no_grad()
    def filled(batch: PolicyBatch) -> PolicyBatch:
        logprob, _ = row_statistics(model, batch.to(accelerator.device), temperature)
        return replace(batch, columns=replace(batch.columns, **{column: logprob}))

    return replace(update, micro_batches=[filled(batch) for batch in update.micro_batches])


def _metrics(
    accelerator: Accelerator,
    records: Sequence[Sequence[dict[str, Tensor]]],
    norms: Sequence[float],
    *,
    referenced: bool,
) -> dict[str, float]:
    """The statistics of every batch of every update, over all ranks; those of the sampler are of the first update.

    train/sampler_kl_k1 to k3: mean estimates of KL(sampler || trainer) by token, see `objective`. train/sampler_ess:
    effective sample size of the importance weights, (sum w)^2 / sum w^2, as a share of the tokens.
    """
    everything = [statistics for record in records for statistics in record]
    counted = ("loss", "tokens", "entropy", "weight", "clipped", "clipped_high", "clipped_low", "ref_kl")
    of_first = ("gap", "gap_tokens", "kl_k1", "kl_k2", "kl_k3", "importance", "importance_squares")
    values = [_total(everything, name) for name in counted] + [_total(records[0], name) for name in of_first]
    loss, tokens, entropy, weight, *rest = global_sum(accelerator, values)
    weighted, (gap, gap_tokens, *kls, importance, squares) = rest[:4], rest[4:]
    clipped, high, low, ref_kl = (value / weight if weight else math.nan for value in weighted)
    maxima = [_largest(records[0], "gap_max"), _largest(everything, "log_ratio_max")]
    gap_max, log_ratio_max = global_max(accelerator, maxima)
    return {
        "train/loss": loss / len(records),
        "train/grad_norm": sum(norms) / len(norms),
        "train/clip_fraction": clipped,
        "train/clip_fraction_high": high,
        "train/clip_fraction_low": low,
        **({"train/ref_kl": ref_kl} if referenced else {}),
        "train/entropy": entropy / tokens if tokens else math.nan,
        "train/logprob_gap_mean": gap / gap_tokens if gap_tokens else math.nan,
        "train/logprob_gap_max": gap_max if gap_tokens else math.nan,
        **{f"train/sampler_kl_k{i}": kl / gap_tokens if gap_tokens else math.nan for i, kl in enumerate(kls, 1)},
        "train/sampler_ess": importance**2 / (squares * gap_tokens) if gap_tokens else math.nan,
        # Beyond e^700 a float overflows.
        "train/ratio_max": math.exp(min(log_ratio_max, 700.0)) if tokens else math.nan,
    }


def _total(statistics: Sequence[dict[str, Tensor]], name: str) -> float:
    return float(torch.stack([s[name] for s in statistics]).sum(dtype=torch.float64))


def _largest(statistics: Sequence[dict[str, Tensor]], name: str) -> float:
    return float(torch.stack([s[name] for s in statistics]).max())
