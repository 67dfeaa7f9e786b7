"""The clipped policy loss over tokens: loss, gradient and every metric from one read of the inputs.

With x = logprob - old_logprob and, per token,

    advantage [N]     P = weight * max(advantage, 0),  M = weight * min(advantage, 0)
    advantage [N, 2]  P, M = advantage: sums over the rows that share the token, weights already in them

(both times `importance` where given), the ratio is, by `ratio`,

    token     r = exp(clamp(x, -20, 20))
    turn      r = exp(clamp(mean of x over the tokens of the same segment, -20, 20))      (AT2PO, arXiv 2601.04767)
    sequence  the same over the tokens of the same row                                    (GSPO, arXiv 2507.18071)

and the loss, with low = 1 - clip_low, high = 1 + clip_high and sg() a value without gradient,

    loss = (kl_coef * sum(weight * kl) - sum(P * above + M * below) - entropy_coef * sum(weight * entropy)) / normalizer

    clip    above                             below
    ppo     min(r, high)                      max(r, low)                         (arXiv 1707.06347)
    dual    min(r, high)                      min(max(r, low), dual_clip)         (arXiv 1912.09729)
    gppo    r, or high / sg(r) * r if r > high  max(r, low), at most dual_clip    (AEPO, arXiv 2510.14545)
    cispo   sg(clamp(r, low, high)) * logprob  the same                           (MiniMax-M1, arXiv 2506.13585)
    sapo    4 / tau_positive * sigmoid(tau_positive * (r - 1)), and below with tau_negative   (arXiv 2511.20347)

For [N] the first line is the usual max(-A * r, -A * clamp(r, low, high)). Every clip is linear in P and in M, so for
[N, 2] the loss equals the sum over the rows, which a mean advantage does not where a clipped token has rows of both
signs. gppo has the values of ppo; a good token above `high` keeps the gradient `high` instead of none.

With d = logprob - ref_logprob and g = clamp(d, -20, 20), `kl` is an estimate of KL(policy || reference) from Schulman
(http://joschu.net/blog/kl-approx.html), added with its own derivative in logprob, as autograd of the formula has it:

    k1  d                  gradient 1: zero in expectation, so useful as a metric or inside a reward
    k2  d^2 / 2            gradient d: unbiased for the gradient of the KL on fresh samples
    k3  exp(-g) - 1 + g    gradient 1 - exp(-g): the usual one (verl's low_var_kl, without its bound of 10; TRL, GRPO)

Where the mean under a ratio's exp, or x itself, lies outside [-20, 20] the gradient is 0 (not for cispo, whose ratio
has none), as in verl. At r equal to a bound the gradient passes, as through `torch.clamp`. Nothing of a token of weight
0 counts: its other inputs may be NaN, its gradient is 0. A NaN elsewhere makes the loss NaN,
and one that the gradient depends on that gradient, so that no step is taken with it. `normalizer` is the sum of
`weight` over all ranks and micro-batches of the step, so that the losses and gradients of any split into micro-batches
(of whole segments or rows, if ratios span them) add up to those of the whole.

What is a factor of the advantage needs no argument. AEPO's entropy-aware advantage, with statistics of the whole step:
`advantage * (1 + a * (entropy.detach() - entropy_mean) / entropy_std)`. `importance` is one too, kept for the [N, 2]
form and for callers whose advantages are expanded from rows.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from arpo_ext.ops._dispatch import choose
from arpo_ext.ops._policy_loss import checked_call
from arpo_ext.ops._policy_loss_op import BACKENDS


class PolicyLossSums(NamedTuple):
    """Sums over the tokens of nonzero weight w, as 0-d float64 tensors without gradient.

    To average one, divide by `weight`; sums (not the two maxima) of several calls and ranks add up. r is the ratio that
    is clipped, x the token's own log ratio. Packed paths count per leaf: w is its leaf_weight, once for each token.
    """

    weight: Tensor  # sum of w
    tokens: Tensor  # number of tokens
    clipped: Tensor  # clipped_high + clipped_low
    clipped_high: Tensor  # sum of w where P > 0 and r > high; of any sign for cispo; 0 for sapo
    clipped_low: Tensor  # sum of w where M < 0 and r < low; of any sign for cispo; 0 for sapo
    dual_clipped: Tensor  # sum of w where M < 0 and r > dual_clip
    ratio_sum: Tensor  # sum of w * r
    ratio_max: Tensor  # largest r; 0 without tokens
    kl_k1: Tensor  # sum of w * -x: estimates KL(old || new), nats
    kl_k3: Tensor  # sum of w * (exp(x) - 1 - x): the same, never negative (http://joschu.net/blog/kl-approx.html)
    log_ratio_max: Tensor  # largest |x|; 0 without tokens
    kl_k2: Tensor  # sum of w * x^2 / 2: the same, biased, of little variance
    ref_kl_k1: Tensor  # sum of w * k1 against the reference; this and the next two 0 without ref_logprob
    ref_kl_k2: Tensor  # sum of w * k2
    ref_kl_k3: Tensor  # sum of w * k3
    entropy: Tensor  # sum of w * entropy; 0 without entropy


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    *,
    normalizer: float | Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio: str = "token",
    clip: str = "ppo",
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    ratio_gradient: str = "mean",
    segment: Tensor | None = None,
    row: Tensor | None = None,
    groups: int | None = None,
    parent: Tensor | None = None,
    leaf_segment: Tensor | None = None,
    leaf_weight: Tensor | None = None,
    importance: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    kl: str | None = None,
    kl_coef: float | Tensor = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: float | Tensor = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, PolicyLossSums]:
    """Loss (0-d, dtype of logprob) and its sums, over N tokens.

    logprob: [N] float32, nats, of the policy in training; differentiable. float64 is computed in float64, by the
        reference.
    old_logprob: [N], of the policy that sampled. advantage: [N] or [N, 2]. weight: [N], at least 0. All floating inputs
        are of logprob's dtype and device.
    normalizer, kl_coef, entropy_coef: a number, or a 0-d tensor on the CPU or on logprob's device, for which nothing
        waits. normalizer is above 0. Once `torch.compile` has seen one of these, or of the clip's numbers, change,
        further values of it compile nothing.
    clip_low in [0, 1], clip_high at least 0; dual_clip above 1, required by "dual", optional for "gppo", else None;
        tau_positive, tau_negative above 0, read by "sapo" only.

    segment (for ratio "turn"), row (for "sequence"): [N] int32 or int64, the token's segment or row, in [0, groups);
        any order, fast where equal ones stand together. Means are over tokens of nonzero weight, each counting once.
    groups: the number of segments or rows, or more; None: N. Memory is proportional to it.
    ratio_gradient: "mean": the ratio's own gradient, which a mean spreads evenly over its tokens (GSPO, equation 5).
        "token": sg(r) * exp(logprob - sg(logprob)), each token with its own advantage (GSPO-token, equation 13; verl's
        "gspo", AT2PO's code). Same value, and the same gradient where weight * advantage is one number per group.
    parent [S], leaf_segment [L]: integers, for ratio "sequence" over packed trees, where a token stands once for all
        rows that share it. `segment` maps tokens to the S segments, parent[s] is in [-1, s), leaf_segment is where each
        of the L rows ends; a row is the path from there to the root. Then advantage is [L], leaf_weight [L] the weight
        of each token of that row (None: 1), and `weight` their sum over the rows that hold the token. Loss and gradient
        equal those of the flat rows. There is no importance (multiply leaf_weight) and no [N, 2] form.
        For "token" and "turn" a shared token has one ratio in all rows: use advantage [N, 2].
    importance: [N], at least 0, multiplies the policy term without a gradient: truncated importance sampling
        is `(old_logprob - sampler_logprob).exp().clamp(max=C)`.
    ref_logprob: [N], of the reference policy; needed by `kl`, measured in the sums in any case.
    entropy: [N], nats, of the policy in training; differentiable; needed by `entropy_coef`, else measured only.

    ValueError: a shape, dtype, device or number is wrong; on the CPU also a segment, row or parent out of range, which
    elsewhere makes the loss NaN. BackendError: the backend named cannot serve.
    """
    call = checked_call(
        logprob,
        old_logprob,
        advantage,
        weight,
        normalizer,
        ratio=ratio,
        ratio_gradient=ratio_gradient,
        segment=segment,
        row=row,
        groups=groups,
        parent=parent,
        leaf_segment=leaf_segment,
        leaf_weight=leaf_weight,
        clip=clip,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        tau_positive=tau_positive,
        tau_negative=tau_negative,
        importance=importance,
        ref_logprob=ref_logprob,
        kl=kl,
        kl_coef=kl_coef,
        entropy=entropy,
        entropy_coef=entropy_coef,
    )
    loss, sums = choose("policy_loss", BACKENDS, backend, call).run(call)
    return loss, PolicyLossSums(*sums.unbind())
