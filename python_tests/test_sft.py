"""The cold start: what is masked teaches nothing, a tiny set is learnt by heart, rates rise and fall as configured."""

import json

import pytest
import torch
from tiny import VOCAB, tiny_model, tiny_tokenizer

from arpo_ext.config import Config, SftConfig
from arpo_ext.data import Demo, DemoSegment
from arpo_ext.errors import DataError
from arpo_ext.tracking import Tracker
from arpo_ext.training import sft
from arpo_ext.training.schedule import learning_rate
from arpo_ext.training.sft import encode_demos, masked_loss, token_batches

TOOL_DEMO = Demo(
    (
        DemoSegment(train=False, text="ask"),
        DemoSegment(train=True, text="<tool>mass</tool>"),
        DemoSegment(train=False, text="result"),
        DemoSegment(train=True, text="good<eos>"),
    )
)


def encode(*demos, max_tokens=64):
    return encode_demos(demos, tiny_tokenizer(), max_tokens=max_tokens, vocab_size=VOCAB)


def run(folder, demos, model, **settings):
    config = Config.model_validate(
        {"output_dir": folder, "sft": settings, "tracking": {"tensorboard": False, "progress": False}}
    )
    with Tracker(folder, config.tracking) as tracker:
        sft(config, model=model, tokenizer=tiny_tokenizer(), demos=demos, tracker=tracker)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_texts_keep_their_tags_and_gain_nothing():
    (row,) = encode(TOOL_DEMO)
    text = "".join(segment.text for segment in TOOL_DEMO.segments)
    assert tiny_tokenizer().decode(row.tokens) == text
    assert row.trained.tolist() == [False] * 3 + [True] * 6 + [False] * 6 + [True] * 5


def test_tokens_are_used_as_they_are():
    (row,) = encode(Demo((DemoSegment(train=False, tokens=(9, 9)), DemoSegment(train=True, tokens=(2, 7)))))
    assert row.tokens.tolist() == [9, 9, 2, 7]
    assert row.trained.tolist() == [False, False, True, True]


def test_masked_tokens_as_targets_do_not_touch_loss_or_gradient():
    """The last segment is a tool result: whatever it says, nothing trained comes after it."""
    model = tiny_model()
    results = []
    for result in ("result", "zzzzzz"):
        segments = (*TOOL_DEMO.segments[:2], DemoSegment(train=False, text=result))
        (batch,) = token_batches(encode(Demo(segments)), 4, 0)
        loss = masked_loss(model, batch)
        results.append((loss.detach(), torch.autograd.grad(loss, list(model.parameters()))))
    (loss, gradients), (other_loss, other_gradients) = results
    assert loss == other_loss
    assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))


def test_masked_positions_get_no_gradient_and_the_loss_is_plain_cross_entropy():
    model = tiny_model()
    rows = encode(TOOL_DEMO, Demo((DemoSegment(train=False, text="q"), DemoSegment(train=True, text="abcdefgh"))))
    expected = 0.0
    for row in rows:
        logits = model(input_ids=row.tokens[None]).logits[0, :-1]
        target = torch.where(row.trained, row.tokens, -100)[1:]
        expected += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum").detach())
    for size in (1, 2):
        loss = sum(masked_loss(model, batch) for batch in token_batches(rows, size, 0))
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_tiny_set_is_learnt_by_heart(tmp_path):
    pairs = [("abc", "xyz"), ("bca", "zzy"), ("cab", "yxz"), ("aab", "zxxy")]
    demos = [
        Demo((DemoSegment(train=False, text=q), DemoSegment(train=True, text=f"<tool>{a}<eos>"))) for q, a in pairs
    ]
    model = tiny_model(seed=2)
    rows = run(tmp_path, demos, model, steps=60, batch_size=8, micro_batch_size=4, lr=1e-2, warmup_steps=5)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[0].keys() == {"step", "kind", "time_s", "sft/loss", "sft/lr", "sft/tokens_per_s"}
    assert rows[-1]["sft/loss"] < 0.05 < 1 < rows[0]["sft/loss"]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for question, answer in pairs:
        tokens = tokenizer(question, return_tensors="pt")["input_ids"]
        for _ in range(len(answer) + 2):
            tokens = torch.cat([tokens, loaded(input_ids=tokens).logits[:, -1:].argmax(-1)], dim=1)
        assert tokenizer.decode(tokens[0]) == f"{question}<tool>{answer}<eos>"


def test_micro_batch_size_does_not_change_the_run(tmp_path):
    demos = [
        Demo((DemoSegment(train=False, text="ab"), DemoSegment(train=True, text="c" * n + "<eos>")))
        for n in range(1, 8)
    ]
    with torch.no_grad():
        (batch,) = token_batches(encode(*demos), 16, 0)
        first_loss = float(masked_loss(tiny_model(), batch)) / sum(n + 1 for n in range(1, 8))
    models = []
    for size in (1, 3, 16):
        model = tiny_model()
        rows = run(
            tmp_path / str(size), demos, model, steps=3, batch_size=7, micro_batch_size=size, lr=1e-3, warmup_steps=0
        )
        models.append(model)
        assert rows[0]["sft/loss"] == pytest.approx(first_loss, rel=1e-5)
    for a, b, c in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(a, b, atol=2e-5)
        assert torch.allclose(a, c, atol=2e-5)


def test_same_seed_same_weights_and_a_rerun_replaces_the_log(tmp_path):
    models = [tiny_model(), tiny_model()]
    for model in models:
        rows = run(tmp_path, [TOOL_DEMO] * 5, model, steps=4, batch_size=2)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_learning_rate_rises_holds_and_falls():
    settings = SftConfig(steps=10, lr=1.0, warmup_steps=2, decay_fraction=0.4)
    rates = [learning_rate(step, settings) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    flat = SftConfig(steps=3, lr=2.0, warmup_steps=0, decay_fraction=0.0)
    assert [learning_rate(step, flat) for step in (1, 2, 3)] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("demo", "sentence"),
    [
        ((DemoSegment(train=True, text="a" * 9),), r"demonstration 1 has 9 tokens; expected at most sft\.max_tokens=8"),
        ((DemoSegment(train=True, tokens=(1, 500)),), "demonstration 1 holds token 500; the model knows 0 to 30"),
        ((DemoSegment(train=True, text="a"),), "demonstration 1 has no token to learn after its first"),
        ((DemoSegment(train=True, text=""),), "demonstration 1 has no token to learn after its first"),
    ],
)
def test_faulty_demonstrations_are_named(demo, sentence):
    good = Demo((DemoSegment(train=True, text="ab"),))
    with pytest.raises(DataError, match=sentence):
        encode(good, Demo(demo), max_tokens=8)


def test_no_demonstrations_is_an_error():
    with pytest.raises(DataError, match="got no demonstrations"):
        encode()
