"""The sampler on a real vLLM engine with a tiny random model, against transformers in float32."""

import math
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sampling import BIAS, TEMPERATURE, AnsweringTools, measure, random_model, run, sample_request, talking_model

from arpo_ext.config import EngineConfig, RolloutConfig
from arpo_ext.errors import ConfigError, SamplerError
from arpo_ext.render import Renderer
from arpo_ext.rollout import Completion, check_tree, collect
from arpo_ext.types import Prompt, StopReason

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def renderer(tag_tokenizer):
    return Renderer(tag_tokenizer, ["search", "fact"])


@pytest.fixture(scope="module")
def model(tag_tokenizer):
    return random_model(len(tag_tokenizer), seed=0)


@pytest.fixture(scope="module")
def talker(renderer):
    return talking_model(renderer)


@pytest.fixture(scope="module")
def sampler(model, renderer, tmp_path_factory):
    from arpo_ext.rollout.vllm_sampler import VllmSampler

    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    renderer.tokenizer.save_pretrained(folder)
    threads = torch.get_num_threads()
    engine = EngineConfig(max_model_len=128, max_num_seqs=24, threads=1)
    rollout = RolloutConfig(temperature=TEMPERATURE, logit_bias=BIAS, probe_tokens=4, max_response_tokens=90)
    sampler = VllmSampler(folder, engine, rollout, renderer, seed=0)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    yield sampler
    sampler.close()
    torch.set_num_threads(threads)


@pytest.fixture
def fresh(sampler, model):
    """The sampler with the random model's weights and nothing cached."""
    sampler.push_weights(model.named_parameters())
    return sampler


@pytest.mark.parametrize("greedy", [False, True])
def test_logprobs_and_entropies_are_those_of_the_distribution_sampled_from(fresh, model, renderer, greedy):
    # More requests than run at once, prompts of many lengths: rows move, chunks of prompts come and go.
    requests = [sample_request(i, tokens=range(14, 15 + 2 * i), greedy=greedy) for i in range(40)]
    probes, done = run(fresh, requests)
    assert sorted(done) == list(range(40))
    for request in requests:
        completion = done[request.id]
        temperature = 1.0 if greedy else TEMPERATURE
        logprobs, entropies = measure(model, renderer.tokenizer, request.tokens, completion.tokens, temperature)
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-3)
        assert completion.entropies == pytest.approx(entropies, abs=1e-4)
        if len(completion.tokens) > 4:
            assert probes[request.id].entropies == completion.entropies[:4]
        else:
            assert request.id not in probes
        if greedy:
            biased = _greedy(model, renderer.tokenizer, request.tokens, len(completion.tokens))
            assert list(completion.tokens) == biased


@torch.no_grad()
def _greedy(model, tokenizer, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens])).logits[0, -1]
        for text, value in BIAS.items():
            logits[tokenizer.convert_tokens_to_ids(text)] += value
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def test_the_likeliest_tokens_are_reported_where_asked_for(fresh, model, renderer):
    wanted = [replace(sample_request(i, tokens=range(14, 18 + i)), top_logprobs=10 if i % 2 else 0) for i in range(12)]
    probes, done = run(fresh, wanted)
    outside = 0
    for request in wanted:
        completion = done[request.id]
        if not request.top_logprobs:
            assert completion.top_logprobs == ()
            continue
        assert len(completion.top_logprobs) == min(4, len(completion.tokens))
        if request.id in probes:
            assert probes[request.id].top_logprobs == completion.top_logprobs
        logits = model(torch.tensor([[*request.tokens, *completion.tokens]])).logits[0, len(request.tokens) - 1 :]
        for text, bias in BIAS.items():
            logits[:, renderer.tokenizer.convert_tokens_to_ids(text)] += bias
        logprobs = torch.log_softmax(logits / TEMPERATURE, -1)
        for row, sampled, reported in zip(logprobs, completion.tokens, completion.top_logprobs, strict=False):
            expected = row.topk(10)
            values = expected.values.tolist()
            if sampled not in expected.indices:
                outside += 1
                values.append(float(row[sampled]))
            assert sorted(reported) == pytest.approx(sorted(values), abs=1e-3)
    assert outside


def test_a_request_draws_alike_alone_and_in_a_batch(fresh):
    _, together = run(fresh, [sample_request(i) for i in range(30)])
    _, alone = run(fresh, [sample_request(99, seed=17)])
    assert alone[99].tokens == together[17].tokens
    assert len({completion.tokens for completion in together.values()}) > 20


