"""The arguments of one `policy_loss` call as a record, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_RATIOS = ("token", "turn", "sequence")
_RATIO_GRADIENTS = ("mean", "token")
_CLIPS = ("ppo", "dual", "gppo", "cispo", "sapo")
_KLS = ("k1", "k2", "k3")


class PolicyLossCall(NamedTuple):
    """Checked arguments in the order of the op's schema, which is made from these annotations.

    group: the segments or rows. Of a number that may be a tensor, `<name>_tensor` counts if it is there, and
    `clip_numbers` [5] float64 counts instead of the five from clip_low to tau_negative (dual_clip inf: none).
    """

    logprob: Tensor
    old_logprob: Tensor
    advantage: Tensor
    weight: Tensor
    entropy: Tensor | None
    ref_logprob: Tensor | None
    importance: Tensor | None
    group: Tensor | None
    parent: Tensor | None
    leaf_segment: Tensor | None
    leaf_weight: Tensor | None
    normalizer_tensor: Tensor | None
    kl_coef_tensor: Tensor | None
    entropy_coef_tensor: Tensor | None
    clip_numbers: Tensor | None
    normalizer: float
    kl_coef: float
    entropy_coef: float
    ratio: str
    ratio_gradient: str
    groups: int
    clip: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    tau_positive: float
    tau_negative: float
    kl: str | None


TENSORS = PolicyLossCall._fields.index("normalizer")  # so many fields may hold a tensor
_OPTIONAL = {"Tensor | None": "Tensor?", "float | None": "float?", "str | None": "str?"}
_KINDS = {name: kind.__forward_arg__ for name, kind in PolicyLossCall.__annotations__.items()}
SCHEMA = ", ".join(f"{_OPTIONAL.get(kind, kind)} {name}" for name, kind in _KINDS.items())


def checked_call(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    normalizer: float | Tensor,
    *,
    ratio: str,
    ratio_gradient: str,
    segment: Tensor | None,
    row: Tensor | None,
    groups: int | None,
    parent: Tensor | None,
    leaf_segment: Tensor | None,
    leaf_weight: Tensor | None,
    clip: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    tau_positive: float,
    tau_negative: float,
    importance: Tensor | None,
    ref_logprob: Tensor | None,
    kl: str | None,
    kl_coef: float | Tensor,
    entropy: Tensor | None,
    entropy_coef: float | Tensor,
) -> PolicyLossCall:
    if logprob.dtype is not torch.float32 and logprob.dtype is not torch.float64:
        raise ValueError(f"policy_loss: got logprob of {logprob.dtype}; expected torch.float32 or torch.float64")
    if logprob.ndim != 1:
        raise ValueError(f"policy_loss: got logprob of shape {list(logprob.shape)}; expected [N]")
    _check_rule(ratio, ratio_gradient, clip, clip_low, clip_high, dual_clip, tau_positive, tau_negative)
    _check_terms(kl, kl_coef, ref_logprob, entropy, entropy_coef)
    group = segment if segment is not None else row
    if ratio != "token" or group is not None or parent is not None or leaf_segment is not None:
        _check_groups(logprob, ratio, segment, row, groups, parent, leaf_segment)
    _like(logprob, "old_logprob", old_logprob)
    _like(logprob, "weight", weight)
    if parent is None:
        pair = advantage.ndim == 2 and advantage.shape[0] == logprob.shape[0] and advantage.shape[1] == 2
        _like(logprob, "advantage", advantage, fits=pair, also=f" or [{logprob.shape[0]}, 2]")
        groups = logprob.shape[0] if groups is None else groups
    else:
        _like(logprob, "advantage", advantage, like=leaf_segment)
        groups = parent.shape[0]
        parent, leaf_segment = parent.to(torch.int64), leaf_segment.to(torch.int64)
    if leaf_weight is not None:
        if parent is None:
            raise ValueError("policy_loss: got leaf_weight without parent; expected it for packed paths only")
        _like(logprob, "leaf_weight", leaf_weight, like=leaf_segment)
    for name, tensor in (("importance", importance), ("ref_logprob", ref_logprob), ("entropy", entropy)):
        if tensor is not None:
            _like(logprob, name, tensor)
    if importance is not None and parent is not None:
        raise ValueError("policy_loss: got importance with parent; expected it inside leaf_weight")
    numbers = {"normalizer": normalizer, "kl_coef": kl_coef, "entropy_coef": entropy_coef}
    numbers = {name: _number(logprob, name, number) for name, number in numbers.items()}
    if not isinstance(normalizer, Tensor) and not normalizer > 0:
        raise ValueError(f"policy_loss: got normalizer {normalizer}; expected a number above 0")
    bounds = [clip_low, clip_high, dual_clip, tau_positive, tau_negative]
    clip_numbers = None
    if torch.compiler.is_compiling():
        tensors = _as_inputs(logprob, [*numbers.values(), *(torch.inf if n is None else n for n in bounds)])
        numbers, clip_numbers = dict(zip(numbers, tensors[:3].unbind(), strict=True)), tensors[3:]
        bounds = [None if number is None else 1.0 for number in bounds]
    return PolicyLossCall(
        logprob,
        old_logprob,
        advantage,
        weight,
        entropy,
        ref_logprob,
        importance,
        group,
        parent,
        leaf_segment,
        leaf_weight,
        *(number if isinstance(number, Tensor) else None for number in numbers.values()),
        clip_numbers,
        *(1.0 if isinstance(number, Tensor) else float(number) for number in numbers.values()),
        ratio,
        ratio_gradient,
        groups,
        clip,
        *(None if number is None else float(number) for number in bounds),
        kl,
    )


def _like(
    logprob: Tensor, name: str, tensor: Tensor, *, like: Tensor | None = None, fits: bool = False, also: str = ""
) -> None:
    """Raises unless `tensor` has logprob's dtype and device, and the shape of `like` (default: logprob) or `fits`."""
    shape = logprob.shape if like is None else like.shape
    if not fits and tensor.shape != shape:
        raise ValueError(f"policy_loss: got {name} of shape {list(tensor.shape)}; expected {list(shape)}{also}")
    if tensor.dtype is not logprob.dtype:
        raise ValueError(f"policy_loss: got {name} of {tensor.dtype}; expected {logprob.dtype}, as logprob")
    if tensor.device != logprob.device:
        raise ValueError(f"policy_loss: got {name} on {tensor.device}; expected {logprob.device}, as logprob")


