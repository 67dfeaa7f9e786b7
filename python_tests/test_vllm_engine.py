"""The sampler with vLLM's engine in a process of its own: the same trees, other schedules, weights, its death."""

import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from sampling import BIAS, TEMPERATURE, AnsweringTools, measure, random_model, run, sample_request, talking_model
from vllm_modes import asynchronous_and_chunked

from arpo_ext.config import EngineConfig, RolloutConfig
from arpo_ext.errors import EngineError, SamplerError
from arpo_ext.render import Renderer
from arpo_ext.rollout import collect
from arpo_ext.types import Prompt

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("default")]

# Prompts wait for a step that has room for all of their tokens; in chunks they would end the engine (vLLM 0.32).
ENGINE = EngineConfig(max_model_len=128, max_num_seqs=24, max_num_batched_tokens=32, threads=1)
ROLLOUT = RolloutConfig(
    paths=8,
    initial_paths=3,
    probe_tokens=4,
    policy="random",
    base=0.7,
    temperature=TEMPERATURE,
    logit_bias=BIAS,
    max_tool_calls=3,
    max_response_tokens=60,
    entropies="all",
)


@pytest.fixture(scope="module")
def renderer(tag_tokenizer):
    return Renderer(tag_tokenizer, ["search", "fact"])


@pytest.fixture(scope="module")
def talker(renderer):
    return talking_model(renderer)


@pytest.fixture(scope="module")
def folder(talker, renderer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    talker.save_pretrained(folder)
    renderer.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(folder, renderer):
    """Starts samplers on the same model and closes them."""
    from arpo_ext.rollout.vllm_sampler import VllmSampler

    samplers = []

    def start(deterministic=True, **engine):
        rollout = ROLLOUT.model_copy(update={"deterministic": deterministic})
        samplers.append(VllmSampler(folder, ENGINE.model_copy(update=engine), rollout, renderer, seed=0))
        return samplers[-1]

    yield start
    for sampler in samplers:
        sampler.close()


@pytest.fixture(scope="module")
def stepped(start):
    return start(own_process=True)


class _SlowTools(AnsweringTools):
    """Answers alike, at times of its own."""

    def submit(self, call):
        time.sleep(0.003 * (len(call.arguments) % 4) if isinstance(getattr(call, "arguments", None), str) else 0.002)
        return super().submit(call)


def _trees(sampler, renderer, tools):
    # Lengths that fill several blocks of the cache, so that prefixes are shared.
    prompts = [Prompt(f"p{i}", ({"role": "user", "content": "mass of " * (3 + 2 * i)},), ("7",)) for i in range(6)]
    collected = collect(prompts, sampler=sampler, tools=tools, renderer=renderer, config=ROLLOUT, seed=11)
    assert collected.metrics["rollout/forks"] > 4
    return collected.trees


def test_trees_are_the_same_whichever_process_the_engine_runs_in(start, stepped, renderer):
    here = start()
    try:
        expected = _trees(here, renderer, AnsweringTools())
    finally:
        here.close()
    assert _trees(stepped, renderer, AnsweringTools()) == expected
    # The engine's own loop would have decoded on while these answer.
    assert _trees(stepped, renderer, _SlowTools()) == expected


def _requests(count, greedy=False):
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(14, 100, (count, 100), generator=generator).tolist()
    return [sample_request(i, prompts[i][: 20 + 2 * i], max_tokens=10, greedy=greedy) for i in range(count)]


def _check_what_was_measured(sampler, model, tokenizer, requests):
    probes, done = run(sampler, requests)
    assert len(done) == len(requests)
    assert len(probes) > len(requests) / 4
    for request in requests:
        completion = done[request.id]
        temperature = 1.0 if request.greedy else TEMPERATURE
        logprobs, entropies = measure(model, tokenizer, request.tokens, completion.tokens, temperature)
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-3)
        assert completion.entropies == pytest.approx(entropies, abs=1e-4)
        if request.id in probes:
            assert probes[request.id].entropies == completion.entropies[:4]


