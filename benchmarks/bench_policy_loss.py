"""The policy loss, forward and backward with its metrics, against verl's, TRL's and eager and compiled torch.

Counted bytes: logprob, old_logprob, advantage and weight read once, the gradient written once: 20 bytes a token. Each
provider's metrics end where its trainer wants them: verl's and TRL's as Python numbers, one read of the device each;
ours as tensors that nobody waited for. TRL's loss gets no dual clip (its `delta` bounds both signs of the advantage; no
ratio here reaches it) and reports the entropy, clip fractions and their extremes over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from arpo_ext import ops

from . import _harness, _peers
from ._harness import Case, Options, Provider

_LOW, _HIGH, _DUAL = 0.2, 0.28, 3.0


def masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    return (value * mask).sum() / mask.sum()


def eager(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Dual-clip PPO with a token mean and its three metrics, one elementwise op after the other."""
    log_ratio = torch.clamp(logprob - old_logprob, min=-20.0, max=20.0)
    ratio = torch.exp(log_ratio)
    kl = masked_mean(-log_ratio, mask)
    plain = -advantage * ratio
    clipped = -advantage * torch.clamp(ratio, 1 - _LOW, 1 + _HIGH)
    worse = torch.maximum(plain, clipped)
    clip_fraction = masked_mean(torch.gt(clipped, plain).float(), mask)
    bounded = torch.min(-advantage * _DUAL, worse)
    dual_fraction = masked_mean(torch.gt(worse, bounded) * (advantage < 0).float(), mask)
    loss = masked_mean(torch.where(advantage < 0, bounded, worse), mask)
    return loss, [kl, clip_fraction, dual_fraction]


def made_tokens(rows: int, positions: int, device: str) -> tuple[Tensor, ...]:
    """logprob, old_logprob, one advantage a row, and a mask with a quarter of the tokens left out; each [B, T]."""
    generator = torch.Generator().manual_seed(rows)
    old_logprob = -torch.randn(rows, positions, generator=generator).abs()
    logprob = old_logprob + 0.2 * torch.randn(rows, positions, generator=generator)
    advantage = torch.randn(rows, 1, generator=generator).repeat(1, positions)
    mask = (torch.rand(rows, positions, generator=generator) > 0.25).float()
    return tuple(tensor.to(device) for tensor in (logprob, old_logprob, advantage, mask))


def _providers(tokens: Sequence[Tensor], smoke: bool) -> list[Provider]:
    logprob, old_logprob, advantage, mask = tokens
    leaf = logprob.clone().requires_grad_()

    def of_trainers(function: Callable[..., tuple[Tensor, list[Tensor]]]) -> Callable[[], Any]:
        def call() -> tuple[Tensor, Tensor, list[float]]:
            loss, metrics = function(leaf, old_logprob, advantage, mask)
            return loss.detach(), torch.autograd.grad(loss, leaf)[0], [metric.item() for metric in metrics]

        call()
        return call

    def of_peer(loss: Callable[..., Any], *more: Tensor) -> Callable[[], Any]:
        def call() -> tuple[Tensor, Tensor]:
            result = loss(leaf, old_logprob, advantage, mask, *more)
            value = result[0] if isinstance(result, tuple) else result
            return value.detach(), torch.autograd.grad(value, leaf)[0]

        return call

    def verl() -> Callable[[], Any]:
        return of_peer(_peers.verl_policy_loss(_LOW, _HIGH, _DUAL))

    def trl() -> Callable[[], Any]:
        return of_peer(_peers.trl_policy_loss(_LOW, _HIGH, None), torch.rand_like(old_logprob))

    flat = [tensor.flatten() for tensor in tokens]
    flat_leaf = flat[0].clone().requires_grad_()
    normalizer = mask.sum()
    rule = {"clip_low": _LOW, "clip_high": _HIGH, "clip": "dual", "dual_clip": _DUAL}

    def ours(backend: str) -> Callable[[], Callable[[], Any]]:
        def call() -> tuple[Tensor, Tensor, Any]:
            loss, sums = ops.policy_loss(flat_leaf, *flat[1:], normalizer=normalizer, backend=backend, **rule)
            return loss.detach(), torch.autograd.grad(loss, flat_leaf)[0], sums

        return lambda: call

    providers = [Provider("arpo-ext", ours("auto"))]
    if tokens[0].device.type == "cuda":
        providers.append(Provider("arpo-ext triton", ours("triton")))
    else:
        providers += [Provider(f"arpo-ext {name}", ours(name)) for name in ("cpu-avx2", "cpu-portable")]
    providers.append(Provider("arpo-ext reference", ours("reference")))
    providers.append(Provider("torch eager", lambda: of_trainers(eager)))
    if not smoke:
        providers.append(Provider("torch.compile", lambda: of_trainers(torch.compile(eager))))
    return [*providers, Provider("verl", verl), Provider("TRL", trl)]


def _error(tokens: Sequence[Tensor]) -> Callable[[Any], float]:
    """Error of the loss and of the gradient of its unnormalised sum, where no ratio sits on a bound of the clip."""
    exact = [tensor.double() for tensor in tokens]
    leaf = exact[0].clone().requires_grad_()
    loss = eager(leaf, *exact[1:])[0]
    (gradient,) = torch.autograd.grad(loss, leaf)
    ratio = (exact[0] - exact[1]).exp()
    sure = torch.stack([(ratio - bound).abs() > 1e-5 for bound in (1 - _LOW, 1 + _HIGH, _DUAL)]).all(dim=0)
    scale = exact[3].sum()

    def error(result: Any) -> float:
        difference = (result[1].reshape(gradient.shape) - gradient)[sure].abs().max() * scale
        return max(float((result[0] - loss.detach()).abs()), float(difference))

    return error


def cases(options: Options) -> Iterator[Case]:
    shapes = [(4, 100)] if options.smoke else [(4, 1024), (64, 4096), (256, 8192)]
    for rows, positions in shapes:
        tokens = made_tokens(rows, positions, options.device)
        yield Case(
            {"op": "policy_loss", "B": rows, "T": positions, "pass": "forward+backward"},
            20 * rows * positions,
            _providers(tokens, options.smoke),
            _error(tokens),
            1e-4,
            limit="copy",
        )


def main(argv: Sequence[str] | None = None) -> int:
    return _harness.main(argv, ("policy_loss",))


if __name__ == "__main__":
    raise SystemExit(main())