def _check_rule(
    ratio: str,
    ratio_gradient: str,
    clip: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    tau_positive: float,
    tau_negative: float,
) -> None:
    if not 0 <= clip_low <= 1:
        raise ValueError(f"policy_loss: got clip_low {clip_low}; expected 0 to 1")
    if not clip_high >= 0:
        raise ValueError(f"policy_loss: got clip_high {clip_high}; expected at least 0")
    if ratio not in _RATIOS:
        raise ValueError(f"policy_loss: got ratio {ratio!r}; expected {', '.join(_RATIOS)}")
    if ratio_gradient not in _RATIO_GRADIENTS:
        raise ValueError(f"policy_loss: got ratio_gradient {ratio_gradient!r}; expected {', '.join(_RATIO_GRADIENTS)}")
    if clip not in _CLIPS:
        raise ValueError(f"policy_loss: got clip {clip!r}; expected {', '.join(_CLIPS)}")
    if (clip == "dual" and dual_clip is None) or (dual_clip is not None and clip not in ("dual", "gppo")):
        raise ValueError(
            f"policy_loss: got dual_clip {dual_clip} with clip {clip!r}; expected it with 'dual', and if wanted 'gppo'"
        )
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"policy_loss: got dual_clip {dual_clip}; expected a number above 1")
    if not (tau_positive > 0 and tau_negative > 0):
        raise ValueError(
            f"policy_loss: got tau_positive {tau_positive} and tau_negative {tau_negative}; expected numbers above 0"
        )


