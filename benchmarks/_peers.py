"""What other packages offer for the same ops, each as one callable; Unavailable where it cannot be had.

All versions are those of `_installed.PEERS`. Logits are [N, V], hidden [N, D], weight [V, D], labels [N]; per-token
tensors [B, T]. The callables are the packages' own; adapters only order arguments and name what is returned.
"""

from __future__ import annotations

import contextlib
import types
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ._harness import Unavailable
from ._installed import folder, functions, keep, module, place_module

LogprobEntropy = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
LinearLogprobEntropy = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# TRL's own tile widths (trl/trainer/utils.py `_CHUNKED_LOGPROB_CHUNK_SIZE`).
_TRL_VOCAB_CHUNK = 32_768


def _device_name() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _needs_cuda(what: str) -> None:
    if not torch.cuda.is_available():
        raise Unavailable(f"{what} needs an NVIDIA GPU")


@cache
def trl_eager() -> LogprobEntropy:
    """`selective_log_softmax_and_entropy` of trl/trainer/utils.py as it runs where its Triton kernel does not."""
    path = folder("trl") / "trainer" / "utils.py"
    name = "selective_log_softmax_and_entropy"
    return functions(path, [name], {"is_triton_available": lambda: False})[name]


@cache
def trl_triton() -> LogprobEntropy:
    """`selective_log_softmax_and_entropy` of trl/kernels/logprob_entropy.py; on the CPU under Triton's interpreter."""
    return module("trl", "kernels.logprob_entropy").selective_log_softmax_and_entropy


@cache
def _trl_chunked() -> types.ModuleType:
    """trl/kernels/chunked_logprob.py, whose backward imports one function of the trainers."""
    gather = "maybe_gather_lm_head_ctx"
    place_module("trl", "trainer.utils", functions(folder("trl") / "trainer" / "utils.py", [gather]))
    return module("trl", "kernels.chunked_logprob")


@cache
def trl_linear() -> LinearLogprobEntropy:
    """`ChunkedLogProbFunction`, asked for the logprob and the entropy."""
    chunked = _trl_chunked().ChunkedLogProbFunction

    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return chunked.apply(hidden, weight, None, labels, 1.0, _TRL_VOCAB_CHUNK, None, 1.0, ("entropy",))[:2]

    return call


@cache
def _trl_compute_loss() -> Callable[..., Tensor]:
    """`GRPOTrainer._compute_loss`, the body of TRL's GRPO loss with its metrics."""
    utils = functions(folder("trl") / "trainer" / "utils.py", ["nanmin", "nanmax"])
    name = "GRPOTrainer._compute_loss"
    return functions(folder("trl") / "trainer" / "grpo_trainer.py", [name], utils)[name]


def _trl_trainer(dual_clip: float | None, **settings: Any) -> types.SimpleNamespace:
    """What `_compute_loss` and what it calls read of their trainer, in one process."""
    alone = types.SimpleNamespace(
        num_processes=1,
        gather=lambda value: value,
        reduce=lambda value, reduction: value,
        sync_gradients=True,
        autocast=contextlib.nullcontext,
    )
    fixed = {
        "aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False,
        "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False,
        "accelerator": alone, "model": types.SimpleNamespace(training=True), "_metrics": {"train": defaultdict(list)},
        "args": types.SimpleNamespace(delta=dual_clip, steps_per_generation=1, use_bias_correction_kl=False),
    }  # fmt: skip
    return types.SimpleNamespace(**fixed, **settings)


def trl_policy_loss(
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    *,
    loss_type: str = "dapo",
    level: str = "token",
    length: int | None = None,
    beta: float = 0.0,
) -> Callable[..., Tensor]:
    """(logprob, old_logprob, advantage, mask, entropy[, ref_logprob]) -> loss of TRL for one process, metrics too.

    The trainer is a stand-in that holds the settings and hands the given logprobs to the loss. `dual_clip` is TRL's
    `delta`, which bounds the ratio for either sign of the advantage. level: of the ratio. length: what "dr_grpo"
    divides by. beta: the KL coefficient.
    """
    compute = _trl_compute_loss()
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": length}
    settings |= {"epsilon_low": clip_low, "epsilon_high": clip_high, "beta": beta}

    def call(
        logprob: Tensor,
        old_logprob: Tensor,
        advantage: Tensor,
        mask: Tensor,
        entropy: Tensor,
        ref_logprob: Tensor | None = None,
    ) -> Tensor:
        trainer = _trl_trainer(dual_clip, **settings)
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprob, entropy, None)
        nothing = mask[:, :0]
        inputs = {
            "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": mask, "completion_mask": mask,
            "advantages": advantage, "old_per_token_logps": old_logprob, "num_items_in_batch": mask.sum(),
            "ref_per_token_logps": ref_logprob,
        }  # fmt: skip
        return compute(trainer, None, inputs)

    return call


