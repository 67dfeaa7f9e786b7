"""What the tests of the policy loss share: made-up tokens, and loss, gradients and sums written out in plain Python."""

import inspect
import math
from collections import defaultdict

import backends
import torch
from backends import everywhere

from arpo_ext import ops
from arpo_ext.ops import _native
from arpo_ext.ops._dispatch import CPU_BACKENDS
from arpo_ext.ops._policy_loss import checked_call

CPU = [name for name, isa in CPU_BACKENDS.items() if _native.cpu_missing(isa) is None]
FAST = [*CPU, *everywhere("cuda", "triton")]

CLIPS = [
    {},
    {"clip_low": 0.1, "clip_high": 0.28},
    {"clip": "dual", "dual_clip": 1.5},
    {"clip": "gppo"},
    {"clip": "gppo", "dual_clip": 1.5, "clip_low": 0.3},
    {"clip": "cispo"},
    {"clip": "cispo", "clip_low": 1.0, "clip_high": 0.5},
    {"clip": "sapo"},
    {"clip": "sapo", "tau_positive": 2.0, "tau_negative": 0.7},
]
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(ops.policy_loss).parameters.items()
    if parameter.default is not parameter.empty and name != "backend"
}
# (ratio, ratio_gradient)
RATIOS = [("token", "mean"), ("turn", "mean"), ("turn", "token"), ("sequence", "mean"), ("sequence", "token")]
TERMS = [
    {},
    {"importance": True},
    {"ref_logprob": True},
    {"kl": "k1", "kl_coef": 0.3},
    {"kl": "k2", "kl_coef": 0.3},
    {"kl": "k3", "kl_coef": 0.3, "entropy": True},
    {"entropy": True, "entropy_coef": 0.2, "importance": True},
]


def checked(*tokens, normalizer, **arguments):
    """The record of a call, as the op takes it."""
    return checked_call(*tokens, normalizer, **{**DEFAULTS, **arguments})


def made_tokens(count, seed=0, *, pair=False, spread=0.5, dtype=torch.float32):
    """logprob, old_logprob, advantage and weight; a third of the tokens has weight 0, which hides NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -normal(count).abs()
    new = old + spread * normal(count)
    advantage = normal(count, 2).abs() * torch.tensor([1.0, -1.0]) if pair else normal(count)
    weight = torch.rand(count, generator=generator, dtype=torch.float64)
    weight[::3] = 0
    tokens = [tensor.to(dtype) for tensor in (new, old, advantage, weight)]
    for tensor in tokens[:3]:
        tensor[::3] = math.nan
    return tokens


def made_terms(tokens, terms, seed=0):
    """`terms` with True (and what kl needs) replaced by tensors, NaN where the weight is 0."""
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(3, len(tokens[0]), generator=generator, dtype=torch.float64).to(tokens[0].dtype)
    made = {
        "ref_logprob": tokens[1] + 0.5 * noise[0],
        "importance": noise[1].abs(),
        "entropy": noise[2].abs(),
    }
    wanted = {name for name, value in terms.items() if value is True} | ({"ref_logprob"} if "kl" in terms else set())
    fixed = {name: value for name, value in terms.items() if value is not True}
    return fixed | {name: torch.where(tokens[3] == 0, math.nan, made[name]) for name in wanted}


def made_groups(count, ratio, seed=0, *, sizes=(1, 2, 7, 40), shuffle=False, dtype=torch.int64):
    """The map that `ratio` needs: runs of those sizes with ids in no order, -1 where weights are 0."""
    if ratio == "token":
        return {}
    generator = torch.Generator().manual_seed(seed)
    lengths = [sizes[i % len(sizes)] for i in range(count)]
    index = torch.repeat_interleave(torch.arange(count), torch.tensor(lengths))[:count]
    groups = int(index.max()) + 1
    index = torch.randperm(groups, generator=generator)[index]
    if shuffle:
        index = index[torch.randperm(count, generator=generator)]
    index[::3] = -1
    return {"segment" if ratio == "turn" else "row": index.to(dtype), "groups": groups + 2}


def device_of(backend):
    """Where a backend's tensors live; emulated CUDA kernels take those of the CPU."""
    return backends.device_of(backend) if _native.device_kind(torch.empty(0)) == "cpu" else "cpu"


