"""Published algorithms as configurations: `algorithm: dapo` stands for the keys that `dapo()` returns.

Every one names the same keys, so choosing another leaves nothing of the first behind, and each key can be overridden
by itself. They differ in nothing else: one loop, one loss. Notation: r reward of a rollout, A advantage, y_i the tokens
the model wrote in rollout i, rho = p / p_old of a token, clip(rho) its value within [1 - clip_low, 1 + clip_high].
Clip bounds are those of the paper or of its published settings; learning rate, batch and rollout budget are the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Preset = Mapping[str, Mapping[str, Any]]


def _preset(rollout_policy: str, **train: Any) -> Preset:
    """GRPO's keys with changes."""
    keys = {
        "estimator": "grpo",
        "whiten": False,
        "credit": "soft",
        "entropy_advantage": 0.0,
        "overlong_share": 0.0,
        "dynamic_sampling": 0,
        "ratio": "token",
        "clip": "ppo",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": None,
        "importance_cap": 2.0,
        "old_logprob": "sampler",
        "loss_scale": "sequence_mean",
        "kl": "k3",
        "kl_coef": 0.0,
        "entropy_coef": 0.0,
    }
    return {"rollout": {"policy": rollout_policy}, "train": keys | train}


def arpo() -> Preset:
    """ARPO, arXiv 2507.19849: rollouts that branch after tool results (Eq. 4 and 5), soft credit (section 4.1).

    A = (r - mean) / std over all leaves of the tree. Eq. 6: mean over rollouts of the mean over y_i of
    min(rho * A, clip(rho) * A). The published code takes the mean over tokens and a dual clip instead:
    `train.loss_scale=token_mean train.dual_clip=3`.
    """
    return _preset("paper")


def arpo_hard() -> Preset:
    """ARPO with hard credit (arXiv 2507.19849, section 4.1): shared tokens get the mean of their leaves."""
    return _preset("paper", credit="hard")


def arpo_turn() -> Preset:
    """ARPO with AT2PO's credit (arXiv 2601.04767): a segment gets the entropy-weighted mean over its children."""
    return _preset("paper", credit="turn")


def aepo() -> Preset:
    """AEPO, arXiv 2510.14545: entropy-balanced branching, clip and advantage.

    clip gppo: a good token above the bound keeps the gradient (1 + clip_high) * A * grad log p instead of none, a bad
    one below loses it. A * (1 + 0.2 * (H - mean(H)) / std(H)) with the token's entropy H. Mean over tokens. The
    published code takes mean and std within a micro-batch and leaves the entropy term out by default.
    """
    return _preset("aepo", clip="gppo", entropy_advantage=0.2, loss_scale="token_mean")


def at2po() -> Preset:
    """AT2PO, arXiv 2601.04767: complete chains, then siblings of the most uncertain turns; everything by turn.

    V(leaf) = (r - mean) / std, V(turn) = sum(e^H V) / sum(e^H) over its children, A = V. The ratio of a turn is the
    geometric mean of its tokens' rho, clipped to [1 - 3e-3, 1 + 4e-3]. Mean over rollouts of the mean over tokens. In
    low precision sampler and trainer differ by more than that clip, so the ratio is against the trainer's own.
    """
    return _preset("at2po", credit="turn", ratio="turn", clip_low=3e-3, clip_high=4e-3, old_logprob="trainer")


def grpo() -> Preset:
    """GRPO, arXiv 2402.03300, Eq. 3 and 4: A = (r - mean) / std, mean over rollouts of the mean over y_i.

    The paper's KL term, k3 with 0.04, is `train.kl_coef=0.04`; agents are trained without it since (ARPO, DAPO).
    """
    return _preset("chain")


def dr_grpo() -> Preset:
    """Dr. GRPO, arXiv 2503.20783: A = r - mean, and the sum over tokens over a constant length, `train.loss_length`."""
    return _preset("chain", estimator="dr_grpo", loss_scale="constant")


def dapo() -> Preset:
    """DAPO, arXiv 2503.14476: clip-higher 0.28, mean over tokens (Eq. 12), no KL.

    Dynamic sampling (Eq. 11): prompts whose rollouts all have one reward are replaced, here at most 3 times a step.
    Soft overlong punishment (Eq. 13): over the last fifth of the response budget a rollout loses up to 1.
    """
    own = {"clip_high": 0.28, "dynamic_sampling": 3, "overlong_share": 0.2, "loss_scale": "token_mean"}
    return _preset("chain", **own)


def reinforce_pp() -> Preset:
    """REINFORCE++, arXiv 2501.03262: A = (r - mean) / std over all tokens of the step, no baseline by prompt.

    PPO's clip, mean over tokens. The paper's KL penalty in the reward, coefficient 0 here, is a term of the loss
    instead, `train.kl_coef` with k2; on fresh samples and before A is normalised their gradients are the same.
    """
    return _preset("chain", estimator="none", whiten=True, loss_scale="token_mean", kl="k2")


def reinforce_pp_baseline() -> Preset:
    """REINFORCE++-baseline, arXiv 2501.03262: r - mean of the prompt, then mean and std over all tokens of the step."""
    return _preset("chain", estimator="dr_grpo", whiten=True, loss_scale="token_mean", kl="k2")


def rloo() -> Preset:
    """RLOO, arXiv 2402.14740: A = r - mean of the other rollouts; a rollout is one action, so its tokens are summed.

    grad = mean over rollouts of A * grad log p(y_i). PPO's clip never acts with one update per step.
    """
    return _preset("chain", estimator="rloo", loss_scale="sequence_sum")


def gspo() -> Preset:
    """GSPO, arXiv 2507.18071: the ratio of a rollout is the geometric mean of its tokens' rho (Eq. 5 to 7).

    Clipped to [1 - 3e-4, 1 + 4e-4]; mean over rollouts. As with `at2po`, against the trainer's own log-probabilities.
    """
    return _preset("chain", ratio="sequence", clip_low=3e-4, clip_high=4e-4, old_logprob="trainer")


def cispo() -> Preset:
    """CISPO, MiniMax-M1, arXiv 2506.13585, Eq. 4: sg(min(rho, 5)) * A * log p, mean over tokens; no token loses it all.

    There is no lower bound. The upper one is the 5 that ScaleRL (arXiv 2510.13786) settled on; the paper gives none.
    """
    return _preset("chain", clip="cispo", clip_low=1.0, clip_high=4.0, importance_cap=5.0, loss_scale="token_mean")


ALGORITHMS: Mapping[str, Callable[[], Preset]] = {
    preset.__name__: preset
    for preset in (
        arpo,
        arpo_hard,
        arpo_turn,
        aepo,
        at2po,
        grpo,
        dr_grpo,
        dapo,
        reinforce_pp,
        reinforce_pp_baseline,
        rloo,
        gspo,
        cispo,
    )
}
