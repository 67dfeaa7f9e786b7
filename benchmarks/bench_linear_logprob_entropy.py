"""logprob and entropy from hidden states and the output head, against TRL, verl, Liger, plain torch and bare products.

Floors: the matrix products that no form can avoid, on preallocated memory. Forward: hidden @ weight.T. Forward and
backward without keeping the logits: that product twice, d_logits @ weight and d_logits.T @ hidden. FLOPs are theirs.
Counted bytes: the operands of each of these products and the gradients once. The cases with `passes=once` show how the
memory above the inputs grows with N; they are too long to be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from arpo_ext import ops

from . import _harness, _peers
from ._harness import Case, Options, Provider
from ._logits import DTYPES, QWEN_VOCAB, plain

# Largest error of logprob, entropy and of gradients of order 1. Forms that multiply with torch round the logits to the
# dtype of the operands; all but TRL and ours round the entropies too.
_TOLERANCE = {"float32": 2e-4, "bfloat16": 0.1}
_PEER_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
_PEERS: dict[str, tuple[Callable[[], _peers.LinearLogprobEntropy], str]] = {
    "TRL chunked": (_peers.trl_linear, "any"),
    "verl FusedLinearForPPO": (_peers.verl_linear, "any"),
    "verl Triton": (_peers.verl_linear_triton, "cuda"),
    "Liger fallback": (_peers.liger_linear, "any"),
}
# Those whose memory does not grow with all the logits: the only ones for large N on a CPU.
_LEAN = ("arpo-ext", "TRL chunked")
_CHECKED_TOKENS, _CHECKED_COLUMNS = 32, 64

Linear = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return plain((hidden @ weight.T).float(), labels)


def made_inputs(tokens: int, width: int, vocab: int, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of deviation 1 and a head that turns them into logits of deviation 3."""
    generator = torch.Generator(device).manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator, device=device)
    weight = torch.randn(vocab, width, generator=generator, device=device).mul_(3 / width**0.5)
    labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
    return hidden.to(DTYPES[dtype]), weight.to(DTYPES[dtype]), labels


def upstream(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of logprob and entropy, of either sign and order 1."""
    steps = torch.arange(len(labels), device=labels.device)
    return torch.cos(steps.float()), torch.sin(steps.float())


class Exact:
    """The op in float64: results and gradient of hidden for some tokens; if for all, some rows of weight's gradient."""

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, all_tokens: bool) -> None:
        count = len(hidden) if all_tokens else min(_CHECKED_TOKENS, len(hidden))
        self.columns = torch.cat([labels[:8], torch.arange(_CHECKED_COLUMNS, device=labels.device)])
        self.all_tokens = all_tokens
        wide = weight.double()
        results, hidden_grads = [], []
        self.weight_grad = torch.zeros(len(self.columns), hidden.shape[1], dtype=torch.float64, device=hidden.device)
        grads = [part.double() for part in upstream(labels)]
        for start in range(0, count, 32):
            rows = slice(start, min(start + 32, count))
            x = hidden[rows].double()
            logits = (x @ wide.T).requires_grad_()
            parts = plain(logits, labels[rows])
            (d_logits,) = torch.autograd.grad(parts, logits, [g[rows] for g in grads])
            results.append([part.detach() for part in parts])
            hidden_grads.append(d_logits @ wide)
            self.weight_grad += d_logits[:, self.columns].T @ x
        self.results = [torch.cat(part) for part in zip(*results, strict=True)]
        self.hidden_grad = torch.cat(hidden_grads)

    def error(self, result: Sequence[Tensor]) -> float:
        """result: logprob, entropy and, if there, the gradients of hidden and weight."""
        count = len(self.hidden_grad)
        pairs = [(got[:count], want) for got, want in zip(result[:2], self.results, strict=True)]
        if len(result) > 2:
            pairs.append((result[2][:count], self.hidden_grad))
            if self.all_tokens:
                pairs.append((result[3][self.columns], self.weight_grad))
        return max(float((got.double() - want).abs().max()) for got, want in pairs)