def test_what_ends_a_request(sampler, talker, renderer):
    sampler.push_weights(talker.named_parameters())
    prompt = renderer.tokenizer.encode("mass of", add_special_tokens=False)
    _, done = run(sampler, [sample_request(i, tokens=prompt, max_tokens=20) for i in range(60)])
    by_reason = {}
    for completion in done.values():
        by_reason.setdefault(completion.stop_reason, []).append(renderer.decode(completion.tokens))
    assert set(by_reason) >= {StopReason.TOOL, StopReason.EOS}
    assert all(text.endswith(("</search>", "</fact>")) for text in by_reason[StopReason.TOOL])
    assert {text[-7:] for text in by_reason[StopReason.TOOL]} >= {"search>", "</fact>"}
    assert all(text.endswith("<eos>") for text in by_reason[StopReason.EOS])
    _, short = run(sampler, [sample_request(0, tokens=prompt, max_tokens=1)])
    assert short[0].stop_reason is StopReason.LENGTH


def test_pushed_weights_leave_no_stale_prefix(sampler, model, talker, renderer, monkeypatch):
    # Longer than a block of the cache, so that the prefix is really reused.
    prompt = [14 + i % 80 for i in range(100)]
    expected = {}

    def first(weights):
        _, done = run(sampler, [sample_request(0, tokens=prompt, max_tokens=3, greedy=True)])
        expected["now"] = measure(weights, renderer.tokenizer, prompt, done[0].tokens, 1.0)[0]
        return done[0].logprobs

    sampler.push_weights(model.named_parameters())
    assert first(model) == pytest.approx(expected["now"], abs=1e-3)
    sampler.push_weights(talker.named_parameters())
    assert first(talker) == pytest.approx(expected["now"], abs=1e-3)
    # The same push without the reset continues from the other model's keys and values.
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "reset_prefix_cache", lambda: None)
        sampler.push_weights(model.named_parameters())
    assert abs(first(model)[0] - expected["now"][0]) > 0.01


def test_open_requests_forbid_a_push_and_a_reset(sampler, model):
    # Waiting requests count as much as running ones.
    for i in range(30):
        sampler.submit(sample_request(i, max_tokens=50))
    for _ in range(2):
        with pytest.raises(SamplerError, match=r"weights cannot be pushed with \d+ unfinished requests; expected none"):
            sampler.push_weights(model.named_parameters())
        with pytest.raises(SamplerError, match=r"prefix cache cannot be reset with \d+ unfinished"):
            sampler.reset_prefix_cache()
        sampler.step()
    for i in range(40):
        sampler.abort(i)
    assert sampler.num_unfinished == 0
    sampler.push_weights(model.named_parameters())


def test_aborted_requests_give_their_rows_back(fresh):
    for round_ in range(3):
        for i in range(30):
            fresh.submit(sample_request(i))
        fresh.step()
        for i in range(30):
            fresh.abort(i)
        assert (fresh.num_unfinished, round_) == (0, round_)
    assert sorted(fresh._rows) == list(range(24))


def test_a_request_that_does_not_fit_is_refused(sampler):
    with pytest.raises(ValueError, match="request 3 has 120 tokens and asks for 9 more; expected at least 1 and 128"):
        sampler.submit(sample_request(3, tokens=range(120), max_tokens=9))


def test_a_bias_must_name_single_tokens(renderer):
    from arpo_ext.rollout.vllm_sampler import _bias_by_token

    with pytest.raises(ConfigError, match="names 'xyz', which is 3 tokens"):
        _bias_by_token({"xyz": 1.0}, renderer)
    with pytest.raises(ConfigError, match="of 'x' is 101; expected -100 to 100"):
        _bias_by_token({"x": 101}, renderer)


