"""logprob and entropy of rows of logits against eager and compiled torch, TRL, verl and Liger.

Counted bytes: the logits once for the forward pass; for forward and backward the logits twice and the gradient once,
also where the gradient takes the logits' place. What torch.compile, TRL and verl pay for the pages of fresh temporaries
is part of their time, as it is in a trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arpo_ext import ops

from . import _harness, _peers
from ._harness import Case, Options, Provider
from ._logits import QWEN_VOCAB, compiled, difference, exact, logits_shapes, made_logits, peers_on, plain

# Ours computes in float32 whatever the dtype; the plain formula rounds every step to the dtype of the logits.
_TOLERANCE = 5e-5
_PLAIN_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
# The gradient is rounded to the dtype of the logits once, at magnitudes up to 1; by the plain formula at every step.
_GRADIENT_TOLERANCE = {"float32": 5e-5, "bfloat16": 8e-3, "float16": 1e-3}
_PLAIN_GRADIENT_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2, "float16": 0.03}
_CHECKED_ROWS = 4


class _Handed(torch.autograd.Function):
    """Logits in a given buffer as if some op had computed them: a leaf's memory must not be written."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, buffer: Tensor) -> Tensor:
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _our_backends(device: str, rows: int) -> list[str]:
    if not device.startswith("cpu"):
        return ["triton"]
    return ["cpu-avx512", "cpu-avx2", "cpu-portable"] if rows in (4, 256) else []


def _compiles(logits: Tensor, options: Options) -> bool:
    """At one vocabulary only: on a GPU compiling for each shape would take longer than all the rest."""
    return not options.smoke and logits.shape[1] == QWEN_VOCAB


def _forward_providers(logits: Tensor, labels: Tensor, dtype: str, options: Options) -> list[Provider]:
    def ours(backend: str) -> Callable[[], Callable[[], Any]]:
        return lambda: lambda: ops.logprob_entropy(logits, labels, backend=backend)

    def peer(make: Callable[[], Callable[..., Any]]) -> Callable[[], Callable[[], Any]]:
        def prepared() -> Callable[[], Any]:
            call = make()
            return lambda: call(logits, labels)

        return prepared

    def liger() -> Callable[[], Any]:
        call = _peers.liger_logprob_triton()
        padded = torch.cat([logits, logits[:1]]).unsqueeze(0)  # its last position is not scored
        return lambda: (call(padded, labels.unsqueeze(0))[0],)

    tolerance = _PLAIN_TOLERANCE[dtype]
    providers = [Provider("arpo-ext", ours("auto"))]
    providers += [Provider(f"arpo-ext {name}", ours(name)) for name in _our_backends(options.device, len(logits))]
    providers.append(Provider("torch eager", lambda: lambda: plain(logits, labels), tolerance))
    if _compiles(logits, options) or (options.smoke and dtype == "float32"):
        providers.append(Provider("torch.compile", lambda: compiled(plain, logits, labels), tolerance))
    providers += [Provider(name, peer(make), tolerance) for name, make in peers_on(options.device).items()]
    if options.device.startswith("cuda"):
        providers.append(Provider("Liger Triton, no entropy", liger, tolerance))
    return providers


def _gradient(results: Sequence[Tensor], of: Tensor, keep: bool = False) -> tuple[Tensor, ...]:
    """Of the sum of all results; the gradients given are memory of their own, which some peers insist on."""
    return torch.autograd.grad(results, of, [torch.ones_like(r) for r in results], retain_graph=keep)


def _backward_providers(logits: Tensor, labels: Tensor, dtype: str, options: Options) -> list[Provider]:
    """The backward pass alone, over and over."""
    leaf = logits.detach().requires_grad_()

    def alone(function: Callable[..., Any]) -> Callable[[], Any]:
        results = function(leaf, labels)
        return lambda: _gradient(results, leaf, keep=True)

    def peer(make: Callable[[], Callable[..., Any]]) -> Callable[[], Callable[[], Any]]:
        return lambda: alone(make())

    tolerance = _PLAIN_GRADIENT_TOLERANCE[dtype]
    return [
        Provider("arpo-ext", lambda: alone(ops.logprob_entropy)),
        Provider("arpo-ext triton", lambda: alone(partial(ops.logprob_entropy, backend="triton"))),
        *(Provider(name, peer(make), tolerance) for name, make in peers_on(options.device).items()),
    ]


