"""Model folders: checks that say what is missing, then transformers' own loaders. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from arpo_ext.config import ModelConfig
from arpo_ext.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def model_folder(config: ModelConfig) -> Path:
    """The checked model folder. ModelError if it is not set, not a folder or holds no config.json."""
    if config.path is None:
        raise ModelError("model.path is not set; expected a Hugging Face model folder")
    if not config.path.is_dir():
        raise ModelError(f"model.path {config.path} is not a folder; expected a Hugging Face model folder")
    if not (config.path / "config.json").is_file():
        raise ModelError(f"model.path {config.path} holds no config.json; expected a Hugging Face model folder")
    return config.path


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer stored with the model."""
    from transformers import AutoTokenizer

    folder = model_folder(config)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {folder} holds no usable tokenizer: {_first_line(error)}") from error


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The causal language model in `config.dtype`, in training mode, on the CPU; accelerate moves it."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = model_folder(config)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            local_files_only=True,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {folder} holds no usable weights: {_first_line(error)}") from error
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