def run(tokens, backend="auto", **arguments):
    """Loss, gradient and sums of one call; with entropy_coef the gradient is that of (logprob, entropy), stacked."""
    device = device_of(backend)
    tokens = [tensor.to(device) for tensor in tokens]
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    logprob = tokens[0].detach().clone().requires_grad_()
    inputs = [logprob]
    if "entropy_coef" in arguments:
        arguments["entropy"] = arguments["entropy"].detach().clone().requires_grad_()
        inputs.append(arguments["entropy"])
    loss, sums = ops.policy_loss(logprob, *tokens[1:], backend=backend, **arguments)
    gradients = torch.autograd.grad(loss, inputs)
    gradient = gradients[0] if len(gradients) == 1 else torch.stack(gradients)
    return loss.detach().cpu(), gradient.cpu(), ops.PolicyLossSums(*(value.cpu() for value in sums))


def sides(r, logprob, *, clip="ppo", clip_low=0.2, clip_high=0.2, dual_clip=None, tau_positive=1.0, tau_negative=1.05):
    """above, its derivative in log r (in logprob for cispo), below and its derivative, from the definition."""
    low, high, limit = 1 - clip_low, 1 + clip_high, dual_clip or math.inf
    if clip == "cispo":
        c = min(max(r, low), high)
        return c * logprob, c, c * logprob, c
    if clip == "sapo":
        gates = [
            1 / (1 + math.exp(-tau * (r - 1))) if tau * (r - 1) > -700 else 0.0 for tau in (tau_positive, tau_negative)
        ]
        values = [4 / tau * gate for tau, gate in zip((tau_positive, tau_negative), gates, strict=True)]
        slopes = [4 * gate * (1 - gate) * r for gate in gates]
        return values[0], slopes[0], values[1], slopes[1]
    over = high if clip == "gppo" else 0.0
    below, below_slope = (low, 0.0) if r < low else (r, r) if r <= limit else (limit, 0.0)
    return min(r, high), r if r <= high else over, below, below_slope


def naive(tokens, *, normalizer, ratio="token", ratio_gradient="mean", segment=None, row=None, groups=None, **rest):
    """Loss, gradient and sums from the definition, one token at a time, in float64. (No packed paths.)"""
    terms = {name: rest.pop(name, None) for name in ("importance", "ref_logprob", "entropy", "kl")}
    kl_coef, entropy_coef = rest.pop("kl_coef", 0.0), rest.pop("entropy_coef", None)
    columns = [t.double().tolist() for t in tokens]
    importance, ref, entropy = (
        None if terms[name] is None else terms[name].tolist() for name in ("importance", "ref_logprob", "entropy")
    )
    new, old, advantage, weight = columns
    trained = [t for t in range(len(new)) if weight[t] != 0]
    index = segment if segment is not None else row
    members = defaultdict(list)
    for t in trained:
        members[t if ratio == "token" else int(index[t])].append(t)
    sums = dict.fromkeys(ops.PolicyLossSums._fields, 0.0)
    loss, gradient, entropy_gradient = 0.0, [0.0] * len(new), [0.0] * len(new)
    for group in members.values():
        y = sum(new[t] - old[t] for t in group) / len(group)
        r = math.exp(min(max(y, -20.0), 20.0))
        slopes = []
        for t in group:
            w, a = weight[t], advantage[t]
            positive, negative = a if isinstance(a, list) else (w * max(a, 0.0), w * min(a, 0.0))
            factor = 1.0 if importance is None else importance[t]
            positive, negative = positive * factor, negative * factor
            above, above_slope, below, below_slope = sides(r, new[t], **rest)
            loss -= positive * above + negative * below
            slopes.append(positive * above_slope + negative * below_slope)
            cispo, sapo = rest.get("clip") == "cispo", rest.get("clip") == "sapo"
            low, high = 1 - rest.get("clip_low", 0.2), 1 + rest.get("clip_high", 0.2)
            sums["clipped_high"] += w * (r > high and (positive > 0 or cispo) and not sapo)
            sums["clipped_low"] += w * (r < low and (negative < 0 or cispo) and not sapo)
            sums["dual_clipped"] += w * (negative < 0 and r > (rest.get("dual_clip") or math.inf))
            sums["ratio_sum"] += w * r
            sums["ratio_max"] = max(sums["ratio_max"], r)
        if abs(y) > 20 and not cispo:
            slopes = [0.0] * len(group)
        if ratio_gradient == "mean" and not cispo:
            slopes = [sum(slopes) / len(group)] * len(group)
        for t, slope in zip(group, slopes, strict=True):
            gradient[t] = -slope
    for t in trained:
        w, x = weight[t], new[t] - old[t]
        guarded = math.exp(min(max(x, -20.0), 20.0))
        add = {"weight": w, "tokens": 1, "kl_k1": -w * x, "kl_k2": w * x * x / 2, "kl_k3": w * (guarded - 1 - x)}
        sums["log_ratio_max"] = max(sums["log_ratio_max"], abs(x))
        if ref is not None:
            d = new[t] - ref[t]
            g = min(max(d, -20.0), 20.0)
            values = {"k1": d, "k2": d * d / 2, "k3": math.exp(-g) - 1 + g}
            slopes = {"k1": 1.0, "k2": d, "k3": (1 - math.exp(-g)) if abs(d) <= 20 else 0.0}
            add |= {f"ref_kl_{name}": w * value for name, value in values.items()}
            if terms["kl"] is not None:
                loss += kl_coef * w * values[terms["kl"]]
                gradient[t] += kl_coef * w * slopes[terms["kl"]]
        if entropy is not None:
            add["entropy"] = w * entropy[t]
            loss -= (entropy_coef or 0.0) * w * entropy[t]
            entropy_gradient[t] = -(entropy_coef or 0.0) * w
        for name, value in add.items():
            sums[name] += value
    sums["clipped"] = sums["clipped_high"] + sums["clipped_low"]
    both = [gradient, entropy_gradient] if entropy_coef is not None else gradient
    return loss / normalizer, torch.tensor(both, dtype=torch.float64) / normalizer, sums


