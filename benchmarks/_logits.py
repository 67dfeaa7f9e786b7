"""Inputs, the plain formula and the exact one, for the benchmarks whose ops read logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _peers

QWEN_VOCAB = 151_936
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def plain(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The formula trainers use: entropy as logsumexp minus the mean logit, logprob as a gather."""
    log_z = torch.logsumexp(logits, -1)
    entropy = log_z - (torch.softmax(logits, -1) * logits).sum(-1)
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - log_z, entropy


def exact(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, a few rows at a time."""
    parts = [plain(x.double(), y) for x, y in zip(logits.split(8), labels.split(8), strict=True)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def difference(result: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest over all elements; a result of fewer parts is compared in those."""
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(result, expected, strict=False))


def compiled(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """`torch.compile` for these very shapes: what an earlier case compiled for others is dropped."""
    torch._dynamo.reset()
    fast = torch.compile(function)
    # The first call compiles; the second meets what the first one cached.
    fast(*args)
    fast(*args)
    return lambda: fast(*args)


def made_logits(rows: int, vocab: int, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    """Normal logits of deviation 3, and a label for each row."""
    generator = torch.Generator(device).manual_seed(rows)
    logits = torch.empty(rows, vocab, dtype=DTYPES[dtype], device=device)
    for part in logits.split(256):
        part.copy_(3 * torch.randn(part.shape, generator=generator, device=device))
    return logits, torch.randint(vocab, (rows,), generator=generator, device=device)


def logits_shapes(device: str, smoke: bool) -> list[tuple[int, int, tuple[str, ...]]]:
    """(N, V, dtypes): a decode step to a training batch; on a GPU over the vocabularies of Llama, Qwen and Gemma."""
    if smoke:
        return [(4, 1009, tuple(DTYPES))]
    if device == "cpu":
        every = ("float32", "bfloat16", "float16")
        return [(n, QWEN_VOCAB, every if n == 256 else every[:2]) for n in (1, 8, 64, 256, 512)]
    shapes = []
    for rows in (1, 64, 512, 4096, 8192):
        for vocab in (32_000, 128_256, QWEN_VOCAB, 262_144):
            shapes.append((rows, vocab, ("bfloat16", "float32") if vocab == QWEN_VOCAB else ("bfloat16",)))
    return shapes


# Peers by name: (adapter, where it runs). On a GPU TRL's public function dispatches to its Triton kernel.
PEERS: dict[str, tuple[Callable[[], _peers.LogprobEntropy], str]] = {
    "TRL eager": (_peers.trl_eager, "cpu"),
    "TRL Triton": (_peers.trl_triton, "cuda"),
    "verl eager": (_peers.verl_eager, "any"),
    "verl chunked": (_peers.verl_chunked, "any"),
}


def peers_on(device: str) -> dict[str, Callable[[], _peers.LogprobEntropy]]:
    kind = device.partition(":")[0]
    return {name: make for name, (make, where) in PEERS.items() if where in ("any", kind)}
