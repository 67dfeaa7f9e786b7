"""What the branching ops share: the policies, one checked call, the call as the native module takes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from arpo_ext.ops import _native

# Codes as in csrc/branch_points.h.
POLICIES = {"paper": 0, "random": 1, "chain": 2, "reference": 3, "aepo": 4, "at2po": 5, "appo": 6}
# What a policy reads beyond the inputs that every call has.
NEEDED = {"aepo": "streak", "at2po": "siblings", "appo": "value"}


class BranchCall(NamedTuple):
    """The checked inputs of branch_points and branch_scores, in the order of their schema."""

    entropy_now: Tensor
    entropy_root: Tensor
    tree: Tensor
    room: Tensor
    key: Tensor
    turn: Tensor
    streak: Tensor | None
    siblings: Tensor | None
    value: Tensor | None
    policy: int
    base: float
    weight: float
    threshold: float
    penalty: float
    width: int
    seed: int


SCHEMA = (
    "(Tensor entropy_now, Tensor entropy_root, Tensor tree, Tensor room, Tensor key, Tensor turn, "
    "Tensor? streak, Tensor? siblings, Tensor? value, "
    "int policy, float base, float weight, float threshold, float penalty, int width, int seed)"
)
_DTYPES = {
    "entropy_now": torch.float32,
    "entropy_root": torch.float32,
    "tree": torch.int64,
    "key": torch.int64,
    "turn": torch.int32,
    "streak": torch.int32,
    "siblings": torch.int32,
    "value": torch.float32,
}


def checked_call(op: str, *arguments: Tensor | float | str | None) -> BranchCall:
    """The arguments in the order of BranchCall, policy as its name. ValueError says what was got and expected."""
    call = BranchCall(*arguments)
    policy = call.policy
    if policy not in POLICIES:
        raise ValueError(f"{op}: got policy {policy!r}; expected {', '.join(POLICIES)}")
    needed = NEEDED.get(policy)
    if needed is not None and getattr(call, needed) is None:
        raise ValueError(f"{op}: got no {needed}; expected [L] {_DTYPES[needed]}, which policy {policy!r} reads")
    paths, device = call.tree.numel(), call.tree.device
    for name, dtype in _DTYPES.items():
        tensor = getattr(call, name)
        if tensor is not None:
            check_vector(op, name, tensor, dtype, paths, device)
    check_vector(op, "room", call.room, torch.int32, None, device)
    if not 0 <= call.width < 2**31:
        raise ValueError(f"{op}: got width {call.width}; expected 0 to 2^31 - 1")
    if not -(2**63) <= call.seed < 2**63:
        raise ValueError(f"{op}: got seed {call.seed}; expected a signed 64-bit number")
    numbers = {name: float(getattr(call, name)) for name in ("base", "weight", "threshold", "penalty")}
    value = None if call.value is None else call.value.detach()
    detached = {"entropy_now": call.entropy_now.detach(), "entropy_root": call.entropy_root.detach(), "value": value}
    return call._replace(policy=POLICIES[policy], **numbers, **detached)


def check_vector(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, size: int | None, device: torch.device
) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{op}: got {name} of {tensor.dtype}; expected {dtype}")
    if tensor.ndim != 1 or (size is not None and tensor.numel() != size):
        raise ValueError(f"{op}: got {name} of shape {list(tensor.shape)}; expected [{'T' if size is None else size}]")
    if tensor.device != device:
        raise ValueError(f"{op}: got {name} on {tensor.device}; expected {device}, where tree is")


def refuse_cpu(tensor: Tensor) -> str | None:
    if tensor.device.type != "cpu":
        return f"needs CPU tensors, got them on {tensor.device}"
    return _native.cpu_missing()


def native_call(call: BranchCall) -> tuple[object, object, tuple]:
    """The rule and the paths as the native module takes them, and the tensors that must outlive them."""
    rule = _native.C.BranchRule(*call[BranchCall._fields.index("policy") :])
    kept = tuple(None if t is None else t.contiguous() for t in call[: BranchCall._fields.index("policy")])
    return rule, _native.C.BranchPaths(*map(_native.pointer, kept), call.tree.numel(), call.room.numel()), kept
