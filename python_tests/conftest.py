"""What tests share: tokenizers built in code, outputs that show if nobody wrote them, GPU tests only with a GPU."""

import importlib.util
import os
import sys
from pathlib import Path

# Matrices this small are slower on two threads than on one, on a busy machine up to 30 times. Read when torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if "ARPO_SANITIZED" in os.environ:  # `make sanitize`: this build instead of the one in arpo_ext/
    (module_file,) = Path(os.environ["ARPO_SANITIZED"]).glob("_C.*.so")
    module_spec = importlib.util.spec_from_file_location("arpo_ext._C", module_file)
    sys.modules["arpo_ext._C"] = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(sys.modules["arpo_ext._C"])

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGS = tuple(tag for name in ("think", "search", "python", "result", "answer") for tag in (f"<{name}>", f"</{name}>"))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def poisoned_outputs():
    """torch.empty yields NaN or the largest integer, so that an output nobody wrote fails the comparison."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tag_tokenizer():
    """Unigram over single characters and a few words; every tag is one special token; no chat template."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<unk>", "<eos>", *TAGS]
    characters = [chr(code) for code in range(32, 127)]
    words = ["mass", " of", " is", "limit", "call"]
    pieces = [*((text, 0.0) for text in specials), *((c, -5.0) for c in characters), *((w, -4.0) for w in words)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=1))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS)})
    return tokenizer


@pytest.fixture(scope="session")
def bpe_tokenizer():
    """Byte-level BPE with a chat template, as Qwen has it: tags take several ordinary tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["<search> result </search> python answer think the of and"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
