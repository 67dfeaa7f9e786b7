"""What the ops must reach beside their peers and limits, each bar with the rows of a recorded run that decide it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_V = 151_936


@dataclass(frozen=True)
class Bar:
    """The worst `field` of the provider's rows that agree with any of `cases`: at least `least`, or at most `most`."""

    claim: str
    cases: tuple[Mapping[str, Any], ...]
    field: str
    provider: str = "arpo-ext"
    least: float | None = None
    most: float | None = None
    unit: str = ""

    def measured(self, rows: Iterable[Mapping[str, Any]]) -> float | None:
        """None unless every case was measured."""
        found = []
        for case in self.cases:
            values = [
                row[self.field]
                for row in rows
                if row["provider"] == self.provider and case.items() <= row.items() and row.get(self.field) is not None
            ]
            if not values:
                return None
            found += values
        return min(found) if self.least is not None else max(found)

    def holds(self, value: float) -> bool:
        return value >= self.least if self.least is not None else value <= (self.most or 0.0)

    def wanted(self) -> str:
        return (
            f"at least {self.shown(self.least)}"
            if self.least is not None
            else f"at most {self.shown(self.most or 0.0)}"
        )

    def shown(self, value: float) -> str:
        return f"{value:.0%}" if self.unit == "%" else f"{value:.3g}{'' if self.unit == 'x' else ' '}{self.unit}"


def _logits(rows: tuple[int, ...], dtype: str, which: str) -> tuple[dict[str, Any], ...]:
    return tuple({"op": "logprob_entropy", "N": n, "V": _V, "dtype": dtype, "pass": which} for n in rows)


_LARGE = (256, 512)
_FORWARD = _logits(_LARGE, "float32", "forward")
_LINEAR = {"op": "linear_logprob_entropy", "N": 256, "D": 1024, "V": _V, "dtype": "float32"}
_LINEAR_PEERS = ("TRL chunked", "verl FusedLinearForPPO", "Liger fallback")
_LINEAR_PASSES = ({**_LINEAR, "pass": "forward"}, {**_LINEAR, "pass": "forward+backward"})

CPU_BARS = (
    *(
        Bar(
            f"`logprob_entropy` forward of {case['N']} rows, float32: torch.compile",
            (case,),
            "times_ours",
            "torch.compile",
            10,
            unit="x",
        )
        for case in _FORWARD
    ),
    Bar("the same: TRL eager", _FORWARD, "times_ours", "TRL eager", 20, unit="x"),
    Bar("the same: verl eager", _FORWARD, "times_ours", "verl eager", 20, unit="x"),
    Bar("the same: share of the read bandwidth", _FORWARD, "share_of_limit", least=0.5, unit="%"),
    Bar("in bfloat16", _logits(_LARGE, "bfloat16", "forward"), "share_of_limit", least=0.4, unit="%"),
    Bar("forward: memory above the logits", _FORWARD, "peak_mb", most=1, unit="MiB"),
    Bar(
        "forward + backward, float32: torch.compile",
        _logits(_LARGE, "float32", "forward+backward"),
        "times_ours",
        "torch.compile",
        5,
        unit="x",
    ),
    Bar(
        "`linear_logprob_entropy` forward: of the bare product",
        _LINEAR_PASSES[:1],
        "share_of_floor",
        least=1 / 1.1,
        unit="%",
    ),
    Bar("forward + backward: of its four products", _LINEAR_PASSES[1:], "share_of_floor", least=1 / 1.15, unit="%"),
    *(Bar(f"both: {peer}", _LINEAR_PASSES, "times_ours", peer, 1, unit="x") for peer in _LINEAR_PEERS),
    Bar(
        "`group_advantages` 2048 x 2048, groups of 16, per token: verl's grpo",
        ({"op": "expand_advantages", "estimator": "grpo", "L": 2048, "T": 2048, "inputs": "leaves"},),
        "times_ours",
        "verl grpo",
        20,
        unit="x",
    ),
    Bar(
        "tree attribution: Tree-GRPO's rule in Python",
        ({"op": "group_advantages", "estimator": "tree_grpo"},),
        "times_ours",
        "Python loop",
        25,
        unit="x",
    ),
    Bar("`branch_tokens` 64 x 1024", ({"op": "branch_tokens", "B": 64, "T": 1024},), "p50_ms", most=1, unit="ms"),
    Bar(
        "`policy_loss` 256 x 8192, forward + backward: verl",
        ({"op": "policy_loss", "B": 256, "T": 8192},),
        "times_ours",
        "verl",
        15,
        unit="x",
    ),
)

_TRAIN = _logits((8192,), "bfloat16", "forward")
_HEAD = {"op": "linear_logprob_entropy", "N": 4096, "D": 4096, "V": 131_072}
GPU_BARS = (
    Bar("`logprob_entropy` forward, 8192 x 151936 bfloat16 (H200)", _TRAIN, "p50_ms", most=0.58, unit="ms"),
    Bar("the same: TRL's kernel", _TRAIN, "times_ours", "TRL Triton", 1, unit="x"),
    Bar("backward", _logits((8192,), "bfloat16", "backward"), "p50_ms", most=1.29, unit="ms"),
    Bar("forward of 64 rows", _logits((64,), "bfloat16", "forward"), "p50_ms", most=0.025, unit="ms"),
    Bar(
        "`linear_logprob_entropy` 4096/4096/131072 forward",
        ({**_HEAD, "pass": "forward"},),
        "p50_ms",
        most=6.2,
        unit="ms",
    ),
    Bar("forward + backward", ({**_HEAD, "pass": "forward+backward"},), "p50_ms", most=26, unit="ms"),
)