def trl_model_loss(model: Any, clip_low: float, clip_high: float) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A batch of rows -> loss of TRL's GRPO step ("dapo" token mean, one process) on a transformers model.

    `add_fused_lm_head` is put on the model, which goes on serving other callers; then come the trainer's
    `_get_per_token_logps_and_entropies` and `_compute_loss`, on a stand-in that holds the settings. The batch is that
    of `_compute_loss`, "num_items_in_batch" included.
    """
    chunked = _trl_chunked()
    given = {"_ChunkedLogProbFunction": chunked.ChunkedLogProbFunction, "_use_triton": chunked._use_triton}
    head = "add_fused_lm_head"
    functions(folder("trl") / "trainer" / "utils.py", [head], given)[head](model, 1.0, outputs=("log_probs", "entropy"))
    name, undecorated = "GRPOTrainer._get_per_token_logps_and_entropies", {"profiling_decorator": lambda method: method}
    read = functions(folder("trl") / "trainer" / "grpo_trainer.py", [name], undecorated)[name]
    settings = {"loss_type": "dapo", "importance_sampling_level": "token", "beta": 0.0}
    trainer = _trl_trainer(None, **settings, epsilon_low=clip_low, epsilon_high=clip_high)
    trainer._get_per_token_logps_and_entropies = types.MethodType(read, trainer)
    return lambda batch: _trl_compute_loss()(trainer, model, batch)


@cache
def _verl_functional() -> Mapping[str, Any]:
    names = ["logprobs_from_logits", "entropy_from_logits", "entropy_from_logits_with_chunking"]
    names += ["calculate_sum_pi_squared_from_logits", "masked_sum", "masked_mean"]
    return functions(folder("verl") / "utils" / "torch_functional.py", names)


def verl_eager() -> LogprobEntropy:
    """`logprobs_from_logits` and `entropy_from_logits`, as the FSDP engine calls them by default."""
    of = _verl_functional()
    return lambda logits, labels: (of["logprobs_from_logits"](logits, labels), of["entropy_from_logits"](logits))


def verl_chunked() -> LogprobEntropy:
    """The same with `entropy_from_logits_with_chunking`: in float32, 2048 rows at a time."""
    of = _verl_functional()
    entropy = of["entropy_from_logits_with_chunking"]
    return lambda logits, labels: (of["logprobs_from_logits"](logits, labels), entropy(logits))


def verl_sum_of_squares() -> Callable[[Tensor], Tensor]:
    """`calculate_sum_pi_squared_from_logits`."""
    return _verl_functional()["calculate_sum_pi_squared_from_logits"]


@cache
def verl_linear() -> LinearLogprobEntropy:
    """`FusedLinearForPPO(impl_backend="torch")`: 512 tokens at a time."""
    path = folder("verl") / "utils" / "experimental" / "torch_functional.py"
    given = {"_LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY": None}
    return functions(path, ["FusedLinearForPPO"], given)["FusedLinearForPPO"]()


@cache
def verl_kernels() -> types.ModuleType:
    """The Triton kernels of verl/utils/kernel/kernels.py."""
    device = types.ModuleType("verl.utils.device")
    device.is_cuda_available = torch.cuda.is_available()
    device.get_device_name = _device_name
    device.get_device_capability = torch.cuda.get_device_capability
    device.get_torch_device = lambda: torch.cuda
    return module("verl", "utils.kernel.kernels", (device.__name__, device))


def verl_linear_triton() -> LinearLogprobEntropy:
    """`linear_cross_entropy`, which returns logprobs, despite its name, and entropies."""
    _needs_cuda("verl's linear_cross_entropy")
    verl_kernels()
    return module("verl", "utils.kernel.linear_cross_entropy").linear_cross_entropy


@cache
def _verl_algorithms() -> Mapping[str, Any]:
    path = folder("verl") / "trainer" / "ppo" / "core_algos.py"
    groups = folder("verl") / "utils" / "groupwise.py"
    groupwise = functions(groups, ["as_torch_index", "group_mean_std"], {"get_device_name": _device_name})
    given = {
        **groupwise,
        "verl_F": types.SimpleNamespace(**_verl_functional()),
        "register_adv_est": keep,
        "register_policy_loss": keep,
        "AlgoConfig": types.SimpleNamespace,
    }
    names = {
        "grpo": "compute_grpo_outcome_advantage",
        "grpo_vectorized": "compute_grpo_vectorized_outcome_advantage",
        "rloo": "compute_rloo_outcome_advantage",
        "rloo_vectorized": "compute_rloo_vectorized_outcome_advantage",
        "vanilla": "compute_policy_loss_vanilla",
    }
    given["AdvantageEstimator"] = types.SimpleNamespace(**{name.upper(): name for name in names})
    found = functions(path, names.values(), given)
    return {name: found[function] for name, function in names.items()}


def verl_advantage(estimator: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """(rewards [B, T], mask [B, T], index: object array of B group names) -> (advantage, returns), both [B, T]."""
    return _verl_algorithms()[estimator]


class _VerlActor(dict):
    """What `compute_policy_loss_vanilla` reads of an ActorConfig."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def verl_policy_loss(clip_low: float, clip_high: float, dual_clip: float) -> Callable[..., tuple[Tensor, dict]]:
    """(logprob, old_logprob, advantage, mask) -> (loss, metrics): the "vanilla" loss with `agg_loss` token-mean."""
    vanilla = _verl_algorithms()["vanilla"]
    config = _VerlActor(
        clip_ratio=clip_low,
        clip_ratio_low=clip_low,
        clip_ratio_high=clip_high,
        clip_ratio_c=dual_clip,
        global_batch_info={},
    )
    return lambda logprob, old_logprob, advantage, mask: vanilla(
        old_logprob, logprob, advantage, mask, "token-mean", config
    )


