"""The policy loss against the losses that verl and TRL ship, values and gradients, in float64."""

import types
from collections import defaultdict

import pytest
import torch

from arpo_ext import ops
from benchmarks import _installed, _peers
from benchmarks._harness import Unavailable

ROWS, POSITIONS = 6, 40


class VerlConfig(dict):
    def __getattr__(self, name):
        return self[name]


VERL = VerlConfig(
    clip_ratio=0.2,
    clip_ratio_low=0.2,
    clip_ratio_high=0.28,
    clip_ratio_c=1.6,
    tau_pos=1.0,
    tau_neg=1.05,
    global_batch_info={},
)


def verl(name):
    """A function of verl's core_algos.py; the test is skipped where verl is absent."""
    try:
        path = _installed.folder("verl")
        functional = _installed.functions(path / "utils" / "torch_functional.py", ["masked_sum", "masked_mean"])
    except Unavailable as error:
        pytest.skip(str(error))
    given = {
        "verl_F": types.SimpleNamespace(**functional),
        "register_policy_loss": _installed.keep,
        "AlgoConfig": types.SimpleNamespace,
        "ActorConfig": VerlConfig,
    }
    return _installed.functions(path / "trainer" / "ppo" / "core_algos.py", [name], given)[name]


def batch(spread=0.4):
    """logprob, old_logprob, advantage of each token and mask; [B, T]."""
    generator = torch.Generator().manual_seed(3)
    old = -torch.randn(ROWS, POSITIONS, generator=generator, dtype=torch.float64).abs()
    new = old + spread * torch.randn(ROWS, POSITIONS, generator=generator, dtype=torch.float64)
    advantage = torch.randn(ROWS, POSITIONS, generator=generator, dtype=torch.float64)
    mask = (torch.rand(ROWS, POSITIONS, generator=generator) > 0.3).double()
    return new.requires_grad_(), old, advantage, mask


def ours(new, old, advantage, weight, normalizer, **arguments):
    row = torch.arange(ROWS).repeat_interleave(POSITIONS)
    if arguments.get("ratio") == "sequence":
        arguments["row"] = row
    flat = [t.reshape(-1) for t in (new, old, advantage, weight)]
    flattened = {
        name: value.reshape(-1) if name in ("importance", "ref_logprob", "entropy") else value
        for name, value in arguments.items()
        if value is not None
    }
    return ops.policy_loss(*flat, normalizer=normalizer, backend="reference", **flattened)


def assert_equal(theirs, mine, logprob):
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    grad_theirs, grad_mine = (torch.autograd.grad(loss, logprob)[0] for loss in (theirs, mine))
    torch.testing.assert_close(grad_mine, grad_theirs, rtol=1e-10, atol=1e-14)


def sequence_mean(mask):
    """Weights of verl's seq-mean-token-mean: 1 / (rows * tokens of the row)."""
    return mask / mask.sum(1, keepdim=True) / len(mask)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("compute_policy_loss_vanilla", {"clip": "dual", "dual_clip": 1.6}),
        ("compute_policy_loss_gspo", {"ratio": "sequence", "ratio_gradient": "token"}),
        ("compute_policy_loss_cispo", {"clip": "cispo"}),
    ],
)
@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("mean", ["token-mean", "seq-mean-token-mean"])
def test_verl_has_the_same_loss(name, arguments, importance, mean):
    new, old, advantage, mask = batch()
    weights = torch.rand_like(old) if importance else None
    theirs, metrics = verl(name)(old, new, advantage, mask, mean, VERL, weights)
    token_mean = mean == "token-mean"
    weight, normalizer = (mask, mask.sum()) if token_mean else (sequence_mean(mask), 1.0)
    mine, sums = ours(new, old, advantage, weight, normalizer, clip_high=0.28, importance=weights, **arguments)
    # verl divides by the number of tokens of a row + 1e-8.
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
    grad_theirs, grad_mine = (torch.autograd.grad(loss, new)[0] for loss in (theirs, mine))
    torch.testing.assert_close(grad_mine, grad_theirs, rtol=1e-8, atol=1e-12)
    if token_mean:
        assert metrics["actor/ppo_kl"] == pytest.approx(float(sums.kl_k1 / sums.weight))
        assert metrics["actor/pg_clipfrac"] == pytest.approx(float(sums.clipped / sums.weight))
        assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(float(sums.dual_clipped / sums.weight))


