"""A Qwen2-architecture model of about a quarter of a million parameters, untrained."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from examples.lookup_and_compute.tokenizer import MODEL_MAX_TOKENS


def make_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    """Two layers of width 96, float32, weights drawn from `seed` without touching the global generator."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=MODEL_MAX_TOKENS,
        tie_word_embeddings=True,
        # About 1/sqrt(hidden): with the usual 0.02, thousands of steps do not teach the copying of names and digits.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def save_model(directory: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Write a Hugging Face model folder: config, weights, tokenizer."""
    make_model(tokenizer, seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
