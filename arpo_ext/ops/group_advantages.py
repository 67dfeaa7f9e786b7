"""Advantages of the leaves of rollout trees, and their attribution to the segments that leaves share.

With r the rewards of one tree, n of them, each leaf gets

    grpo           (r - mean(r)) / (std(r) + eps)                   GRPO, arXiv 2402.03300; with this std as in verl
    dr_grpo        r - mean(r)                                      Dr. GRPO, arXiv 2503.20783
    rloo           r - mean of the other leaves                     RLOO, arXiv 2402.14740
    opo            r - sum(length * r) / sum(length)                OPO, arXiv 2505.23585
    grpo_passk     best leaf: (r - second best) / (std(r) + eps); others 0        arXiv 2503.19595
    reinforce_pp_baseline  (d - m) / (s + eps), d = r - mean(r)     REINFORCE++-baseline, arXiv 2501.03262
                   m and s are mean and std of d over the leaves of all trees, each counted `length` times
    tree_grpo      z by tree and subgroup of (z by tree of r), z(r) = (r - mean(r)) / (std(r) + eps)
    tree_grpo_sum  z by tree of r + z by tree and subgroup of r     Tree-GRPO, arXiv 2509.21240, equations 6 and 7
    appo           (r - mean) / (std + eps) by tree and subgroup    APPO, arXiv 2606.12384; this std is biased
    at2po          as grpo                                          AT2PO, arXiv 2601.04767
    none           r

and exactly 0 (but for `none`) where its group has one leaf or only equal rewards. std is the unbiased one elsewhere. A
segment gets, over the leaves below it (those whose path holds it), A being their advantages and w their weights,

    segment        mean(A)                                          "hard" credit of ARPO, arXiv 2507.19849
    segment_pair   [sum(w * max(A, 0)), sum(w * min(A, 0))]         exact under clipping: see `policy_loss`

Two estimators credit segments by a rule of their own (`credit` combines it with other estimators), with one value V
for all rows that share the segment:

    at2po  V = sum(e^H(c) V(c)) / sum(e^H(c)) over the children c that lead to a leaf, H = segment_entropy; V of a leaf
           is its advantage, and a leaf counts with the entropy of the segment it ends in
    appo   V = mean(A of the initial leaves below) + mean(A of the branches below, 0 without any); 0 where no initial
           leaf is below: a branch's own tokens are not trained. Leaves of subgroup 0 are the initial ones
    segment_pair   [max(V, 0), min(V, 0)] * sum of w, over all leaves below (at2po) or the initial ones (appo)

Where the published code differs:

    | estimator     | published code                               | here                                             |
    |---------------|----------------------------------------------|--------------------------------------------------|
    | all           | a group of one keeps its reward as advantage | 0; verl's grpo_passk raises                      |
    | reinforce_pp_ | divides by sqrt(var + 1e-8); whitens flat    | by std + eps; leaves of a flat tree stay 0       |
    |  baseline     | trees too                                    |                                                  |
    | tree_grpo     | the function compute_tree_grpo_outcome_advantage; the training scripts use the sum instead      |
    | at2po         | biased std                                   | unbiased: all leaves scaled by sqrt((n-1)/n)     |
    | appo          | a token gains the mean of the branches that  | the mean over the branches below its segment: the|
    |               | its own row was forked into behind it        | same where initial rows share nothing but prompts|

A NaN, or an infinity among other rewards, makes its own tree NaN (appo: its subgroup) and no other. Statistics are
float64. Nothing waits for the GPU, and a group may have any size. Nothing here has a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from arpo_ext.ops import _native, _segment_advantages
from arpo_ext.ops import group_advantages_reference as reference
from arpo_ext.ops._dispatch import Backend, choose, refuse_cuda

# Codes as in csrc/group_advantages.h.
ESTIMATORS = {
    "grpo": 0,
    "dr_grpo": 1,
    "rloo": 2,
    "none": 3,
    "opo": 4,
    "grpo_passk": 5,
    "reinforce_pp_baseline": 6,
    "tree_grpo": 7,
    "tree_grpo_sum": 8,
    "appo": 9,
    "at2po": 10,
}
_WITH_SUBGROUP = ("tree_grpo", "tree_grpo_sum", "appo")
_WITH_LENGTH = ("opo", "reinforce_pp_baseline")
_CREDITS = {"mean": _segment_advantages.MEAN, "turn": _segment_advantages.TURN, "prefix": _segment_advantages.PREFIX}
_OWN_CREDIT = {"at2po": "turn", "appo": "prefix"}


class Advantages(NamedTuple):
    """leaf [L]; segment [S] and segment_pair [S, 2], None if no tree of segments was given."""

    leaf: Tensor
    segment: Tensor | None
    segment_pair: Tensor | None


def group_advantages(
    reward: Tensor,
    tree: Tensor,
    *,
    estimator: str = "grpo",
    parent: Tensor | None = None,
    leaf_segment: Tensor | None = None,
    length: Tensor | None = None,
    subgroup: Tensor | None = None,
    segment_entropy: Tensor | None = None,
    leaf_weight: Tensor | None = None,
    credit: str | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Advantages:
    """Advantages of L leaves and, given `parent` and `leaf_segment`, of the S segments above them.

    reward: [L] float32 (float64: computed and returned in float64, by the reference).
    tree: [L] int64 in [0, L), in any order: leaves with equal numbers form one group.
    parent: [S] int64, each smaller than its own index, -1 for a root. One forest may hold the segments of many trees.
    leaf_segment: [L] int64 in [0, S), the last segment of each leaf's path.
    length: [L] int64, at least 0, trained tokens of each leaf; opo needs it, reinforce_pp_baseline takes 1 without it.
    subgroup: [L] int64 in [0, L): leaves with equal tree and subgroup form a subgroup. tree_grpo and tree_grpo_sum (the
        number of the tree among those of a prompt, `tree` being the prompt's) and appo (see above) need it.
    segment_entropy: [S] like reward, nats, finite; at2po needs it, and parent and leaf_segment.
    leaf_weight: [L] like reward, at least 0, default 1; it enters `segment_pair` only.
    credit: "mean", "turn" (at2po's rule, needs segment_entropy) or "prefix" (appo's, needs subgroup) for the segments;
        None: the estimator's own, which is the mean for those without a rule.
    What an estimator has no use for is not looked at.

    A segment above no leaf gets zeros. ValueError: shape, dtype, device, estimator or (on the CPU) an index or a length
    is wrong, or one is missing. On a GPU, a leaf with a tree or subgroup out of range gets 0, one with a segment out of
    range counts for no segment, a negative length counts as 0. BackendError: the backend named cannot serve.
    """
    leaves, device = reward.numel(), reward.device
    if reward.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"group_advantages: got reward of {reward.dtype}; expected torch.float32 or torch.float64")
    _check("reward", reward, reward.dtype, None, device)
    _check("tree", tree, torch.int64, leaves, device)
    if estimator not in ESTIMATORS:
        raise ValueError(f"group_advantages: got estimator {estimator!r}; expected {', '.join(ESTIMATORS)}")
    if (parent is None) != (leaf_segment is None):
        missing = "parent" if parent is None else "leaf_segment"
        raise ValueError(f"group_advantages: got no {missing}; expected parent and leaf_segment, or neither")
    if not eps >= 0:
        raise ValueError(f"group_advantages: got eps {eps}; expected at least 0")
    if credit is not None and credit not in _CREDITS:
        raise ValueError(f"group_advantages: got credit {credit!r}; expected {', '.join(_CREDITS)} or None")
    credit = credit or _OWN_CREDIT.get(estimator, "mean")
    subgroup = _wanted("subgroup", subgroup, estimator, credit, estimator in _WITH_SUBGROUP or credit == "prefix")
    if estimator != "reinforce_pp_baseline" or length is not None:
        length = _wanted("length", length, estimator, credit, estimator in _WITH_LENGTH)
    segment_entropy = _wanted("segment_entropy", segment_entropy, estimator, credit, credit == "turn")
    for name, tensor in (("subgroup", subgroup), ("length", length)):
        if tensor is not None:
            _check(name, tensor, torch.int64, leaves, device)
    chosen = choose("group_advantages", _LEAVES, backend, reward)
    leaf = chosen.run(reward.detach(), tree, subgroup, length, ESTIMATORS[estimator], float(eps))
    if parent is None or leaf_segment is None:
        _wanted("parent", parent, estimator, credit, credit == "turn")
        return Advantages(leaf, None, None)
    _check("parent", parent, torch.int64, None, device)
    _check("leaf_segment", leaf_segment, torch.int64, leaves, device)
    if leaf_weight is not None:
        _check("leaf_weight", leaf_weight, reward.dtype, leaves, device)
        leaf_weight = leaf_weight.detach()
    if segment_entropy is not None:
        _check("segment_entropy", segment_entropy, reward.dtype, parent.numel(), device)
        segment_entropy = segment_entropy.detach()
    chosen = choose("group_advantages", _SEGMENTS, backend, reward)
    branch = subgroup if credit == "prefix" else None
    run = chosen.run(leaf, parent, leaf_segment, leaf_weight, segment_entropy, branch, _CREDITS[credit])
    return Advantages(leaf, *run)


def _wanted(name: str, tensor: Tensor | None, estimator: str, credit: str, wanted: bool) -> Tensor | None:
    """The tensor if the estimator or the credit reads it, else None."""
    if wanted and tensor is None:
        reader = f"estimator {estimator!r}" if _OWN_CREDIT.get(estimator, "mean") == credit else f"credit {credit!r}"
        raise ValueError(f"group_advantages: got no {name}; {reader} expects it")
    return tensor if wanted else None


def _check(name: str, tensor: Tensor, dtype: torch.dtype, size: int | None, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"group_advantages: got {name} of {tensor.dtype}; expected {dtype}")
    if tensor.ndim != 1 or (size is not None and tensor.numel() != size):
        expected = "one dimension" if size is None else f"[{size}]"
        raise ValueError(f"group_advantages: got {name} of shape {list(tensor.shape)}; expected {expected}")
    if tensor.device != device:
        raise ValueError(f"group_advantages: got {name} on {tensor.device}; expected {device}, where reward is")


def _refuse_cpu(reward: Tensor) -> str | None:
    if reward.device.type != "cpu":
        return f"needs CPU tensors, got them on {reward.device}"
    if reward.dtype != torch.float32:
        return f"needs float32, got {reward.dtype}"
    return _native.cpu_missing()


def _refuse_cuda(reward: Tensor) -> str | None:
    if _native.device_kind(reward) == "cuda" and reward.dtype != torch.float32:
        return f"needs float32, got {reward.dtype}"
    return refuse_cuda(reward)


def _reference_leaves(
    reward: Tensor, tree: Tensor, subgroup: Tensor | None, length: Tensor | None, estimator: int, eps: float
) -> Tensor:
    name = next(name for name, code in ESTIMATORS.items() if code == estimator)
    return reference.group_advantages(reward, tree, subgroup, length, estimator=name, eps=eps)


torch.library.define(
    "arpo_ext::group_advantages",
    "(Tensor reward, Tensor tree, Tensor? subgroup, Tensor? length, int estimator, float eps) -> Tensor",
)

_LEAVES = {
    "cpu": Backend(_refuse_cpu, torch.ops.arpo_ext.group_advantages),
    "cuda": Backend(_refuse_cuda, torch.ops.arpo_ext.group_advantages),
    "reference": Backend(lambda reward: None, _reference_leaves),
}
_SEGMENTS = {
    "cpu": Backend(_refuse_cpu, _segment_advantages.run),
    "cuda": Backend(_refuse_cuda, _segment_advantages.run),
    "reference": Backend(lambda reward: None, reference.segment_advantages),
}


@torch.library.register_fake("arpo_ext::group_advantages")
def _group_advantages_fake(
    reward: Tensor, tree: Tensor, subgroup: Tensor | None, length: Tensor | None, estimator: int, eps: float
) -> Tensor:
    return torch.empty_like(reward, memory_format=torch.contiguous_format)


@torch.library.impl("arpo_ext::group_advantages", ("cpu", "cuda"))
def _group_advantages(
    reward: Tensor, tree: Tensor, subgroup: Tensor | None, length: Tensor | None, estimator: int, eps: float
) -> Tensor:
    inputs = [None if t is None else t.contiguous() for t in (reward, tree, subgroup, length)]
    leaf = torch.empty_like(reward, memory_format=torch.contiguous_format)
    leaves = _native.C.GroupLeaves(*map(_native.pointer, inputs), reward.numel())
    if _native.device_kind(reward) == "cpu":
        _native.C.group_advantages_cpu(estimator, eps, leaves, leaf.data_ptr(), torch.get_num_threads())
    else:
        whitened = estimator == ESTIMATORS["reinforce_pp_baseline"]
        deviation = leaf.new_empty(reward.numel(), dtype=torch.float64) if whitened else None
        place = _native.place(reward)
        _native.C.group_advantages_cuda(estimator, eps, leaves, leaf.data_ptr(), _native.pointer(deviation), *place)
    return leaf
