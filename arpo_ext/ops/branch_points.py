"""Where rollout paths branch.

After a tool result (paper: the first k tokens that follow it) a path may ask for siblings. Its wish is

    paper   score = base + weight * (entropy_now - entropy_root);  wish = width if score > threshold else 0
            (equation 5 of ARPO, arXiv 2507.19849: base = alpha, weight = beta, threshold = tau, width = Z)
    random  score = base - u(seed, tree, key, turn);               wish = width if u < base else 0
            (u uniform in [0, 1): the control that branches as often whatever the entropy)
    chain   score = 0;                                             wish = 0

and the room of a tree goes to its wishes in the order of score (high first), then key, then index:

    for i in sorted(paths of the tree, key=lambda i: (-score[i], key[i], i)):
        children[i] = min(wish[i], room[tree]);  room[tree] -= children[i]

A wish is a function of its own path's inputs and the seed, so it does not depend on which paths are asked together or
in which order. All backends agree to the bit: integers, and float32 operations rounded one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arpo_ext.ops import _native
from arpo_ext.ops import branch_points_reference as reference
from arpo_ext.ops._dispatch import Backend, choose, refuse_cuda

# Codes as in csrc/branch_points.h.
POLICIES = {"paper": 0, "random": 1, "chain": 2}

_PATHS = "Tensor entropy_now, Tensor entropy_root, Tensor tree, {room}Tensor key, Tensor turn"
_RULE = "int policy, float base, float weight, float threshold, int width, int seed"


def branch_points(
    entropy_now: Tensor,
    entropy_root: Tensor,
    tree: Tensor,
    room: Tensor,
    key: Tensor,
    turn: Tensor,
    *,
    policy: str = "paper",
    base: float = 0.5,
    weight: float = 0.2,
    threshold: float = 0.5,
    width: int = 1,
    seed: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Children [L] int32 granted to each of L paths of T trees; their sum in a tree is at most its room.

    entropy_now, entropy_root: [L] float32, nats: mean entropy of the probe tokens, and of the path's baseline. NaN (not
        probed) makes no wish under `paper`; other policies do not read them.
    tree: [L] int64 in [0, T), in any order. room: [T] int32, children the tree may still get; below 0 counts as 0.
    key: [L] int64, what tells the paths of a tree apart: a hash of the path, never its place in this call.
    turn: [L] int32, how many tool results the path holds.
    base, weight, threshold are rounded to float32. width: children per wish, at least 0. seed: 64-bit, signed.

    ValueError: shape, dtype, device, policy or (on the CPU) a tree index is wrong. On a GPU a path whose tree index is
    out of range gets no children. BackendError: the backend named cannot serve.
    """
    _check_paths("branch_points", entropy_now, entropy_root, tree, key, turn)
    _check("branch_points", "room", room, torch.int32, None, tree.device)
    rule = _rule("branch_points", policy, base, weight, threshold, width, seed)
    chosen = choose("branch_points", _POINTS, backend, entropy_now)
    return chosen.run(entropy_now, entropy_root, tree, room, key, turn, *rule)