@cache
def liger_linear() -> LinearLogprobEntropy:
    """The torch fallback of `LigerFusedLinearScaledCrossEntropyFunction`: what runs where its SM90 kernel does not."""
    fused = module("liger-kernel", "ops.fused_linear_scaled_cross_entropy")._FusedLinearPPOFallbackFunction

    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = fused.apply(hidden, weight, labels, 1.0, -100, True)
        return -nll, entropy

    return call


def liger_logprob_triton() -> Callable[[Tensor, Tensor], Tensor]:
    """`fused_selective_log_softmax`, forward only: (logits [B, T + 1, V], labels [B, T]) -> logprob [B, T]."""
    fused = module("liger-kernel", "ops.grpo_loss").fused_selective_log_softmax
    return lambda logits, labels: fused(logits, labels, 1.0)


@cache
def liger_grpo_triton() -> Callable[..., Tensor]:
    """`GrpoLossFunction` of liger_kernel/ops/grpo_loss.py: the loss of each token, from logits [B, T + 1, V].

    (logits, old_logprob [B, T], labels [B, T], advantage [B], mask [B, T], clip_low, clip_high) -> [B, T]
    """
    loss = module("liger-kernel", "ops.grpo_loss").GrpoLossFunction

    def call(
        logits: Tensor,
        old_logprob: Tensor | None,
        labels: Tensor,
        advantage: Tensor,
        mask: Tensor | None,
        clip_low: float,
        clip_high: float,
    ) -> Tensor:
        settings = (1.0, 0.0, clip_low, clip_high, True, "dapo", None, False)
        return loss.apply(logits, old_logprob, None, labels, advantage, mask, *settings)[0]

    return call


@cache
def liger_cross_entropy() -> Callable[[Tensor, Tensor], Tensor]:
    """`LigerCrossEntropyFunction`, one loss a row. It writes the gradient over the logits in the forward pass."""
    _needs_cuda("Liger's cross entropy")
    name = "liger-kernel"
    utils = module(name, "utils")
    ops_utils = module(name, "ops.utils", ("liger_kernel.utils", utils))
    absolute = (("liger_kernel.utils", utils), ("liger_kernel.ops.utils", ops_utils))
    function = module(name, "ops.cross_entropy", *absolute).LigerCrossEntropyFunction
    settings = (None, -100, 0.0, 0.0, "none")  # class weights, ignored label, z-loss, smoothing, reduction
    return lambda logits, labels: function.apply(logits, labels, *settings)[0]


@cache
def liger_linear_grpo() -> type[torch.nn.Module]:
    """`LigerFusedLinearGRPOLoss`."""
    name, base = "liger-kernel", "liger_kernel.chunked_loss.fused_linear_ppo"
    absolute = (base, module(name, "chunked_loss.fused_linear_ppo"))
    return module(name, "chunked_loss.grpo_loss", absolute).LigerFusedLinearGRPOLoss
