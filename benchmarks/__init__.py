"""Benchmarks of the ops: `arpo-ext bench [op ...]`, or `python -m benchmarks.bench_<op>` in a checkout.

Installed as `arpo_ext.benchmarks`, hence the relative imports.
"""

from __future__ import annotations

from collections.abc import Sequence

# Each has a module bench_<op>.
BENCHES = (
    "logprob_entropy",
    "logits_stats",
    "linear_logprob_entropy",
    "branch_points",
    "branch_tokens",
    "group_advantages",
    "expand_advantages",
    "policy_loss",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks named in `argv` (all without names); options in `_harness`. Returns the exit code."""
    from . import _harness

    return _harness.main(argv, BENCHES)
