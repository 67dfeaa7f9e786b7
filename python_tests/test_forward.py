"""Which models may read packs, and the head's product and statistics as one step inside the model's forward."""

import pytest
from test_packed_equals_rows import loss_and_gradient, made_model, relative
from tiny import forked_tree

from arpo_ext import ops
from arpo_ext.config import TrainConfig
from arpo_ext.errors import ModelError
from arpo_ext.training import forward
from arpo_ext.training.advantages import credit_trees
from arpo_ext.training.batch import policy_batch, tree_rows, weightless_batch
from arpo_ext.training.forward import prepare_model, token_statistics

ROWS_INSTEAD = r"expected full attention in every layer, or train\.packing=rows"


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("Mistral", {"sliding_window": 8}, "MistralForCausalLM attends within a sliding window of 8 tokens"),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "Qwen2ForCausalLM has layers of sliding_attention",
        ),
        ("Gemma2", {"head_dim": 8}, "Gemma2ForCausalLM has layers of sliding_attention"),
        ("Bloom", {"n_head": 4, "n_layer": 2}, "BloomForCausalLM has an attention of its own"),
    ],
)
def test_models_that_cannot_read_packs_are_named(family, changes, said):
    with pytest.raises(ModelError, match=f"{said}.*{ROWS_INSTEAD}"):
        prepare_model(made_model(family, **changes), packed=True)


def test_a_model_whose_code_says_it_can_is_run(monkeypatch):
    model = made_model("Llama")
    decoder = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **more: decoder(*args, **more)
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match=f"gives packed rows other logits than rows .by .*{ROWS_INSTEAD}"):
        prepare_model(model, packed=True)
    assert model.config._attn_implementation == before
    assert model.training


@pytest.mark.parametrize("family", ["Mistral", "Qwen3", "Phi3", "Olmo2", "Granite"])
def test_other_families_read_packs(family):
    own = {"sliding_window": None} if family in ("Mistral", "Phi3") else {}
    prepare_model(made_model(family, **own), packed=True)


def test_a_pack_needs_a_prepared_model():
    (credited,) = credit_trees([forked_tree()], estimator="grpo")
    batch = policy_batch(tree_rows(credited, TrainConfig()), TrainConfig(), 0)
    with pytest.raises(ValueError, match=r"not prepared for them; expected prepare_model\(packed=True\)"):
        token_statistics(made_model("Llama"), batch.text, 1.0)


def fused_calls(monkeypatch):
    """Lets every head be fused, and counts."""
    calls = []
    monkeypatch.setattr(forward, "FUSED_BYTES", 0)
    own = ops.linear_logprob_entropy
    monkeypatch.setattr(ops, "linear_logprob_entropy", lambda *a, **k: calls.append(k["softcap"]) or own(*a, **k))
    return calls


@pytest.mark.parametrize(
    ("packing", "family", "changes"),
    [
        ("tree", "Qwen2", {}),
        ("rows", "Qwen2", {"tie_word_embeddings": True}),
        ("tree", "Llama", {"tie_word_embeddings": True}),
        ("rows", "Gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
    ],
)
def test_the_fused_head_gives_the_same(packing, family, changes, monkeypatch):
    model = made_model(family, **changes)
    prepare_model(model, packed=packing == "tree")
    config = TrainConfig(packing=packing, importance_cap=1e3)
    rows = [
        row
        for c in credit_trees([forked_tree(), forked_tree((0, 0, 2))], estimator="grpo")
        for row in tree_rows(c, config)
    ]
    apart = loss_and_gradient(model, rows, config, 10.0)
    calls = fused_calls(monkeypatch)
    fused = loss_and_gradient(model, rows, config, 10.0)
    assert calls == [changes.get("final_logit_softcapping")]
    assert model.config.get_text_config().to_dict().get("final_logit_softcapping") == calls[0]
    assert "forward" not in vars(model.get_output_embeddings())
    assert fused[0] == pytest.approx(apart[0], rel=1e-5)
    assert relative(fused[1], apart[1]) < 1e-5


def test_a_head_whose_result_is_changed_behind_it_is_not_fused(monkeypatch):
    model = made_model("Cohere", logit_scale=0.25)
    prepare_model(model, packed=False)
    calls = fused_calls(monkeypatch)
    token_statistics(model, weightless_batch(0).text, 1.0)
    assert calls == []


def test_large_logits_are_not_kept(monkeypatch):
    """Fused from `FUSED_BYTES` on."""
    model = made_model("Llama")
    prepare_model(model, packed=False)
    calls = fused_calls(monkeypatch)
    text = weightless_batch(0).text
    for limit, expected in ((4 * model.config.vocab_size, 1), (4 * model.config.vocab_size + 1, 0)):
        monkeypatch.setattr(forward, "FUSED_BYTES", limit)
        calls.clear()
        token_statistics(model, text, 1.0)
        assert len(calls) == expected