def test_collected_trees_hold_what_the_model_computes(sampler, talker, renderer):
    sampler.push_weights(talker.named_parameters())
    config = RolloutConfig(
        paths=8,
        initial_paths=3,
        probe_tokens=4,
        policy="random",
        base=0.7,
        temperature=TEMPERATURE,
        logit_bias=BIAS,
        max_tool_calls=3,
        max_response_tokens=90,
        entropies="all",
    )
    prompts = [Prompt(f"p{i}", ({"role": "user", "content": "mass of"},), ("7",)) for i in range(4)]
    runs = [
        collect(prompts, sampler=sampler, tools=AnsweringTools(), renderer=renderer, config=config, seed=11)
        for _ in range(2)
    ]
    assert runs[0].trees == runs[1].trees
    assert runs[0].metrics["rollout/forks"] > 4
    for tree in runs[0].trees:
        check_tree(tree, 8, 3, max_tool_calls=3, max_response_tokens=90, probe_tokens=4)
        for index, segment in enumerate(tree.segments):
            if segment.sampled:
                prefix = tree.path_tokens(segment.parent)
                logprobs, entropies = measure(talker, renderer.tokenizer, prefix, segment.tokens, TEMPERATURE)
                assert segment.logprobs == pytest.approx(logprobs, abs=1e-3), index
                assert segment.entropies == pytest.approx(entropies, abs=1e-4), index
    other = collect(prompts, sampler=sampler, tools=AnsweringTools(), renderer=renderer, config=config, seed=12)
    assert other.trees != runs[0].trees


def test_a_cancelled_collection_is_finished_by_the_same_engine(sampler, talker, renderer):
    sampler.push_weights(talker.named_parameters())
    config = RolloutConfig(
        paths=6,
        initial_paths=3,
        probe_tokens=4,
        policy="random",
        temperature=TEMPERATURE,
        logit_bias=BIAS,
        max_tool_calls=3,
        max_response_tokens=90,
        max_open_requests=4,
    )
    prompts = [Prompt(f"p{i}", ({"role": "user", "content": "mass of"},), ("7",)) for i in range(4)]
    cancel, ended = threading.Event(), []

    def count(paths):
        ended.append(paths)
        # Three of 24 are missing, so of four trees one at least is complete.
        if len(ended) == 21:
            cancel.set()

    parts = {"sampler": sampler, "tools": AnsweringTools(), "renderer": renderer, "config": config, "seed": 11}
    cut = collect(prompts, **parts, progress=count, cancel=cancel)
    assert sampler.num_unfinished == 0
    complete = [tree for tree in cut.trees if tree.is_complete]
    assert 0 < len(complete) < 4
    assert cut.metrics["rollout/cancelled_paths"] > 0
    again = collect(prompts, **parts, finished=cut.trees)
    assert [tree for tree in again.trees if tree in complete] == complete
    assert again.metrics["rollout/prefix_tokens_reused"] > 0
    for tree in (*cut.trees, *again.trees):
        check_tree(tree, 6, 3, max_tool_calls=3, max_response_tokens=90, probe_tokens=4)
    assert all(tree.is_complete for tree in again.trees)


def _params(row=None, limit=0, temperature=1.0):
    from arpo_ext.rollout.vllm_entropy import entropy_args

    return SimpleNamespace(extra_args=None if row is None else entropy_args(row, limit), temperature=temperature)


def _processor(device_or_states, columns=5):
    from arpo_ext.rollout.vllm_entropy import COLUMNS, EntropyProcessor

    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        model_config=SimpleNamespace(max_model_len=9),
        parallel_config=SimpleNamespace(enable_batch_sharded_sampling=False),
        additional_config={COLUMNS: columns},
    )
    return EntropyProcessor(config, device_or_states)


def _entropy(logits, temperature):
    p = torch.softmax(logits.double() / temperature, -1)
    return float(-torch.where(p > 0, p * p.log(), 0).sum())


def _update(removed=(), added=(), moved=()):
    return SimpleNamespace(batch_size=0, removed=removed, added=added, moved=moved)


