"""A model, a tokenizer and rollout trees small enough to check by hand; for the tests of training."""

from collections.abc import Sequence

import torch

from arpo_ext.types import Leaf, RolloutTree, Segment, StopReason

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIALS = ("<pad>", "<unk>", "<eos>", "<tool>", "</tool>")
VOCAB = len(SPECIALS) + len(LETTERS)


def tiny_model(*, seed: int = 0, hidden: int = 32, layers: int = 2, scale: float = 0.3, tied: bool = True):
    """A Qwen2 of about 20k parameters over VOCAB tokens, float32, in training mode."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=scale,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).train()


def tiny_tokenizer():
    """One token per letter; the tags are special tokens."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = [(piece, 0.0) for piece in SPECIALS] + [(letter, -3.0) for letter in LETTERS]
    backend = Tokenizer(models.Unigram(pieces, unk_id=1))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "</tool>"]})
    return tokenizer


def tree(
    segments: Sequence[tuple[int, Sequence[int], bool]],
    leaves: Sequence[tuple[int, float | None]],
    *,
    logprob: float | None = -1.0,
    prompt_id: str = "p",
) -> RolloutTree:
    """A tree of (parent, tokens, sampled) and (segment, reward); `logprob` stands at every sampled token."""
    return RolloutTree(
        prompt_id=prompt_id,
        prompt="?",
        answers=("a",),
        policy="paper",
        seed=0,
        segments=tuple(
            Segment(parent, tuple(tokens), sampled, logprobs=(logprob,) * len(tokens) if sampled and logprob else ())
            for parent, tokens, sampled in segments
        ),
        leaves=tuple(Leaf(segment, StopReason.EOS, reward=reward) for segment, reward in leaves),
    )


def forked_tree(rewards: Sequence[float | None] = (1.0, 0.0, 0.0), **options) -> RolloutTree:
    """Prompt 0; turn 1 and tool result 2 shared by leaves 3 and 4; leaf 5 is a path of its own.

    0 [6 7] - 1 [8 9] - 2 tool [3 10 4] - 3 [11]
                                        - 4 [12 13 2]
            - 5 [14 15 16 17 2]
    """
    segments = [
        (-1, (6, 7), False),
        (0, (8, 9), True),
        (1, (3, 10, 4), False),
        (2, (11,), True),
        (2, (12, 13, 2), True),
        (0, (14, 15, 16, 17, 2), True),
    ]
    return tree(segments, list(zip((3, 4, 5), rewards, strict=True)), **options)
