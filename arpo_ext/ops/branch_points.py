"""Where rollout paths branch.

A path (or a node, or a token position: the entry that could branch) has a score and wishes for `width` children or for
none. With dH = entropy_now - entropy_root and u = u(seed, tree, key, turn) uniform in [0, 1):

    policy     score                                           wishes if
    paper      base + weight * dH                              score > threshold
    reference  base - x,  x = clip(u - weight * dH, 0, 1)      x <= base
    aepo       (base + weight * dH) * (1 - clip(penalty * streak, 0, 1))    score > threshold
    at2po      entropy_now - weight * siblings                 score is finite
    appo       entropy_now * value                             entropy_now > 0, value > 0 and score > 0
    random     base - u                                        u < base
    chain      0                                               never

and the room of a tree goes to its wishes in the order of score (high first), then key, then index:

    for i in sorted(paths of the tree, key=lambda i: (-score[i], key[i], i)):
        children[i] = min(wish[i], room[tree]);  room[tree] -= children[i]

paper: equations 4 and 5 of ARPO (arXiv 2507.19849; base = alpha, weight = beta, threshold = tau, width = Z), asked when
    the first k tokens after a tool result are out. The caller normalises its windows, by sum(H) / V (equation 4) or
    by a mean: the difference of two normalised windows is the normalised difference. With base == threshold, the
    paper's own values (0.5), the rule is the sign of dH, whatever the (positive) weight.
reference: the coin that ARPO's published code flips (vllm_rollout_with_tools.py: base = branch_probability, weight =
    entropy_weight). That code draws from Python's global generator, anew for each of its beam_size - 1 attempts (one in
    its scripts), measures dH over the top 10 logprobs of the segment before the tool call, and serves its wishes in the
    order of their index. Here the draw is counted and scarce room goes to the lowest x; the windows are the caller's.
aepo: the branch penalty of AEPO (arXiv 2510.14545): streak is the number of consecutive branches with high entropy on
    the path, the penalty linear in it. Its published code adds a draw to weight * dH in place of base, takes 0.05 for
    the slope and counts the streak of the whole prompt. `aepo_initial_paths` splits the budget beforehand.
at2po: expansion of AT2PO (arXiv 2601.04767), asked after complete chains with one entry a turn: entropy_now is the mean
    of -log p of the turn's sampled tokens, siblings the turn's children so far, weight its alpha, room its K. With
    width 1, scarce room leaves exactly the K best turns of each tree.
appo: branching score of APPO (arXiv 2606.12384): entropy_now and value are the z-scores of entropy and future value of
    a token position. Both must be positive: two negative ones would multiply to a high score. `branch_tokens` takes
    whole rows of tokens instead, computes the z-scores and keeps chosen positions apart.
random: the control that branches as often whatever the entropy.
chain: GRPO.

A wish is a function of its own path's inputs and the seed, so it does not depend on which paths are asked together or
in which order. All backends agree to the bit: integers, and float32 operations rounded one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arpo_ext.ops import _native
from arpo_ext.ops import branch_points_reference as reference
from arpo_ext.ops._branch import POLICIES, SCHEMA, BranchCall, checked_call, native_call, refuse_cpu
from arpo_ext.ops._dispatch import Backend, choose, refuse_cuda


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
    penalty: float = 0.05,
    streak: Tensor | None = None,
    siblings: Tensor | None = None,
    value: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Children [L] int32 granted to each of L paths of T trees; their sum in a tree is at most its room.

    entropy_now, entropy_root: [L] float32: the window's one number (mean entropy of the probe tokens, or sum / V) and
        that of the path's baseline. Where a policy reads NaN it makes no wish; it reads what its score names, no more.
    tree: [L] int64 in [0, T), in any order. room: [T] int32, children the tree may still get; below 0 counts as 0.
    key: [L] int64, what tells the paths of a tree apart: a hash of the path, never its place in this call.
    turn: [L] int32, how many tool results the path holds.
    streak, siblings: [L] int32; value: [L] float32. None unless the policy reads it.
    base, weight, threshold, penalty are rounded to float32. width: children per wish, at least 0. seed: 64-bit, signed.

    No gradient flows through. ValueError: shape, dtype, device, policy or (on the CPU) a tree index is wrong. On a GPU
    a path whose tree index is out of range gets no children. BackendError: the backend named cannot serve.
    """
    arguments = (entropy_now, entropy_root, tree, room, key, turn, streak, siblings, value)
    call = checked_call("branch_points", *arguments, policy, base, weight, threshold, penalty, width, seed)
    return choose("branch_points", _POINTS, backend, entropy_now).run(*call)


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
    penalty: float = 0.05,
    streak: Tensor | None = None,
    siblings: Tensor | None = None,
    value: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Score [L] float32 and wish [L] int32 of each path before room is shared. Arguments as `branch_points`.

    `room` is checked but not read.
    """
    arguments = (entropy_now, entropy_root, tree, room, key, turn, streak, siblings, value)
    call = checked_call("branch_scores", *arguments, policy, base, weight, threshold, penalty, width, seed)
    return choose("branch_scores", _SCORES, backend, entropy_now).run(*call)


def aepo_initial_paths(entropy_root: Tensor, entropy_tool: Tensor, *, paths: int, slope: float = 0.5) -> Tensor:
    """Initial paths [T] int32 of each tree out of `paths` (k), the rest for branches: AEPO's pre-monitoring split.

        clamp(round(k * sigmoid(slope * (entropy_root - entropy_tool))), 1, k)

    entropy_root, entropy_tool: [T] floating point: mean entropy of the prompt's first tokens, and mean over the tool
        calls of one monitored trajectory, which counts as one of the k. NaN, no tool called: k, for nothing branches.
    slope: beta. Computed in float64, rounded half to even.
    Source: AEPO (arXiv 2510.14545); its published code takes int(k * sigmoid(...)) + 1 and leaves it off.
    """
    if paths < 1:
        raise ValueError(f"aepo_initial_paths: got paths {paths}; expected at least 1")
    if entropy_root.shape != entropy_tool.shape or entropy_root.device != entropy_tool.device:
        raise ValueError(
            f"aepo_initial_paths: got entropy_root of shape {list(entropy_root.shape)} on {entropy_root.device} and "
            f"entropy_tool of shape {list(entropy_tool.shape)} on {entropy_tool.device}; expected equal ones"
        )
    gap = entropy_root.to(torch.float64) - entropy_tool.to(torch.float64)
    initial = (paths * torch.sigmoid(slope * gap)).round().clamp(1, paths)
    return torch.where(initial.isnan(), paths, initial).to(torch.int32)


def _reference_scores(*arguments: Tensor | float | None) -> tuple[Tensor, Tensor]:
    call = BranchCall(*arguments)
    policy = next(name for name, code in POLICIES.items() if code == call.policy)
    return reference.branch_scores(**{**call._asdict(), "policy": policy})


def _reference_points(*arguments: Tensor | float | None) -> Tensor:
    call = BranchCall(*arguments)
    return reference.branch_points(*_reference_scores(*arguments), call.tree, call.room, call.key)


torch.library.define("arpo_ext::branch_points", f"{SCHEMA} -> Tensor")
torch.library.define("arpo_ext::branch_scores", f"{SCHEMA} -> (Tensor, Tensor)")

_SCORES = {
    "cpu": Backend(refuse_cpu, torch.ops.arpo_ext.branch_scores),
    "cuda": Backend(refuse_cuda, torch.ops.arpo_ext.branch_scores),
    "reference": Backend(lambda tensor: None, _reference_scores),
}
_POINTS = {
    "cpu": Backend(refuse_cpu, torch.ops.arpo_ext.branch_points),
    "cuda": Backend(refuse_cuda, torch.ops.arpo_ext.branch_points),
    "reference": Backend(lambda tensor: None, _reference_points),
}


@torch.library.register_fake("arpo_ext::branch_points")
def _branch_points_fake(entropy_now: Tensor, *rest: object) -> Tensor:
    return entropy_now.new_empty(entropy_now.shape, dtype=torch.int32)


@torch.library.register_fake("arpo_ext::branch_scores")
def _branch_scores_fake(entropy_now: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    # Contiguous, as the kernels leave them: empty_like would repeat the strides of the input.
    return entropy_now.new_empty(entropy_now.shape), entropy_now.new_empty(entropy_now.shape, dtype=torch.int32)


@torch.library.impl("arpo_ext::branch_points", ("cpu", "cuda"))
def _branch_points(*arguments: Tensor | float | None) -> Tensor:
    call = BranchCall(*arguments)
    children = torch.empty(call.tree.shape, dtype=torch.int32, device=call.tree.device)
    rule, paths, _kept = native_call(call)
    run = _native.C.branch_points_cpu if _native.device_kind(call.tree) == "cpu" else _native.C.branch_points_cuda
    run(rule, paths, children.data_ptr(), *_native.place(call.tree))
    return children


@torch.library.impl("arpo_ext::branch_scores", ("cpu", "cuda"))
def _branch_scores(*arguments: Tensor | float | None) -> tuple[Tensor, Tensor]:
    call = BranchCall(*arguments)
    score = torch.empty(call.tree.shape, dtype=torch.float32, device=call.tree.device)
    wish = torch.empty(call.tree.shape, dtype=torch.int32, device=call.tree.device)
    rule, paths, _kept = native_call(call)
    run = _native.C.branch_scores_cpu if _native.device_kind(call.tree) == "cpu" else _native.C.branch_scores_cuda
    run(rule, paths, score.data_ptr(), wish.data_ptr(), *_native.place(call.tree))
    return score, wish