def _gradient_providers(logits: Tensor, labels: Tensor, dtype: str, options: Options) -> list[Provider]:
    leaf = logits.detach().requires_grad_()

    def gradient(function: Callable[..., Any], of: Tensor = leaf) -> tuple[Tensor, ...]:
        return _gradient(function(of, labels), of)

    def ours(backend: str) -> Callable[[], Callable[[], Any]]:
        return lambda: lambda: gradient(lambda x, y: ops.logprob_entropy(x, y, backend=backend))

    def in_place() -> Callable[[], Any]:
        buffer = logits.clone()  # holds the gradient after the first call, and is as good to time the next ones
        source = torch.zeros((), requires_grad=True)
        return lambda: gradient(
            lambda x, y: ops.logprob_entropy(x, y, inplace_backward=True), _Handed.apply(source, buffer)
        )

    def peer(make: Callable[[], Callable[..., Any]]) -> Callable[[], Callable[[], Any]]:
        def prepared() -> Callable[[], Any]:
            call = make()
            return lambda: gradient(call)

        return prepared

    def make_compiled() -> Callable[[], Any]:
        torch._dynamo.reset()
        call = torch.compile(plain)
        gradient(call)
        return lambda: gradient(call)

    tolerance = _PLAIN_GRADIENT_TOLERANCE[dtype]
    providers = [Provider("arpo-ext", ours("auto")), Provider("arpo-ext in place", in_place)]
    if options.device.startswith("cuda"):
        providers.append(Provider("arpo-ext triton", ours("triton")))
    providers.append(Provider("torch eager", lambda: lambda: gradient(plain), tolerance))
    if _compiles(logits, options):
        providers.append(Provider("torch.compile", make_compiled, tolerance))
    return providers + [Provider(name, peer(make), tolerance) for name, make in peers_on(options.device).items()]


def _cases_of(logits: Tensor, labels: Tensor, dtype: str, options: Options) -> Iterator[Case]:
    columns = {"op": "logprob_entropy", "N": len(logits), "V": logits.shape[1], "dtype": dtype}
    logit_bytes = logits.numel() * logits.element_size()
    expected = exact(logits, labels)
    yield Case(
        {**columns, "pass": "forward"},
        logit_bytes,
        _forward_providers(logits, labels, dtype, options),
        lambda result: difference(result, expected),
        _TOLERANCE,
    )
    few = logits[:_CHECKED_ROWS].double().requires_grad_()
    gradient = torch.autograd.grad(sum(part.sum() for part in plain(few, labels[:_CHECKED_ROWS])), few)

    def gradient_case(which: str, passes: int, providers: list[Provider]) -> Case:
        return Case(
            {**columns, "pass": which},
            passes * logit_bytes,
            providers,
            lambda result: difference([result[0][:_CHECKED_ROWS]], gradient),
            _GRADIENT_TOLERANCE[dtype],
            limit="copy",
        )

    yield gradient_case("forward+backward", 3, _gradient_providers(logits, labels, dtype, options))
    if options.device.startswith("cuda"):
        yield gradient_case("backward", 2, _backward_providers(logits, labels, dtype, options))


def cases(options: Options) -> Iterator[Case]:
    for rows, vocab, dtypes in logits_shapes(options.device, options.smoke):
        for dtype in dtypes:
            yield from _cases_of(*made_logits(rows, vocab, dtype, options.device), dtype, options)


def main(argv: Sequence[str] | None = None) -> int:
    return _harness.main(argv, ("logprob_entropy",))


if __name__ == "__main__":
    raise SystemExit(main())