def in_double(arguments):
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def far_from_bounds(r, /, *, clip_low=0.2, clip_high=0.2, dual_clip=None, **_):
    """Where a ratio that is off by some roundings falls on the same side of every bound."""
    bounds = torch.tensor([1 - clip_low, 1 + clip_high, dual_clip or 1 + clip_high], dtype=torch.float64)
    return ((r[..., None] - bounds).abs() > 1e-5 * bounds.clamp(min=0.1)).all(dim=-1)


def group_ratios(tokens, segment=None, row=None, **_):
    """Ratio of each token in float64; 1 where the weight is 0."""
    trained = tokens[3] != 0
    x = torch.where(trained, tokens[0].double() - tokens[1].double(), 0.0)
    index = segment if segment is not None else row
    if index is not None:
        index = torch.where(trained, index, 0).long()
        zeros = torch.zeros(int(index.max()) + 1, dtype=torch.float64)
        count = zeros.index_add(0, index, trained.double())
        x = (zeros.index_add(0, index, x) / count.clamp(min=1))[index]
    return torch.where(trained, x.clamp(-20, 20).exp(), 1.0)


def assert_as_close_as_plain_torch(tokens, backend, **arguments):
    """Loss, gradients and sums no further from float64 than the reference in float32 is, and a little."""
    doubles = [t.double() for t in tokens]
    true_loss, true_gradient, true_sums = run(doubles, "reference", **in_double(arguments))
    plain_loss, plain_gradient, plain_sums = run(tokens, "reference", **arguments)
    loss, gradient, sums = run(tokens, backend, **arguments)
    magnitude = true_gradient.abs()
    assert abs(loss - true_loss) <= abs(plain_loss - true_loss) + 2e-6 * magnitude.sum() + 2e-6 * abs(true_loss) + 1e-9
    sure = far_from_bounds(group_ratios(tokens, **arguments), **arguments)
    assert sure.float().mean() > 0.95
    error, plain_error = (gradient - true_gradient).abs(), (plain_gradient - true_gradient).abs()
    scale = magnitude + magnitude.mean()
    assert ((error <= plain_error + 2e-6 * scale) | ~sure).all(), (error - plain_error).max()
    unsure = tokens[3][~sure].double().sum()
    for name, value, plain, true in zip(sums._fields, sums, plain_sums, true_sums, strict=True):
        slack = unsure if "clipped" in name else 2e-6 * sums.weight
        assert abs(value - true) <= abs(plain - true) + 3e-6 * abs(true) + slack, name