def test_v1_follows_requests_through_the_batch():
    from vllm.v1.sample.logits_processor import MoveDirectionality

    processor = _processor(torch.device("cpu"))
    assert not processor.is_argmax_invariant()
    logits = [torch.randn(3, 11) for _ in range(6)]
    logits[2][1, 4:] = -math.inf
    before = [x.clone() for x in logits]
    a, b = [], []
    processor.update_state(
        _update(added=[(0, _params(3, 4, 0.7), None, a), (1, _params(1, 3, 0.0), None, b), (2, _params(), None, [])])
    )
    # Two chunks of a prompt: the second overwrites.
    processor.apply(logits[0])
    processor.update_state(None)
    processor.apply(logits[1])
    a.append(5), b.append(5)
    processor.apply(logits[2])
    a.append(5), b.append(5)
    # The two swap places; then b is at its limit.
    processor.update_state(_update(moved=[(0, 1, MoveDirectionality.SWAP)]))
    processor.apply(logits[3])
    a.append(5)
    # b leaves, the last row takes its place, then a moves to the front.
    processor.update_state(_update(removed=[0], moved=[(1, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    processor.apply(logits[4])
    a.append(5)
    processor.apply(logits[5])
    rows = processor.log.read([3, 1], [4, 3])
    assert rows[0] == pytest.approx(
        [_entropy(logits[i][j], 0.7) for i, j in ((1, 0), (2, 0), (3, 1), (4, 0))], abs=1e-5
    )
    assert rows[1] == pytest.approx([_entropy(logits[i][j], 1.0) for i, j in ((1, 1), (2, 1), (3, 0))], abs=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(logits, before, strict=True))


def test_v1_gives_a_recycled_row_to_its_new_request():
    processor = _processor(torch.device("cpu"))
    first, second = torch.randn(1, 11), torch.randn(1, 11)
    processor.update_state(_update(added=[(0, _params(2, 3), None, [])]))
    processor.apply(first)
    processor.update_state(_update(removed=[0]))
    processor.update_state(_update(added=[(0, _params(2, 3), None, [])]))
    processor.apply(second)
    assert processor.log.read([2], [1])[0] == pytest.approx([_entropy(second[0], 1.0)], abs=1e-5)


def test_v2_maps_rows_to_slots_and_positions():
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

    prompt_len = torch.tensor([0, 6, 3, 2], dtype=torch.int32)
    states = SimpleNamespace(
        device=torch.device("cpu"), max_num_reqs=4, vocab_size=11, prompt_len=SimpleNamespace(gpu=prompt_len)
    )
    processor = _processor(states)
    assert isinstance(processor, LogitsProcessor)
    assert processor.add_request(1, _params(0, 5, 0.7))
    assert processor.add_request(3, _params(2, 1, 0.0))
    assert not processor.add_request(2, _params())
    processor.apply_staged_writes()

    def step(*rows):
        """rows: (slot, position)."""
        logits = torch.randn(len(rows), 11)
        before = logits.clone()
        slots, positions = (torch.tensor(x, dtype=torch.int32) for x in zip(*rows, strict=True))
        out = processor.apply(logits, SimpleNamespace(expanded_idx_mapping=slots, pos=positions))
        assert out is logits
        assert torch.equal(logits, before)
        return logits

    step((1, 3), (3, 0))  # chunks of both prompts
    x = step((3, 1), (2, 2), (1, 5))
    y = step((1, 6), (3, 2))  # slot 3 is past its limit
    # Speculation: two rows of one request, the second is rejected and comes again.
    step((1, 7), (1, 8))
    z = step((1, 7), (1, 8))
    (one, two) = processor.log.read([0, 2], [4, 1])
    expected = [_entropy(row, 0.7) for row in (x[2], y[0], z[0], z[1])]
    assert one == pytest.approx(expected, abs=1e-5)
    assert two == pytest.approx([_entropy(x[0], 1.0)], abs=1e-5)
    # The slot is recycled.
    processor.add_request(1, _params(3, 5))
    processor.apply_staged_writes()
    w = step((1, 5), (3, 1))
    assert processor.log.read([3, 0], [1, 1])[0] == pytest.approx([_entropy(w[0], 1.0)], abs=1e-5)
    assert processor.log.read([0], [1])[0] == pytest.approx(expected[:1], abs=1e-5)


def test_parameters_of_the_log_are_checked():
    from arpo_ext.rollout.vllm_entropy import EntropyProcessor

    EntropyProcessor.validate_params(_params(0, 3))
    EntropyProcessor.validate_params(_params())
    with pytest.raises(ValueError, match=r"extra_args\['entropy_row'\] is -1; expected a non-negative integer"):
        EntropyProcessor.validate_params(_params(-1, 3))


def test_completions_are_what_the_protocol_says(fresh):
    _, done = run(fresh, [sample_request(0)])
    completion = done[0]
    assert isinstance(completion, Completion)
    assert len(completion.tokens) == len(completion.logprobs) == len(completion.entropies)
    assert all(type(token) is int for token in completion.tokens)
    assert fresh.vocab_size == 113
