"""What the sampler asks of vLLM's worker, mixed into it as `worker_extension_cls` and called by `collective_rpc`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from arpo_ext.rollout.vllm_entropy import EntropyProcessor
from arpo_ext.rollout.vllm_entropy_file import processors_of

WORKER_EXTENSION = f"{__name__}.WorkerExtension"


def is_tied(model_config: Any) -> bool:
    """Whether the head shares the embedding's weight; `model_config` is vLLM's."""
    return bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))


class WorkerExtension:
    """Its names must not be those of vLLM's workers: vLLM refuses to start on a clash."""

    def arpo_read_entropies(self, rows: Sequence[int], counts: Sequence[int]) -> list[list[float]]:
        """The first counts[i] entropies in rows[i] of the entropy log."""
        (processor,) = (p for p in processors_of(self.model_runner) if isinstance(p, EntropyProcessor))
        return processor.log.read(rows, counts)

    def arpo_set_threads(self, count: int) -> None:
        """CPU threads of torch; vLLM's CPU worker has replaced `torch.set_num_threads` by one that does nothing."""
        torch._C.set_num_threads(count)

    def arpo_load_weights_file(self, path: str) -> None:
        """Load what `torch.save` has written as a dict of tensors; every rank maps the same pages."""
        self.arpo_load_weights(torch.load(path, mmap=True, map_location="cpu", weights_only=True).items())

    def arpo_load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load weights under their checkpoint names into the running model."""
        model = self.model_runner.get_model()
        self.reload_weights(weights_iterator=weights)
        if not is_tied(self.model_config):
            return
        # On the CPU a layer multiplies with a packed copy of its weight. A tied head shares the embedding's weight,
        # which was loaded, but its own copy is only packed anew here: without this every logit comes from the head of
        # the weights before the first push.
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead) and isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
                layer.quant_method.process_weights_after_loading(layer)
