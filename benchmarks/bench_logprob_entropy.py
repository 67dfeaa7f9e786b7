"""logprob and entropy of rows of logits against eager and compiled torch.

Counted bytes: the logits once for the forward pass; for forward and backward the logits twice and the gradient once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from arpo_ext import ops

from . import _harness
from ._harness import Case, Options, Provider

_QWEN_VOCAB = 151_936
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Ours computes in float32 whatever the dtype; torch's formula rounds every step to the dtype of the logits.
_TOLERANCE = 5e-5
_TORCH_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


def plain(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The formula trainers use: entropy as logsumexp minus the mean logit, logprob as a gather."""
    log_z = torch.logsumexp(logits, -1)
    entropy = log_z - (torch.softmax(logits, -1) * logits).sum(-1)
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - log_z, entropy


def _exact(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, a few rows at a time."""
    parts = [plain(x.double(), y) for x, y in zip(logits.split(8), labels.split(8), strict=True)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _difference(result: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(result, expected, strict=True))


def _compiled(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    compiled = torch.compile(function)
    # The first call compiles; the second meets what the first one cached.
    compiled(*args)
    compiled(*args)
    return lambda: compiled(*args)


def _forward_providers(logits: Tensor, labels: Tensor, dtype: str, device: str, smoke: bool) -> list[Provider]:
    def ours(backend: str) -> Callable[[], Callable[[], Any]]:
        return lambda: lambda: ops.logprob_entropy(logits, labels, backend=backend)

    tolerance = _TORCH_TOLERANCE[dtype]
    providers = [Provider("arpo-ext", ours("auto"))]
    if device == "cpu":
        providers += [Provider(f"arpo-ext {name}", ours(name)) for name in ("cpu-avx512", "cpu-avx2", "cpu-portable")]
    providers.append(Provider("torch eager", lambda: lambda: plain(logits, labels), tolerance))
    if not smoke or dtype == "float32":
        providers.append(Provider("torch.compile", lambda: _compiled(plain, logits, labels), tolerance))
    return providers


def _gradient_providers(logits: Tensor, labels: Tensor, smoke: bool) -> list[Provider]:
    leaf = logits.detach().requires_grad_()

    def gradient(function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor]:
        logprob, entropy = function(leaf, labels)
        return torch.autograd.grad(logprob.sum() + entropy.sum(), leaf)

    compiled = torch.compile(plain)

    def make_compiled() -> Callable[[], Any]:
        gradient(compiled)
        return lambda: gradient(compiled)

    providers = [
        Provider("arpo-ext", lambda: lambda: gradient(ops.logprob_entropy)),
        Provider("torch eager", lambda: lambda: gradient(plain)),
    ]
    return providers if smoke else [*providers, Provider("torch.compile", make_compiled)]


def cases(options: Options) -> Iterator[Case]:
    shapes = [(4, 1009)] if options.smoke else [(256, _QWEN_VOCAB), (8, _QWEN_VOCAB), (1, _QWEN_VOCAB)]
    for rows, vocab in shapes:
        for dtype in _DTYPES:
            generator = torch.Generator().manual_seed(rows)
            logits = (3 * torch.randn(rows, vocab, generator=generator)).to(_DTYPES[dtype]).to(options.device)
            labels = torch.randint(vocab, (rows,), generator=generator).to(options.device)
            columns = {"op": "logprob_entropy", "N": rows, "V": vocab, "dtype": dtype}
            logit_bytes = logits.numel() * logits.element_size()
            expected = _exact(logits, labels)
            yield Case(
                {**columns, "pass": "forward"},
                logit_bytes,
                _forward_providers(logits, labels, dtype, options.device, options.smoke),
                lambda result, expected=expected: _difference(result, expected),
                _TOLERANCE,
            )
            if dtype == "float32" and rows != 8:
                exact_leaf = logits[:4].double().requires_grad_()
                total = sum(part.sum() for part in plain(exact_leaf, labels[:4]))
                gradient = torch.autograd.grad(total, exact_leaf)
                yield Case(
                    {**columns, "pass": "forward+backward"},
                    3 * logit_bytes,
                    _gradient_providers(logits, labels, options.smoke),
                    lambda result, gradient=gradient: _difference([result[0][:4]], gradient),
                    _TOLERANCE,
                )


def main(argv: Sequence[str] | None = None) -> int:
    return _harness.main(argv, ("logprob_entropy",))


if __name__ == "__main__":
    raise SystemExit(main())