def branch_scores(
    entropy_now: Tensor,
    entropy_root: Tensor,
    tree: Tensor,
    room: Tensor,
    key: Tensor,
    turn: Tensor,
    *,
    policy: str = "paper",
    base: float = 0.5,
    weight: float = 0.2,
    threshold: float = 0.5,
    width: int = 1,
    seed: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Score [L] float32 and wish [L] int32 of each path before room is shared. Arguments as `branch_points`.

    `room` is checked but not read.
    """
    _check_paths("branch_scores", entropy_now, entropy_root, tree, key, turn)
    _check("branch_scores", "room", room, torch.int32, None, tree.device)
    rule = _rule("branch_scores", policy, base, weight, threshold, width, seed)
    chosen = choose("branch_scores", _SCORES, backend, entropy_now)
    return chosen.run(entropy_now, entropy_root, tree, key, turn, *rule)


def _check_paths(op: str, entropy_now: Tensor, entropy_root: Tensor, tree: Tensor, key: Tensor, turn: Tensor) -> None:
    paths, device = tree.numel(), tree.device
    for name, tensor, dtype in (
        ("tree", tree, torch.int64),
        ("entropy_now", entropy_now, torch.float32),
        ("entropy_root", entropy_root, torch.float32),
        ("key", key, torch.int64),
        ("turn", turn, torch.int32),
    ):
        _check(op, name, tensor, dtype, paths, device)


def _check(op: str, name: str, tensor: Tensor, dtype: torch.dtype, size: int | None, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{op}: got {name} of {tensor.dtype}; expected {dtype}")
    if tensor.ndim != 1 or (size is not None and tensor.numel() != size):
        raise ValueError(f"{op}: got {name} of shape {list(tensor.shape)}; expected [{'T' if size is None else size}]")
    if tensor.device != device:
        raise ValueError(f"{op}: got {name} on {tensor.device}; expected {device}, where tree is")


def _rule(op: str, policy: str, base: float, weight: float, threshold: float, width: int, seed: int) -> tuple:
    if policy not in POLICIES:
        raise ValueError(f"{op}: got policy {policy!r}; expected {', '.join(POLICIES)}")
    if not 0 <= width < 2**31:
        raise ValueError(f"{op}: got width {width}; expected 0 to 2^31 - 1")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: got seed {seed}; expected a signed 64-bit number")
    return POLICIES[policy], float(base), float(weight), float(threshold), width, seed


def _refuse_cpu(tensor: Tensor) -> str | None:
    if tensor.device.type != "cpu":
        return f"needs CPU tensors, got them on {tensor.device}"
    return _native.cpu_missing()


def _reference_scores(
    entropy_now: Tensor, entropy_root: Tensor, tree: Tensor, key: Tensor, turn: Tensor, policy: int, *rule: float
) -> tuple[Tensor, Tensor]:
    names = dict(zip(("base", "weight", "threshold", "width", "seed"), rule, strict=True))
    policy_name = next(name for name, code in POLICIES.items() if code == policy)
    return reference.branch_scores(entropy_now, entropy_root, tree, key, turn, policy=policy_name, **names)


def _reference_points(
    entropy_now: Tensor,
    entropy_root: Tensor,
    tree: Tensor,
    room: Tensor,
    key: Tensor,
    turn: Tensor,
    policy: int,
    *rule: float,
) -> Tensor:
    score, wish = _reference_scores(entropy_now, entropy_root, tree, key, turn, policy, *rule)
    return reference.branch_points(score, wish, tree, room, key)


torch.library.define("arpo_ext::branch_points", f"({_PATHS.format(room='Tensor room, ')}, {_RULE}) -> Tensor")
torch.library.define("arpo_ext::branch_scores", f"({_PATHS.format(room='')}, {_RULE}) -> (Tensor, Tensor)")

_SCORES = {
    "cpu": Backend(_refuse_cpu, torch.ops.arpo_ext.branch_scores),
    "cuda": Backend(refuse_cuda, torch.ops.arpo_ext.branch_scores),
    "reference": Backend(lambda tensor: None, _reference_scores),
}
_POINTS = {
    "cpu": Backend(_refuse_cpu, torch.ops.arpo_ext.branch_points),
    "cuda": Backend(refuse_cuda, torch.ops.arpo_ext.branch_points),
    "reference": Backend(lambda tensor: None, _reference_points),
}


@torch.library.register_fake("arpo_ext::branch_points")
def _branch_points_fake(entropy_now: Tensor, *rest: object) -> Tensor:
    return entropy_now.new_empty(entropy_now.shape, dtype=torch.int32)


@torch.library.register_fake("arpo_ext::branch_scores")
def _branch_scores_fake(entropy_now: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(entropy_now), entropy_now.new_empty(entropy_now.shape, dtype=torch.int32)


def _native_arguments(
    entropy_now: Tensor, entropy_root: Tensor, tree: Tensor, room: Tensor | None, key: Tensor, turn: Tensor, rule: tuple
) -> tuple:
    """The rule and the paths as the native module takes them, and the tensors to keep alive during the call."""
    inputs = [None if t is None else t.contiguous() for t in (entropy_now, entropy_root, tree, room, key, turn)]
    trees = 0 if room is None else room.numel()
    paths = _native.C.BranchPaths(*map(_native.pointer, inputs), tree.numel(), trees)
    return _native.C.BranchRule(*rule), paths, inputs


@torch.library.impl("arpo_ext::branch_points", ("cpu", "cuda"))
def _branch_points(
    entropy_now: Tensor, entropy_root: Tensor, tree: Tensor, room: Tensor, key: Tensor, turn: Tensor, *rule: float
) -> Tensor:
    children = torch.empty(tree.shape, dtype=torch.int32, device=tree.device)
    native_rule, paths, _kept = _native_arguments(entropy_now, entropy_root, tree, room, key, turn, rule)
    call = _native.C.branch_points_cpu if _native.device_kind(tree) == "cpu" else _native.C.branch_points_cuda
    call(native_rule, paths, children.data_ptr(), *_native.place(tree))
    return children


@torch.library.impl("arpo_ext::branch_scores", ("cpu", "cuda"))
def _branch_scores(
    entropy_now: Tensor, entropy_root: Tensor, tree: Tensor, key: Tensor, turn: Tensor, *rule: float
) -> tuple[Tensor, Tensor]:
    score = torch.empty(tree.shape, dtype=torch.float32, device=tree.device)
    wish = torch.empty(tree.shape, dtype=torch.int32, device=tree.device)
    native_rule, paths, _kept = _native_arguments(entropy_now, entropy_root, tree, None, key, turn, rule)
    call = _native.C.branch_scores_cpu if _native.device_kind(tree) == "cpu" else _native.C.branch_scores_cuda
    call(native_rule, paths, score.data_ptr(), wish.data_ptr(), *_native.place(tree))
    return score, wish