def _check_terms(
    kl: str | None,
    kl_coef: float | Tensor,
    ref_logprob: Tensor | None,
    entropy: Tensor | None,
    entropy_coef: float | Tensor,
) -> None:
    if kl is None:
        if isinstance(kl_coef, Tensor) or kl_coef != 0:
            raise ValueError(f"policy_loss: got kl_coef {kl_coef} without kl; expected kl {', '.join(_KLS)}")
    else:
        if kl not in _KLS:
            raise ValueError(f"policy_loss: got kl {kl!r}; expected None, {', '.join(_KLS)}")
        if ref_logprob is None:
            raise ValueError(f"policy_loss: got kl {kl!r} without ref_logprob; expected both or neither")
    if entropy is None and (isinstance(entropy_coef, Tensor) or entropy_coef != 0):
        raise ValueError(f"policy_loss: got entropy_coef {entropy_coef} without entropy; expected both or neither")


def _check_groups(
    logprob: Tensor,
    ratio: str,
    segment: Tensor | None,
    row: Tensor | None,
    groups: int | None,
    parent: Tensor | None,
    leaf_segment: Tensor | None,
) -> None:
    if (parent is None) != (leaf_segment is None):
        raise ValueError("policy_loss: got only one of parent and leaf_segment; expected both or neither")
    given = [name for name, map_ in (("segment", segment), ("row", row), ("parent", parent)) if map_ is not None]
    expected = {"token": [], "turn": ["segment"], "sequence": ["segment", "parent"] if parent is not None else ["row"]}
    if given != expected[ratio]:
        wanted = {"token": "none", "turn": "segment", "sequence": "row, or segment with parent and leaf_segment"}
        raise ValueError(
            f"policy_loss: got {' and '.join(given) or 'none'} of segment, row and parent with ratio {ratio!r}; "
            f"expected {wanted[ratio]}"
        )
    for name, tensor in (("segment", segment), ("row", row), ("parent", parent), ("leaf_segment", leaf_segment)):
        if tensor is None:
            continue
        per_token = name in ("segment", "row")
        if tensor.shape != logprob.shape if per_token else tensor.ndim != 1:
            shape = f"[{logprob.shape[0]}]" if per_token else "[S]" if name == "parent" else "[L]"
            raise ValueError(f"policy_loss: got {name} of shape {list(tensor.shape)}; expected {shape}")
        if tensor.dtype is not torch.int64 and tensor.dtype is not torch.int32:
            raise ValueError(f"policy_loss: got {name} of {tensor.dtype}; expected torch.int32 or torch.int64")
        if tensor.device != logprob.device:
            raise ValueError(f"policy_loss: got {name} on {tensor.device}; expected {logprob.device}, as logprob")
    if groups is not None and not groups >= 1:
        raise ValueError(f"policy_loss: got groups {groups}; expected at least 1, or None")


def _number(logprob: Tensor, name: str, number: float | Tensor) -> float | Tensor:
    if not isinstance(number, Tensor):
        return number
    if number.ndim != 0:
        raise ValueError(f"policy_loss: got {name} of shape {list(number.shape)}; expected a 0-d tensor")
    if number.device.type != "cpu" and number.device != logprob.device:
        raise ValueError(
            f"policy_loss: got {name} on {number.device}; expected it on the CPU or on {logprob.device}, as logprob"
        )
    return number.detach() if number.requires_grad else number


def _as_inputs(logprob: Tensor, numbers: Sequence[float | Tensor]) -> Tensor:
    """The numbers as a float64 tensor on logprob's device, made by the graph that is being traced.

    A number given to an op is part of the graph, so that every new one would compile another graph, and hit the limit
    of them. So is one that fills a tensor; a product keeps it an input. On a GPU a kernel reads it, so that replaying a
    captured graph takes the numbers of the day.
    """
    one = logprob.new_ones((), dtype=torch.float64)
    return torch.stack([number.to(one) if isinstance(number, Tensor) else one * number for number in numbers])
