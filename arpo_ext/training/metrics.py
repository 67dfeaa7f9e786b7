"""What the trees of a step say, over all ranks: rewards, tokens, entropies, tools; and the memory of this process."""

from __future__ import annotations

import math
import resource
import sys
from collections import Counter
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from arpo_ext.training.gather import has_spread
from arpo_ext.types import RolloutTree


def tree_metrics(accelerator: Accelerator, trees: Sequence[RolloutTree]) -> dict[str, float]:
    """Means over everything all ranks collected for a step; call it on every rank. NaN where nothing was counted.

    reward/mean, std (population), accuracy: over leaves. reward/format: share of leaves with a reward of at least 0;
    Eq. 8 of the paper gives -1 to a broken format and to nothing else. reward/flat_groups: share of trees whose leaves
    all have one reward, and therefore no advantage. tokens/unique: tokens of the trees, each once;
    tokens/paths: of the leaves' paths, so that their quotient is what packing saves. rollout/entropy: nats, mean over
    the sampled tokens that were measured; rollout/entropy_probe: over the windows at the start of turns. tools/NAME/:
    calls, share of them that succeeded, mean seconds.
    """
    total: Counter[str] = Counter()
    for part in gather_object([_counted(trees)]):
        for name, value in part.items():
            total[name] += value

    def mean(name: str, count: str) -> float:
        return total[name] / total[count] if total[count] else math.nan

    average = mean("reward", "leaves")
    metrics = {
        "reward/mean": average,
        "reward/std": math.sqrt(max(mean("squares", "leaves") - average**2, 0.0)),
        "reward/accuracy": mean("accuracy", "judged"),
        "reward/format": mean("format", "leaves"),
        "reward/flat_groups": mean("flat", "trees"),
        "rollout/entropy": mean("entropy", "entropies"),
        "rollout/entropy_probe": mean("probe", "probes"),
        "tokens/unique": float(total["unique"]),
        "tokens/paths": float(total["paths"]),
    }
    for name in sorted(key.removeprefix("calls:") for key in total if key.startswith("calls:")):
        metrics[f"tools/{name}/calls"] = float(total[f"calls:{name}"])
        metrics[f"tools/{name}/success"] = mean(f"ok:{name}", f"calls:{name}")
        metrics[f"tools/{name}/seconds"] = mean(f"seconds:{name}", f"calls:{name}")
    return metrics


def _counted(trees: Sequence[RolloutTree]) -> Counter[str]:
    """Sums and counts of one rank, under plain names."""
    total: Counter[str] = Counter()
    for tree in trees:
        total["trees"] += 1
        total["flat"] += not has_spread(tree)
        for segment in tree.segments:
            total["unique"] += len(segment.tokens)
            total["entropy"] += sum(segment.entropies)
            total["entropies"] += len(segment.entropies)
            if segment.probe_entropy is not None:
                total["probe"] += segment.probe_entropy
                total["probes"] += 1
            if segment.tool is not None:
                name = segment.tool.name
                total[f"calls:{name}"] += 1
                total[f"ok:{name}"] += segment.tool.ok
                total[f"seconds:{name}"] += segment.tool.seconds
        for leaf in tree.leaves:
            total["leaves"] += 1
            total["reward"] += leaf.reward
            total["squares"] += leaf.reward**2
            total["format"] += leaf.reward >= 0
            total["paths"] += len(tree.path_tokens(leaf.segment))
            if leaf.accuracy is not None:
                total["accuracy"] += leaf.accuracy
                total["judged"] += 1
    return total


def memory_metrics(device: torch.device) -> dict[str, float]:
    """memory/peak_gib: the most that this process ever held; on a GPU also what torch had allocated there."""
    unit = 1 if sys.platform == "darwin" else 1024
    metrics = {"memory/peak_gib": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30}
    if device.type == "cuda":
        metrics["memory/device_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return metrics
