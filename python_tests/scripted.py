"""A sampler and tools that follow a script, and collections over them; for the tests of rollouts."""

import random
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import replace

import pytest

from arpo_ext.config import RolloutConfig
from arpo_ext.rollout import Completion, Probe, check_tree, collect, metrics, schedule
from arpo_ext.types import Prompt, StopReason, ToolResult

PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": "mass" + " of" * i},), ("1",)) for i in range(3)]


class ScriptedSampler:
    """One token of every open request a step. `script(request)` gives (text, entropies or None), cut to max_tokens."""

    vocab_size = 113

    def __init__(self, renderer, script, max_model_len=4096):
        self.renderer, self.script, self.max_model_len = renderer, script, max_model_len
        self.running, self.seen, self.steps, self.resets = {}, [], 0, 0
        self.before_step = lambda: None

    @property
    def num_unfinished(self):
        return len(self.running)

    def submit(self, request):
        assert request.id not in self.running
        assert 0 < request.max_tokens <= self.max_model_len - len(request.tokens)
        text, entropies = self.script(request)
        tokens = self.renderer.tokenizer.encode(text, add_special_tokens=False)
        ends = [place for place, token in enumerate(tokens, start=1) if token in self.renderer.eos_token_ids]
        tokens = tokens[: min(ends, default=len(tokens))]
        calls = tokens[-1] in self.renderer.stop_token_ids or text.endswith(tuple(self.renderer.stop_strings))
        reason = StopReason.TOOL if calls else StopReason.EOS
        if len(tokens) > request.max_tokens:
            tokens, reason = tokens[: request.max_tokens], StopReason.LENGTH
        entropies = tuple((entropies or [0.5]) * len(tokens))[: len(tokens)]
        self.running[request.id] = (request, [], tuple(tokens), entropies, reason)
        self.seen.append((request, tuple(tokens)))

    def step(self):
        self.before_step()
        assert self.running
        self.steps += 1
        events = []
        for id, (request, out, tokens, entropies, reason) in list(self.running.items()):
            out.append(tokens[len(out)])
            if len(out) == len(tokens):
                del self.running[id]
                events.append(Completion(id, tokens, (-0.1,) * len(tokens), entropies, reason))
            elif len(out) == request.probe_tokens:
                events.append(Probe(id, entropies[: len(out)]))
        return events[::-1]

    def abort(self, id):
        self.running.pop(id, None)

    def reset_prefix_cache(self):
        self.resets += 1


class Pool:
    """Answers at once, or in threads after a delay."""

    def __init__(self, answer=lambda call: ToolResult(call.name, f"{call.text} is 7", True), threads=None):
        self.answer, self.threads, self.calls = answer, threads, []

    def submit(self, call):
        self.calls.append(call)
        if self.threads is not None:
            return self.threads.submit(self.answer, call)
        future = Future()
        future.set_result(self.answer(call))
        return future

    def cancel(self, future):
        return future.cancel()

    def wait(self, futures, timeout_s=None):
        wait(futures, timeout=timeout_s, return_when=FIRST_COMPLETED)


class Clock:
    """Stands for `time` where the collector reads it; moved by the scripts alone, so that no load shows in a test."""

    def __init__(self):
        self.now = 0.0

    def advance(self, seconds):
        self.now += seconds

    def monotonic(self):
        return self.now

    perf_counter = monotonic

    @contextmanager
    def installed(self):
        with pytest.MonkeyPatch.context() as patch:
            for module in (schedule, metrics):
                patch.setattr(module, "time", self)
            yield self


def rollout_config(**values):
    paths = values.get("paths", 8)
    defaults = {"paths": paths, "initial_paths": min(paths, 3), "probe_tokens": 4, "max_tool_calls": 3}
    return RolloutConfig(**{**defaults, "max_response_tokens": 200, **values})


def collect_scripted(renderer, script, config, *, pool=None, prompts=PROMPTS, max_model_len=4096, seed=5, **more):
    sampler = ScriptedSampler(renderer, script, max_model_len)
    collected = collect(
        prompts, sampler=sampler, tools=pool or Pool(), renderer=renderer, config=config, seed=seed, **more
    )
    assert not sampler.running
    return collected, sampler


def check_trees(trees, config):
    initial = {"chain": config.paths, "aepo": 1}.get(config.policy, config.initial_paths)
    for tree in trees:
        check_tree(
            tree,
            config.paths,
            initial,
            max_tool_calls=config.max_tool_calls,
            max_response_tokens=config.max_response_tokens,
            probe_tokens=config.probe_tokens,
        )


def turns_read(request):
    """Tool results the model has read."""
    return request.tokens.count(9)


def one_call(request):
    """Search once, answer; more uncertain behind the result than at the start."""
    return ("<answer>7</answer><eos>", [0.9]) if turns_read(request) else ("<search>mass</search>", [0.1])


def random_script(request):
    rng = random.Random(request.seed)
    kind = rng.random()
    text = "mass" * rng.randint(0, 6)
    if kind < 0.55:
        text += f"<search>{'of' * rng.randint(0, 3)}</search>"
    elif kind < 0.62:
        text += "</python>"
    else:
        text += "<answer>1</answer><eos>"
    return text, [rng.random() for _ in range(3)]


def without_times(trees):
    def plain(segment):
        return replace(segment, tool=replace(segment.tool, seconds=0.0, cached=False)) if segment.tool else segment

    return [replace(tree, segments=tuple(plain(s) for s in tree.segments)) for tree in trees]
