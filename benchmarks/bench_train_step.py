"""What one policy update costs: packed trees, flat rows, a plain torch step and TRL's loss path, on the same trees.

    python -m benchmarks.bench_train_step [--models 10M,50M] [--shapes all] [--rounds 5] [--json FILE]

A step is everything between credited trees and new weights: micro-batches, forward, statistics, loss, backward,
clipping, AdamW. The plain step is that of a transformers model with all its logits and torch's own functions; TRL's is
its fused head, `_get_per_token_logps_and_entropies` and `_compute_loss`. Both get their padded rows made beforehand, so
their step does less. All take 16 rows at a time; packs take 8,192 distinct tokens.

Every provider's loss and gradient norm are compared before it is timed. Providers are interleaved in rotating order. A
sample is the CPU time of the process (of all its threads) on a CPU and wall-clock time on a GPU, synchronised. Reported
are medians, and memory above what model and optimiser hold, gradients included.

Left out: rollouts and the push of weights, and on a CPU low precision, for which its products are slow.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from . import _output
from ._harness import Unavailable
from ._measure import Meter, machine
from ._train_trees import SHAPES, Lengths, token_counts

# A packed step may cost the share of distinct tokens and this much more of a flat step.
ALLOWANCE = {"cpu": 0.20, "cuda": 0.10}
LEAST_TOKENS = 4000  # from which on it must


@dataclass(frozen=True)
class Size:
    """hidden, layers, heads and vocabulary of a Qwen2 with tied embeddings; parameters as its name says."""

    hidden: int
    layers: int
    heads: int
    vocab: int

    def model(self) -> Any:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 27 // 320 * 32,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
        return Qwen2ForCausalLM(config).train()


SIZES = {
    "40k": Size(32, 2, 2, 512),
    "1M": Size(128, 4, 4, 2048),
    "10M": Size(320, 7, 5, 4096),
    "50M": Size(640, 9, 10, 8192),
}
PATHS = {"50M": 12}  # of a tree; 16 else
# Trees that packing can save little or nothing on, and small ones: paths, lengths, trees.
SMALL: dict[str, tuple[str, int, Lengths, int]] = {
    "one short path": ("arpo-like", 1, Lengths(8, 8, 4, 1), 1),
    "one small tree": ("arpo-like", 4, Lengths(10, 8, 4, 2), 1),
    "16 small trees": ("arpo-like", 8, Lengths(30, 12, 8, 3), 16),
    "16 lone paths": ("arpo-like", 1, Lengths(), 16),
    "64 short lone paths": ("arpo-like", 1, Lengths(20, 4, 3, 2), 64),
}


@dataclass(frozen=True)
class Case:
    """Trees of one shape for a model of one size."""

    model: str
    shape: str
    trees: tuple[Any, ...]

    def columns(self) -> dict[str, Any]:
        unique, total = token_counts(self.trees)
        return {"model": self.model, "shape": self.shape, "tokens": total, "unique_tokens": unique}


class Step:
    """A model, its optimiser and the credited trees of a case, and one update of it in each provider's way.

    The rate is so small that the weights stay what they are: every step of every provider does the same.
    """

    def __init__(self, case: Case, device: str) -> None:
        from arpo_ext.config import TrainConfig
        from arpo_ext.training.advantages import credit_trees
        from arpo_ext.training.batch import tree_rows
        from arpo_ext.training.prepare import prepare

        self.config = TrainConfig(lr=1e-12, importance_cap=1e6, grad_clip=1e6)
        model = SIZES[case.model].model()
        if device == "cuda":
            model = model.bfloat16()
        self.accelerator, self.model, self.optimizer = prepare(model, self.config)
        credited = credit_trees(case.trees, estimator="none")
        self.credited = [_with_advantages(tree) for tree in credited]
        rows = [row for tree in self.credited for row in tree_rows(tree, self.config)]
        self.rows = [row for row in rows if (row.advantage * row.weight).any()]
        self.normalizer = sum(row.share for row in rows)

    def ours(self, packing: str) -> tuple[float, float]:
        from arpo_ext.training.batch import plan_updates
        from arpo_ext.training.step import policy_step

        config = self.config.model_copy(update={"packing": packing})
        metrics = policy_step(
            self.accelerator,
            self.model,
            self.optimizer,
            plan_updates(self.credited, config, seed=0, pad_token=0),
            config,
            temperature=1.0,
            pad_token=0,
        )
        return metrics["train/loss"], metrics["train/grad_norm"]

    def padded(self) -> list[dict[str, torch.Tensor]]:
        """Micro-batches of the same rows as TRL names them, with all tokens behind the first as the completion."""
        size, device, batches = self.config.micro_batch_rows, self.accelerator.device, []
        ordered = sorted(self.rows, key=lambda row: len(row.tokens))
        for rows in (ordered[i : i + size] for i in range(0, len(ordered), size)):
            pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
            tokens = pad([row.tokens for row in rows])
            whole = pad([torch.ones_like(row.tokens) for row in rows])
            advantage = pad([row.advantage for row in rows])
            trained = pad([row.trained for row in rows]).long()
            old = pad([row.sampler_logprob.nan_to_num() for row in rows])
            batch = {
                "prompt_ids": tokens[:, :1], "prompt_mask": whole[:, :1], "completion_ids": tokens[:, 1:],
                "completion_mask": whole[:, 1:], "tool_mask": trained[:, 1:], "advantages": advantage[:, 1:],
                "old_per_token_logps": old[:, 1:], "num_items_in_batch": torch.tensor(self.normalizer),
            }  # fmt: skip
            batches.append({name: tensor.to(device) for name, tensor in batch.items()})
        return batches

    def update(self, losses: Iterator[torch.Tensor]) -> tuple[float, float]:
        """Backward of each loss, clip, AdamW."""
        total = 0.0
        for loss in losses:
            loss.backward()
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, norm

    def plain(self) -> Callable[[], tuple[float, float]]:
        batches = self.padded()

        def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            attended = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
            logits = self.model(input_ids=tokens, attention_mask=attended, use_cache=False).logits[:, :-1].float()
            every = logits.log_softmax(-1)
            with torch.no_grad():
                _ = -(every.exp() * every).sum(-1).mean()  # the entropy that every provider measures
            logprob = every.gather(-1, batch["completion_ids"][..., None])[..., 0]
            ratio = torch.exp(logprob - batch["old_per_token_logps"])
            clipped = ratio.clamp(1 - self.config.clip_low, 1 + self.config.clip_high)
            own = -torch.minimum(ratio * batch["advantages"], clipped * batch["advantages"])
            return (own * batch["tool_mask"]).sum() / self.normalizer

        return lambda: self.update(loss(batch) for batch in batches)

    def trl(self) -> Callable[[], tuple[float, float]]:
        from ._peers import trl_model_loss

        batches = self.padded()
        loss = trl_model_loss(self.model, self.config.clip_low, self.config.clip_high)
        return lambda: self.update(loss(batch) for batch in batches)


def _with_advantages(credited: Any) -> Any:
    """No advantage is 0, also where a path is alone in its tree: every row is trained."""
    leaves = tuple(replace(leaf, advantage=leaf.reward - 0.4) for leaf in credited.tree.leaves)
    return replace(credited, tree=replace(credited.tree, leaves=leaves))


def cases(models: Sequence[str], shapes: Sequence[str]) -> Iterator[Case]:
    for model in models:
        vocab = SIZES[model].vocab
        for name in shapes:
            if name in SHAPES:
                yield Case(model, name, (SHAPES[name](PATHS.get(model, 16), Lengths(), vocab, 0),))
            else:
                shape, paths, lengths, count = SMALL[name]
                trees = (SHAPES[shape](paths, lengths, vocab, seed) for seed in range(count))
                yield Case(model, name, tuple(trees))


def run(case: Case, rounds: int, device: str, providers: Sequence[str]) -> list[dict[str, Any]]:
    """One row per provider: the case's columns, times, the multiple of our flat step, memory; or why it did not run."""
    step, meter = Step(case, device), Meter(device, smoke=True)
    made: dict[str, Callable[[], Callable[[], tuple[float, float]]]] = {
        "rows": lambda: partial(step.ours, "rows"),
        "tree": lambda: partial(step.ours, "tree"),
        "torch": step.plain,
        "TRL": step.trl,
    }
    calls: dict[str, Callable[[], tuple[float, float]]] = {}
    rows: dict[str, dict[str, Any]] = {}
    expected: tuple[float, float] | None = None
    for name in providers:
        rows[name] = {**case.columns(), "provider": name}
        try:
            calls[name] = made[name]()
            result = calls[name]()
        except Unavailable as error:
            calls.pop(name, None)
            rows[name]["reason"] = str(error)
            continue
        expected = expected or result
        allowed = 1e-3 if device == "cpu" else 5e-2
        if any(abs(a - b) > allowed * abs(expected[1]) for a, b in zip(result, expected, strict=True)):
            raise SystemExit(f"{case.columns()}: {name} has loss and gradient norm {result}; expected {expected}")
    for name, call in calls.items():
        rows[name]["peak_mb"] = meter.peak_mb(call)[1]
    samples = _interleaved(calls, rounds, device)
    flat = statistics.median(samples["rows"])
    for name, taken in samples.items():
        rows[name] |= {"p50_s": statistics.median(taken), "min_s": min(taken), "rounds": rounds}
        rows[name]["of_rows"] = rows[name]["p50_s"] / flat
    tree = rows["tree"]
    tree["unique_share"] = tree["unique_tokens"] / tree["tokens"]
    tree["bound"] = min(1.0, tree["unique_share"] + ALLOWANCE[device]) if tree["tokens"] >= LEAST_TOKENS else 1.0
    return list(rows.values())