def test_weights_pushed_to_another_process_are_sampled_from(stepped, talker, renderer):
    other = random_model(len(renderer.tokenizer), seed=3)
    for model in (other, talker):
        stepped.push_weights(model.state_dict().items())
        _check_what_was_measured(stepped, model, renderer.tokenizer, _requests(12))


def test_a_push_leaves_no_file_behind(stepped, talker):
    before = {entry for entry in os.listdir("/dev/shm") if entry.startswith("arpo_weights_")}
    stepped.push_weights(talker.state_dict().items())
    with pytest.raises(SamplerError, match="vLLM's workers failed in arpo_load_weights_file"):
        stepped.push_weights([("no.such.weight", torch.ones(3))])
    stepped.push_weights(talker.state_dict().items())
    assert {entry for entry in os.listdir("/dev/shm") if entry.startswith("arpo_weights_")} == before


@pytest.fixture(scope="module")
def free(start):
    with asynchronous_and_chunked():
        sampler = start(deterministic=False, own_process=True, max_num_batched_tokens=32)
    scheduler = sampler._engine.vllm_config.scheduler_config
    assert scheduler.async_scheduling
    assert scheduler.enable_chunked_prefill
    assert scheduler.max_num_batched_tokens == 32
    return sampler


def test_entropies_are_exact_while_the_engine_runs_ahead_in_chunks(free, talker, renderer):
    # A chunk of a seeded request ends a CPU engine (vLLM 0.32); these draw nothing.
    _check_what_was_measured(free, talker, renderer.tokenizer, _requests(40, greedy=True))
    # Shorter than a step, one after the other: never a chunk.
    for request in _requests(6):
        _check_what_was_measured(free, talker, renderer.tokenizer, [replace(request, tokens=request.tokens[:30])])


def test_only_the_first_of_the_ranks_that_share_a_model_is_read(start, talker, renderer, monkeypatch):
    sampler = start(own_process=True, tensor_parallel_size=2)
    answers = sampler._engine._llm.collective_rpc

    def others_disagree(method, args=()):
        first, *others = answers(method, args=args)
        assert len(others) == 1
        if method == "arpo_read_entropies":
            assert others == [first]
            others = [[[-1.0] * len(row) for row in first]]
        return [first, *others]

    monkeypatch.setattr(sampler._engine._llm, "collective_rpc", others_disagree)
    _check_what_was_measured(sampler, talker, renderer.tokenizer, _requests(12))
    other = random_model(len(renderer.tokenizer), seed=3)
    sampler.push_weights(other.state_dict().items())
    _check_what_was_measured(sampler, other, renderer.tokenizer, _requests(12))
    sampler.close()


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def _run_until_it_fails(sampler):
    while True:
        sampler.step()


@pytest.mark.parametrize("victim", ["core", "worker"])
def test_a_killed_engine_is_one_clear_error(stepped, free, victim, renderer, capfd):
    sampler = {"core": stepped, "worker": free}[victim]
    (core,) = (process.pid for process in sampler._engine._processes)
    pid = core if victim == "core" else _children(core)[-1]
    for request in _requests(30, greedy=True):
        sampler.submit(request)
    sampler.step()
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    message = r"vLLM's engine process \d+ (was killed by SIGKILL|ended with exit code 1|failed) with \d+ requests open"
    with pytest.raises(EngineError, match=message):
        _run_until_it_fails(sampler)
    # Nobody is left to put anything there.
    sampler._engine._core.outputs_queue.queue.clear()
    with pytest.raises(EngineError, match=message):
        sampler.step()
    for request in _requests(30):
        sampler.abort(request.id)
    assert sampler.num_unfinished == 0
    with pytest.raises(EngineError, match=message):
        sampler.reset_prefix_cache()
    sampler.close()
    assert time.monotonic() - started < 60
    if victim == "core":
        assert "Traceback" not in capfd.readouterr().err


def test_another_sampler_starts_after_a_death(start, talker, renderer):
    sampler = start()
    _check_what_was_measured(sampler, talker, renderer.tokenizer, _requests(6))
