"""`arpo-ext rollout` on ARPO's own validation prompts, with a real engine, tools and corpus.

The model is tiny and random, so tool tags are forced by a logit bias; what is tested is the tree, not the text.
"""

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch

from arpo_ext.cli import main
from arpo_ext.rollout.tree import check_tree, read_trees

DATA = Path(__file__).parents[2] / "shared" / "data"
PATHS, INITIAL, PROBE = 8, 4, 8
BIAS = {"<search>": 4.0, "</search>": 4.0, "<python>": 1.0, "</python>": 1.0}

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"ARPO's data sets are not at {DATA}"),
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random Qwen2 with a byte-level tokenizer whose tool tags are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tags = [f"<{slash}{name}>" for name in ("think", "search", "python", "result", "answer") for slash in ("", "/")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "<eos>", "<pad>", *tags]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(pieces),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.15,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("model")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trees(model_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "rollout"
    overrides = [
        f"model.path={model_folder}",
        f"data.train={DATA / 'valid.parquet'}",
        "data.limit=16",
        f"tools.search={{corpus: {DATA / 'search_cache.json'}, top_k: 1, snippet_chars: 120}}",
        "tools.python={}",
        f"rollout.paths={PATHS}",
        f"rollout.initial_paths={INITIAL}",
        f"rollout.probe_tokens={PROBE}",
        "rollout.max_response_tokens=320",
        f"rollout.logit_bias={BIAS}",
        "engine.max_model_len=4096",
        "engine.max_num_seqs=64",
        "tracking.progress=false",
        f"output_dir={output}",
    ]
    assert main(["rollout", *overrides]) == 0
    return read_trees(output / "trees.jsonl")


def test_every_invariant_of_the_tree_holds(trees):
    assert len(trees) == 16
    assert len({tree.prompt_id for tree in trees}) == 16
    for tree in trees:
        check_tree(tree, PATHS, INITIAL)


def test_the_run_did_call_tools_and_fork(trees):
    counts = Counter()
    for tree in trees:
        counts.update(tree.counts)
    assert counts["tool_calls"] >= 30
    assert counts["forks"] >= 10
    answered = [s.tool for tree in trees for s in tree.segments if s.tool is not None and s.tool.ok]
    assert len(answered) >= 30


def test_no_two_leaves_are_the_same_path(trees):
    for tree in trees:
        assert len({leaf.segment for leaf in tree.leaves}) == PATHS
        ends = [tuple(tree.path(leaf.segment)) for leaf in tree.leaves]
        assert len(set(ends)) == PATHS


def test_entropies_and_logprobs_equal_a_recomputation_of_what_was_sampled(trees, model_folder):
    """Float32 transformers over each whole path, bias added: entropies within 1e-4, logprobs within 1e-3."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    bias = torch.zeros(model.config.vocab_size)
    for text, value in BIAS.items():
        bias[tokenizer.convert_tokens_to_ids(text)] = value

    probed = 0
    for tree in trees:
        prompt = torch.tensor([tree.segments[0].tokens])
        with torch.no_grad():
            shared = model(prompt, use_cache=True)
        for leaf in tree.leaves:
            tokens = torch.tensor([tree.path_tokens(leaf.segment)])
            with torch.no_grad():
                response = model(tokens[:, prompt.shape[1] :], past_key_values=copy.deepcopy(shared.past_key_values))
            logits = torch.cat([shared.logits[0], response.logits[0]])
            logprobs = torch.log_softmax(logits + bias, -1)
            entropies = -(logprobs.exp() * logprobs).sum(-1)
            start = 0
            for index in tree.path(leaf.segment):
                segment = tree.segments[index]
                stop = start + len(segment.tokens)
                if segment.sampled:
                    before = torch.arange(start - 1, stop - 1)
                    chosen = logprobs[before, tokens[0, start:stop]]
                    torch.testing.assert_close(torch.tensor(segment.logprobs), chosen, atol=1e-3, rtol=0)
                    count = len(segment.entropies)
                    torch.testing.assert_close(
                        torch.tensor(segment.entropies), entropies[before[:count]], atol=1e-4, rtol=0
                    )
                if segment.probe_entropy is not None:
                    probed += 1
                    mean = entropies[start - 1 : start - 1 + min(PROBE, len(segment.tokens))].mean().item()
                    assert segment.probe_entropy == pytest.approx(mean, abs=1e-4)
                start = stop
    assert probed >= 30
