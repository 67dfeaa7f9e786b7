"""All statistics of rows of logits in one read, against the calls of torch and verl that give them one by one.

Counted bytes: the logits once. verl has no function for them all; its sum of squared probabilities
(`calculate_sum_pi_squared_from_logits`, what optimal baselines need) stands beside the others here as it does there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from arpo_ext import ops

from . import _harness, _peers
from ._harness import Case, Options, Provider
from ._logits import compiled, exact, logits_shapes, made_logits, plain

_TOLERANCE = 5e-5
_PLAIN_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}


def one_by_one(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """logprob, entropy, logsumexp, sum of p^2, arg-max and its logprob, each from the logits."""
    logprob, entropy = plain(logits, labels)
    log_z = torch.logsumexp(logits, -1)
    top = logits.max(-1)
    return logprob, entropy, log_z, torch.softmax(logits, -1).square().sum(-1), top.indices, top.values - log_z


def _exact(logits: Tensor, labels: Tensor) -> list[Tensor]:
    logprob, entropy = exact(logits, labels)
    parts = [one_by_one(x.double(), y)[2:] for x, y in zip(logits.split(8), labels.split(8), strict=True)]
    return [logprob, entropy, *(torch.cat(part) for part in zip(*parts, strict=True))]


def _error(expected: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], float]:
    """Of the sum of squares relative to it; an arg-max that differs counts as 1 (equal logits may make it differ)."""

    def error(result: Sequence[Tensor]) -> float:
        logprob, entropy, log_z, squares, arg_max, top = result
        errors = [
            (got.double() - want).abs().max()
            for got, want in zip((logprob, entropy, log_z, top), (*expected[:3], expected[5]), strict=True)
        ]
        errors.append((squares.double() / expected[3] - 1).abs().max())
        errors.append((arg_max != expected[4]).any())
        return max(map(float, errors))

    return error


def _providers(logits: Tensor, labels: Tensor, dtype: str, options: Options) -> list[Provider]:
    def ours(backend: str) -> Callable[[], Callable[[], Any]]:
        return lambda: lambda: ops.logits_stats(logits, labels, backend=backend)

    def verl() -> Callable[[], Any]:
        logprob_entropy, squares = _peers.verl_eager(), _peers.verl_sum_of_squares()

        def call() -> tuple[Tensor, ...]:
            log_z, top = torch.logsumexp(logits, -1), logits.max(-1)
            return *logprob_entropy(logits, labels), log_z, squares(logits), top.indices, top.values - log_z

        return call

    tolerance = _PLAIN_TOLERANCE[dtype]
    providers = [Provider("arpo-ext", ours("auto"))]
    if options.device.startswith("cpu") and len(logits) in (4, 256):
        providers += [Provider(f"arpo-ext {name}", ours(name)) for name in ("cpu-avx512", "cpu-avx2", "cpu-portable")]
    providers.append(Provider("torch eager", lambda: lambda: one_by_one(logits, labels), tolerance))
    if not options.smoke:
        providers.append(Provider("torch.compile", lambda: compiled(one_by_one, logits, labels), tolerance))
    return [*providers, Provider("verl", verl, tolerance)]


def cases(options: Options) -> Iterator[Case]:
    for rows, vocab, dtypes in logits_shapes(options.device, options.smoke):
        for dtype in dtypes[:2] if rows in (4, 64, 256, 8192) else ():
            logits, labels = made_logits(rows, vocab, dtype, options.device)
            # In the 16-bit dtypes equal logits are common: the arg-max of torch is then any of them.
            if dtype != "float32":
                logits[torch.arange(rows), labels] = 18
            yield Case(
                {"op": "logits_stats", "N": rows, "V": vocab, "dtype": dtype},
                logits.numel() * logits.element_size(),
                _providers(logits, labels, dtype, options),
                _error(_exact(logits, labels)),
                _TOLERANCE,
            )


def main(argv: Sequence[str] | None = None) -> int:
    return _harness.main(argv, ("logits_stats",))


if __name__ == "__main__":
    raise SystemExit(main())
