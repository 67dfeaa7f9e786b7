"""A tokenizer of about 500 pieces, built in code: tags, digits, the words of the world, single bytes as fallback.

It is a byte-level BPE of the Qwen2 kind, because loaders choose the tokenizer class by the architecture of the model
beside it. Decoding gives back any text byte for byte. The merges are written down, not trained: each word of the
world becomes one piece, a name two (its syllables), a number one per digit, so that unseen names and numbers consist
of pieces that training has shown.
"""

from __future__ import annotations

from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

from examples.lookup_and_compute.world import ATTRIBUTES, FIRST_SYLLABLES, OPENINGS, SECOND_SYLLABLES

PAD, UNKNOWN, END = "<pad>", "<unk>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TAGS = tuple(f"<{slash}{name}>" for name in ("think", "search", "python", "result", "answer") for slash in ("", "/"))
THOUGHTS = {
    "search": "look up",
    "search_again": "need more",
    "compute": "compute",
    "answer": "found it",
    "guess": "by heart",
    "stop_early": "will do",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MODEL_MAX_TOKENS = 256
SPACE = "\u0120"  # how a byte-level vocabulary writes the space


def _merges() -> list[tuple[str, str]]:
    """Left-to-right merges. Names come before words, so that no word can cut into a syllable; "the" comes before
    names, because "he" would cut into it and no name contains "th"."""
    texts = [*THOUGHTS.values(), *OPENINGS.values(), r"the of print found near note on \boxed"]
    words = [word.strip(":\\") for text in texts for word in text.split()]
    merges: dict[tuple[str, str], None] = {}
    for word in ("the", *FIRST_SYLLABLES, *SECOND_SYLLABLES, *ATTRIBUTES, *words):
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    merges["\\", "boxed"] = None
    for start in (*FIRST_SYLLABLES, *ATTRIBUTES, *words, *"+-*"):
        merges[SPACE, start] = None
    return list(merges)


def make_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer; its size is `len(tokenizer)`, and its token ids are the same in every process."""
    merges = _merges()
    pieces = [
        PAD,
        UNKNOWN,
        END,
        *ROLES,
        *TAGS,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *("".join(m) for m in merges),
    ]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(dict.fromkeys(pieces))},
        merges=merges,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens=[*ROLES, *TAGS],
        model_max_length=MODEL_MAX_TOKENS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