def test_verl_has_the_same_soft_gate():
    new, old, advantage, mask = batch()
    theirs, _ = verl("compute_policy_loss_sapo")(old, new, advantage, mask, "seq-mean-token-mean", VERL)
    mine, _ = ours(new, old, advantage, sequence_mean(mask), 1.0, clip="sapo")
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
    grad_theirs, grad_mine = (torch.autograd.grad(loss, new)[0] for loss in (theirs, mine))
    torch.testing.assert_close(grad_mine, grad_theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("theirs", "kl"), [("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3")])
def test_verl_has_the_same_estimates_of_the_kl(theirs, kl):
    new, old, advantage, mask = batch()
    ref = old + 0.3 * torch.randn_like(old)
    expected = (verl("kl_penalty")(new, ref, theirs) * mask).sum() * 0.3 / mask.sum()
    arguments = {"ref_logprob": ref, "kl": kl, "kl_coef": 0.3}
    mine, sums = ours(new, old, torch.zeros_like(advantage), mask, mask.sum(), **arguments)
    assert_equal(expected, mine, new)
    assert float(getattr(sums, f"ref_kl_{kl}") * 0.3 / mask.sum()) == pytest.approx(float(expected.detach()))


TRL = {
    "aux_loss_enabled": False,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "use_vllm": False,
    "current_gradient_accumulation_steps": 1,
    "_entropy_bonus_enabled": False,
    "use_adaptive_entropy": False,
    "entropy_coef": 0.1,
    "model": types.SimpleNamespace(training=True),
    "accelerator": types.SimpleNamespace(
        num_processes=1, gather=lambda value: value, reduce=lambda value, reduction: value, sync_gradients=True
    ),
    "args": types.SimpleNamespace(
        delta=None,
        steps_per_generation=1,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        use_bias_correction_kl=False,
    ),
}


@pytest.mark.parametrize(
    ("settings", "arguments", "per_row"),
    [
        ({"loss_type": "dapo"}, {}, False),
        ({"loss_type": "dapo", "importance_sampling_level": "sequence"}, {"ratio": "sequence"}, False),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"ratio": "sequence"}, True),
        ({"loss_type": "cispo", "epsilon_high": 1.3}, {"clip": "cispo", "clip_low": 1.0, "clip_high": 0.3}, False),
        # TRL's torch.where of two numbers makes the temperature float32.
        ({"loss_type": "sapo"}, {"clip": "sapo", "tau_negative": float(torch.tensor(1.05))}, True),
        ({"loss_type": "dapo", "beta": 0.2}, {"kl": "k3", "kl_coef": 0.2}, False),
        ({"loss_type": "dapo", "_entropy_bonus_enabled": True}, {"entropy_coef": 0.1}, False),
    ],
    ids=str,
)
def test_trl_has_the_same_loss(settings, arguments, per_row):
    try:
        compute = _peers._trl_compute_loss()
    except Unavailable as error:
        pytest.skip(str(error))
    new, old, advantage, mask = batch()
    advantage = advantage[:, :1].expand(-1, POSITIONS)
    ref, entropy = old + 0.3 * torch.randn_like(old), torch.rand_like(old)
    values = {"importance_sampling_level": "token", "beta": 0.0, **TRL, **settings}
    trainer = types.SimpleNamespace(
        **values,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, entropy, None),
    )
    nothing = mask[:, :0]
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": advantage[:, 0],
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    if "kl" in arguments:
        arguments = {**arguments, "ref_logprob": ref}
    if "entropy_coef" in arguments:
        arguments = {**arguments, "entropy": entropy}
    weight, normalizer = (sequence_mean(mask), 1.0) if per_row else (mask, mask.sum())
    bounds = {"clip_high": 0.28} | arguments
    assert_equal(compute(trainer, None, inputs), ours(new, old, advantage, weight, normalizer, **bounds)[0], new)