def _interleaved(calls: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            gc.collect()
            clock = time.process_time if device == "cpu" else _synchronised
            started = clock()
            calls[name]()
            samples[name].append(clock() - started)
        order.append(order.pop(0))
    return samples


def _synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_train_step", description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="10M,50M", help=f"of {', '.join(SIZES)} (default 10M,50M)")
    shapes = [*SHAPES, *SMALL]
    parser.add_argument(
        "--shapes", default=",".join(SHAPES), help=f"of {', '.join(shapes)}, or all (default the first three)"
    )
    parser.add_argument("--providers", default="rows,tree,torch,TRL", help="rows and tree are always run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="default 1: more spend CPU time on waiting")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args(argv)
    arguments.shapes = ",".join(shapes) if arguments.shapes == "all" else arguments.shapes
    chosen = {name: arguments.__dict__[name].split(",") for name in ("models", "shapes", "providers")}
    for name, known in (("models", SIZES), ("shapes", shapes), ("providers", ("rows", "tree", "torch", "TRL"))):
        if unknown := set(chosen[name]) - set(known):
            parser.error(f"unknown {name[:-1]} {unknown.pop()!r}; expected {', '.join(known)}")
    torch.set_num_threads(arguments.threads)
    providers = list(dict.fromkeys(["rows", "tree", *chosen["providers"]]))
    record = {"machine": machine(arguments.device, arguments.threads, ("transformers", "trl")), "rows": []}
    _output.print_machine(record["machine"])
    missed = 0
    for case in cases(chosen["models"], chosen["shapes"]):
        rows = run(case, arguments.rounds, arguments.device, providers)
        _print(case, rows)
        missed += any(row["of_rows"] > row["bound"] for row in rows if "bound" in row)
        record["rows"] += rows
        if arguments.json:
            _output.write_json(arguments.json, record)
    print(f"{missed} cases above their bound", file=sys.stderr)
    return 0


def _print(case: Case, rows: Sequence[dict[str, Any]]) -> None:
    print("\n" + "  ".join(f"{name}={value}" for name, value in case.columns().items()))
    for row in rows:
        if "reason" in row:
            print(f"  {row['provider']:<8} not run: {row['reason']}")
            continue
        peak = "?" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        line = f"  {row['provider']:<8}{row['p50_s']:>9.3f} s{row['of_rows']:>8.3f} of rows{peak:>8} MiB"
        print(line + (f"   at most {row['bound']:.3f}" if "bound" in row else ""), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