def _bare_products(hidden: Tensor, weight: Tensor, backward: bool) -> Callable[[], Callable[[], Any]]:
    def make() -> Callable[[], Any]:
        logits = hidden.new_empty(len(hidden), len(weight))
        if not backward:
            return lambda: torch.mm(hidden, weight.T, out=logits)
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)

        def call() -> None:
            for _ in range(2):
                torch.mm(hidden, weight.T, out=logits)
            torch.mm(logits, weight, out=hidden_grad)
            torch.mm(logits.T, hidden, out=weight_grad)

        return call

    return make


def _providers(inputs: Sequence[Tensor], backward: bool, options: Options, lean: bool) -> list[Provider]:
    hidden, weight, labels = inputs
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    grads = upstream(labels)

    def call(function: Linear) -> Callable[[], Any]:
        def both() -> tuple[Tensor, ...]:
            results = function(*leaves, labels)
            given = [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]
            gradients = torch.autograd.grad(results, leaves, given)
            return (*(part.detach() for part in results), *gradients)

        return both if backward else lambda: function(hidden, weight, labels)

    def peer(make: Callable[[], Linear]) -> Callable[[], Callable[[], Any]]:
        return lambda: call(make())

    def ours(backend: str) -> Callable[[], Callable[[], Any]]:
        return lambda: call(lambda *args: ops.linear_logprob_entropy(*args, backend=backend))

    kind = options.device.partition(":")[0]
    providers = [Provider("arpo-ext", ours("auto"))]
    if kind == "cuda":
        providers.append(Provider("arpo-ext triton", ours("triton")))
    tolerance = _PEER_TOLERANCE[str(hidden.dtype).removeprefix("torch.")]
    for name, (make, where) in _PEERS.items():
        if where in ("any", kind):
            providers.append(Provider(name, peer(make), tolerance))
    if lean:
        return [provider for provider in providers if provider.name in _LEAN]
    providers.append(Provider("torch eager", lambda: call(naive), tolerance))
    floor = "four products" if backward else "bare product"
    return [*providers, Provider(floor, _bare_products(hidden, weight, backward), floor=True)]


def _case(inputs: Sequence[Tensor], dtype: str, backward: bool, options: Options, once: bool = False) -> Case:
    hidden, weight, _ = inputs
    tokens, width, vocab = len(hidden), hidden.shape[1], len(weight)
    columns = {"op": "linear_logprob_entropy", "N": tokens, "D": width, "V": vocab, "dtype": dtype}
    columns["pass"] = "forward+backward" if backward else "forward"
    operands = (hidden.numel() + weight.numel()) * hidden.element_size()
    return Case(
        columns | ({"passes": "once"} if once else {}),
        operands * (4 if backward else 1),
        _providers(inputs, backward, options, lean=once),
        Exact(*inputs, all_tokens=backward and not once).error,
        _TOLERANCE[dtype],
        flops=2 * tokens * width * vocab * (4 if backward else 1),
        once=once,
    )


def _shapes(options: Options) -> list[tuple[int, int, int, str]]:
    if options.smoke:
        return [(64, 128, 2050, "float32")]
    if options.device.startswith("cpu"):
        return [(256, 1024, QWEN_VOCAB, "float32")]
    return [
        (4096, 4096, 131_072, "bfloat16"),
        (8192, 4096, QWEN_VOCAB, "bfloat16"),
        (2048, 2048, 128_256, "bfloat16"),
        (64, 4096, QWEN_VOCAB, "bfloat16"),
    ]


def cases(options: Options) -> Iterator[Case]:
    for tokens, width, vocab, dtype in _shapes(options):
        inputs = made_inputs(tokens, width, vocab, dtype, options.device)
        for backward in (False, True):
            yield _case(inputs, dtype, backward, options)
        if options.device.startswith("cpu"):
            for times in (2,) if options.smoke else (4, 16):
                more = made_inputs(times * tokens, width, 1, dtype, "cpu")[0]
                labels = torch.randint(vocab, (times * tokens,), generator=torch.Generator().manual_seed(times))
                yield _case((more, inputs[1], labels), dtype, True, options, once=True)


def main(argv: Sequence[str] | None = None) -> int:
    return _harness.main(argv, ("linear_logprob_entropy",))


if __name__ == "__main__":
    raise SystemExit(main())
