"""What stops a collection or holds it back: queues, budgets of a tree, clocks, cancellation, an engine that fails."""

import math
import random
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
from scripted import (
    PROMPTS,
    Clock,
    Pool,
    ScriptedSampler,
    check_trees,
    collect_scripted,
    one_call,
    random_script,
    rollout_config,
    turns_read,
    without_times,
)

from arpo_ext.config import ReferenceConfig, RolloutConfig
from arpo_ext.errors import CollectError
from arpo_ext.render import Renderer
from arpo_ext.rollout import Completion, collect
from arpo_ext.types import StopReason, ToolResult


@pytest.fixture(scope="module")
def renderer(tag_tokenizer):
    return Renderer(tag_tokenizer, ["search", "python"])


def _ends(collected):
    return Counter(leaf.end for tree in collected.trees for leaf in tree.leaves)


class Stuck(Pool):
    """Calls of the text `slow` are never answered."""

    def __init__(self, clock=None):
        super().__init__()
        self.clock, self.stuck = clock, []

    def submit(self, call):
        if call.text != "slow":
            return super().submit(call)
        self.stuck.append(Future())
        return self.stuck[-1]

    def wait(self, futures, timeout_s=None):
        if self.clock is None:
            super().wait(futures, timeout_s)
        elif not any(future.done() for future in futures):
            self.clock.advance(timeout_s)


@pytest.fixture
def clock():
    with Clock().installed() as clock:
        yield clock


def _one_is_slow(request):
    """The path of the first prompt asks a tool that never answers."""
    if turns_read(request):
        return "<answer>7</answer><eos>", None
    return ("<search>slow</search>" if len(request.tokens) == 1 else "<search>mass</search>"), None


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_requests_beyond_the_limit_wait_in_the_order_of_the_paths(renderer, limit):
    config = rollout_config(policy="random", paths=9, max_open_requests=limit)
    most = []

    class Counting(ScriptedSampler):
        def submit(self, request):
            super().submit(request)
            most.append(self.num_unfinished)

    sampler = Counting(renderer, random_script)
    collected = collect(PROMPTS, sampler=sampler, tools=Pool(), renderer=renderer, config=config, seed=5)
    check_trees(collected.trees, config)
    assert max(most) == limit
    ids = [request.id for request, _ in sampler.seen]
    assert ids == sorted(ids)
    # Who waits draws the same: a tree of chains is the same for every limit.
    chains = rollout_config(policy="chain", paths=9)
    paths = [
        collect_scripted(renderer, random_script, chains.model_copy(update={"max_open_requests": at_once}))[0].trees
        for at_once in (None, limit)
    ]
    assert [sorted((tuple(tree.path_tokens(leaf.segment)), leaf.end) for leaf in tree.leaves) for tree in paths[0]] == [
        sorted((tuple(tree.path_tokens(leaf.segment)), leaf.end) for leaf in tree.leaves) for tree in paths[1]
    ]


@pytest.mark.parametrize("deterministic", [True, False])
def test_calls_beyond_the_limit_wait_in_the_order_of_the_calls(renderer, deterministic):
    lock, running, most, order = threading.Lock(), 0, 0, []

    def answer(call):
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
            order.append(call.text)
        time.sleep(0.002)
        with lock:
            running -= 1
        return ToolResult(call.name, call.text, True)

    def script(request):
        return ("<eos>", None) if turns_read(request) else (f"<search>{request.id}</search>", None)

    config = rollout_config(policy="chain", max_open_calls=2, deterministic=deterministic)
    with ThreadPoolExecutor(8) as threads:
        collected, _ = collect_scripted(renderer, script, config, pool=Pool(answer, threads))
    check_trees(collected.trees, config)
    assert most == 2
    assert len(order) == 24
    # Two at a time start in the order of the paths.
    assert all(abs(int(text) - place) <= 1 for place, text in enumerate(order))


@pytest.mark.parametrize("deterministic", [True, False])
def test_an_answer_that_is_there_at_once_leaves_its_place_to_the_next_call(renderer, deterministic):
    class AtOnce(Pool):
        def wait(self, futures, timeout_s=None):
            raise AssertionError("nothing is under way")

    config = rollout_config(policy="chain", max_open_calls=1, deterministic=deterministic)
    sampler = ScriptedSampler(renderer, one_call)
    collect(PROMPTS, sampler=sampler, tools=AtOnce(), renderer=renderer, config=config, seed=5)
    # Three steps for all calls together, four for all answers.
    assert sampler.steps == 7


@pytest.mark.parametrize("policy", ["chain", "random", "paper", "at2po", "appo"])
@pytest.mark.parametrize("tokens", [8, 9, 40, 300])
def test_a_tree_never_holds_more_tokens_than_it_may(renderer, policy, tokens):
    config = rollout_config(policy=policy, max_tree_tokens=tokens)
    pool = Pool(lambda call: ToolResult(call.name, "x" * 50, True))
    collected, _ = collect_scripted(renderer, random_script, config, pool=pool)
    check_trees(collected.trees, config)
    for tree in collected.trees:
        assert sum(len(segment.tokens) for segment in tree.segments[1:]) <= tokens


def test_paths_share_the_tokens_of_their_tree_evenly(renderer):
    config = rollout_config(policy="chain", paths=4, max_tree_tokens=40)
    collected, _ = collect_scripted(renderer, lambda r: ("x" * 99, None), config, prompts=PROMPTS[:1])
    (tree,) = collected.trees
    assert [len(segment.tokens) for segment in tree.segments[1:]] == [10] * 4
    assert _ends(collected) == {StopReason.LENGTH: 4}
    # What the first two leave is there for the two that start after them.
    config = rollout_config(policy="paper", paths=4, initial_paths=2, max_tree_tokens=40)
    script = lambda request: ("xx<eos>" if request.id < 2 else "x" * 99, None)  # noqa: E731
    (tree,) = collect_scripted(renderer, script, config, prompts=PROMPTS[:1])[0].trees
    assert [len(segment.tokens) for segment in tree.segments[1:]] == [3, 3, 17, 17]


def test_a_tree_out_of_tokens_for_a_path_each_is_refused():
    with pytest.raises(ValueError, match=r"max_tree_tokens is 7 and paths \(M\) is 8; expected at least one token"):
        rollout_config(max_tree_tokens=7)


def test_calls_beyond_the_limit_of_the_tree_get_a_message_and_the_model_may_answer(renderer):
    config = rollout_config(policy="chain", paths=5, max_tree_tool_calls=3)
    pool = Pool()
    collected, _ = collect_scripted(renderer, one_call, config, pool=pool)
    check_trees(collected.trees, config)
    assert len(pool.calls) == 9
    for tree in collected.trees:
        texts = [segment.text for segment in tree.segments if segment.tool and not segment.tool.ok]
        assert (
            texts == ["<result>not run: the limit of 3 tool calls for all answers is reached, answer now</result>"] * 2
        )
    assert _ends(collected) == {StopReason.EOS: 15}
    assert collected.metrics["rollout/tool_calls_refused"] == 6
    # A further call after the message ends the path.
    script = lambda request: ("<search>mass</search>", None)  # noqa: E731
    collected, _ = collect_scripted(renderer, script, config, prompts=PROMPTS[:1])
    assert collected.metrics["rollout/tool_calls"] == 3
    assert _ends(collected) == {StopReason.TOOL: 5}


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_path_whose_time_is_over_is_cut_and_the_others_go_on(renderer, clock, deterministic):
    config = rollout_config(paths=3, initial_paths=1, path_timeout_s=0.05, deterministic=deterministic)
    pool, heard = Stuck(clock), []
    collected, _ = collect_scripted(renderer, _one_is_slow, config, pool=pool, progress=heard.append)
    check_trees(collected.trees, config)
    assert _ends(collected) == {StopReason.TIMEOUT: 3, StopReason.EOS: 6}
    assert [leaf.end for leaf in collected.trees[0].leaves] == [StopReason.TIMEOUT] * 3
    assert collected.metrics["rollout/timed_out_paths"] == 3
    assert collected.metrics["rollout/tool_calls_abandoned"] == 3
    assert all(future.cancelled() for future in pool.stuck)
    assert all(tree.is_complete for tree in collected.trees)
    assert sum(heard) == 9
    cut = collected.trees[0].segments[collected.trees[0].leaves[0].segment]
    assert (cut.tokens, cut.sampled, cut.stop_reason) == ((), False, StopReason.TIMEOUT)


def test_a_path_that_decodes_too_long_is_cut_and_its_request_aborted(renderer, clock):
    sampler = ScriptedSampler(renderer, lambda r: ("x" * 150 if len(r.tokens) == 1 else "xx<eos>", None))
    sampler.before_step = lambda: clock.advance(0.002)
    config = rollout_config(policy="chain", paths=2, path_timeout_s=0.05)
    collected = collect(PROMPTS, sampler=sampler, tools=Pool(), renderer=renderer, config=config, seed=0)
    check_trees(collected.trees, config)
    assert _ends(collected) == {StopReason.TIMEOUT: 2, StopReason.EOS: 4}
    assert not sampler.running
    assert sampler.steps == 25


def test_the_clock_of_a_path_does_not_run_while_it_waits_for_its_turn(renderer, clock):
    sampler = ScriptedSampler(renderer, lambda r: ("xxxx<eos>", None))
    sampler.before_step = lambda: clock.advance(0.004)
    config = rollout_config(policy="chain", path_timeout_s=0.021, max_open_requests=1)
    collected = collect(PROMPTS, sampler=sampler, tools=Pool(), renderer=renderer, config=config, seed=0)
    assert collected.metrics["rollout/seconds"] == pytest.approx(24 * 5 * 0.004)
    assert _ends(collected) == {StopReason.EOS: 24}


@pytest.mark.parametrize("policy", ["paper", "aepo", "at2po", "appo", "random", "chain"])
def test_every_policy_survives_paths_that_are_cut_before_they_say_anything(renderer, clock, policy):
    sampler = ScriptedSampler(renderer, lambda r: ("x" * 99, None))
    sampler.before_step = lambda: clock.advance(0.002)
    config = rollout_config(policy=policy, path_timeout_s=0.001)
    collected = collect(PROMPTS, sampler=sampler, tools=Pool(), renderer=renderer, config=config, seed=0)
    check_trees(collected.trees, config)
    assert _ends(collected) == {StopReason.TIMEOUT: 24}


def test_a_path_that_is_cut_before_it_was_decided_forks_nothing(renderer, clock):
    # It asks as soon as it is told that the limit is reached, and is late by then.
    sampler = ScriptedSampler(renderer, lambda request: ("<search>mass</search>", None))
    sampler.before_step = lambda: clock.advance(0.01)
    config = rollout_config(
        policy="reference",
        reference=ReferenceConfig(top_logprobs_sum=False),
        base=1.0,
        initial_paths=1,
        max_tool_calls=0,
        path_timeout_s=0.025,
    )
    collected = collect(PROMPTS, sampler=sampler, tools=Pool(), renderer=renderer, config=config, seed=0)
    check_trees(collected.trees, config)
    assert collected.metrics["rollout/forks"] == 0
    assert collected.metrics["rollout/tool_calls_refused"] == 24
    assert _ends(collected) == {StopReason.TIMEOUT: 24}


def test_a_sibling_has_a_clock_of_its_own(renderer, clock):
    def script(request):
        if not turns_read(request):
            return "<search>mass</search>", [0.1]
        return ("xxxx" if request.id == 1 else "x" * 20) + "<eos>", [0.9]

    sampler = ScriptedSampler(renderer, script)
    sampler.before_step = lambda: clock.advance(0.01)
    config = rollout_config(paths=2, initial_paths=1, path_timeout_s=0.225)
    collected = collect(PROMPTS[:1], sampler=sampler, tools=Pool(), renderer=renderer, config=config, seed=0)
    # Forked in the seventh step, and 21 steps long.
    assert (sampler.steps, collected.metrics["rollout/forks"]) == (28, 1)
    assert _ends(collected) == {StopReason.EOS: 2}


def test_siblings_of_a_turn_that_was_cut_stay_accounted_for(renderer, clock):
    def script(request):
        if not turns_read(request):
            return "<search>mass</search>", [0.1]
        # The first to read the result forks after four tokens and never ends.
        return ("x" * 199 if request.id == 1 else "<answer>7</answer><eos>"), [0.9]

    sampler = ScriptedSampler(renderer, script)
    sampler.before_step = lambda: clock.advance(0.002)
    config = rollout_config(paths=2, initial_paths=1, path_timeout_s=0.15)
    collected = collect(PROMPTS[:1], sampler=sampler, tools=Pool(), renderer=renderer, config=config, seed=0)
    check_trees(collected.trees, config)
    assert _ends(collected) == {StopReason.TIMEOUT: 1, StopReason.EOS: 1}
    (cut,) = [s for s in collected.trees[0].segments if s.stop_reason is StopReason.TIMEOUT]
    assert (cut.branch.children, round(cut.probe_entropy, 3)) == (1, 0.9)


@pytest.mark.parametrize("deterministic", [True, False])
def test_when_the_time_of_the_call_is_over_it_returns_what_is_complete(renderer, clock, deterministic):
    config = rollout_config(paths=2, initial_paths=1, collect_timeout_s=0.1, deterministic=deterministic)
    collected, _ = collect_scripted(renderer, _one_is_slow, config, pool=Stuck(clock))
    assert clock.now == pytest.approx(0.1)
    check_trees(collected.trees, config)
    ends = [[leaf.end.value for leaf in tree.leaves] for tree in collected.trees]
    assert ends[0] == ["cancelled"] * 2
    # The deterministic order waits for every tool before it goes on, so the others got no further.
    assert deterministic or ends[1:] == [["eos"] * 2] * 2
    assert [tree.is_complete for tree in collected.trees] == ["cancelled" not in tree for tree in ends]
    assert collected.metrics["rollout/cancelled_paths"] == _ends(collected)[StopReason.CANCELLED]


def test_a_collection_is_cancelled_from_another_thread(renderer):
    cancel = threading.Event()
    config = rollout_config(paths=2, initial_paths=1, deterministic=False)
    threading.Timer(0.1, cancel.set).start()
    collected, sampler = collect_scripted(renderer, _one_is_slow, config, pool=Stuck(), cancel=cancel)
    check_trees(collected.trees, config)
    assert _ends(collected) == {StopReason.CANCELLED: 2, StopReason.EOS: 4}
    # While it decodes.
    sampler = ScriptedSampler(renderer, lambda r: ("x" * 150, None))
    cancel = threading.Event()
    sampler.before_step = lambda: sampler.steps == 20 and cancel.set()
    collected = collect(PROMPTS, sampler=sampler, tools=Pool(), renderer=renderer, config=config, seed=0, cancel=cancel)
    check_trees(collected.trees, config)
    assert (sampler.steps, sampler.num_unfinished, _ends(collected)) == (21, 0, {StopReason.CANCELLED: 6})
    # Before it begins.
    collected, sampler = collect_scripted(renderer, one_call, config, cancel=cancel)
    check_trees(collected.trees, config)
    assert (sampler.steps, _ends(collected)) == (0, {StopReason.CANCELLED: 6})


def _failing_at(renderer, step, script=random_script):
    sampler = ScriptedSampler(renderer, script)

    def fail():
        if sampler.steps == step:
            raise OSError("pipe closed")

    sampler.before_step = fail
    return sampler


@pytest.mark.parametrize("policy", ["paper", "random", "at2po", "chain"])
def test_after_the_engine_failed_only_unfinished_prompts_are_sampled_again(renderer, policy):
    config = rollout_config(policy=policy, paths=6)
    (whole, sampler), heard, completed = collect_scripted(renderer, random_script, config), [], []
    for step in range(0, sampler.steps, 7):
        sampler = _failing_at(renderer, step)
        with pytest.raises(CollectError, match=r"of 3 trees complete: OSError: pipe closed") as caught:
            collect(PROMPTS, sampler=sampler, tools=Pool(), renderer=renderer, config=config, seed=5)
        saved = caught.value.collected.trees
        check_trees(saved, config)
        assert not sampler.running
        completed.append(sum(tree.is_complete for tree in saved))
        resumed, sampler = collect_scripted(renderer, random_script, config, finished=saved, progress=heard.append)
        assert resumed.trees == whole.trees
        again = [tree for tree, before in zip(whole.trees, saved, strict=True) if not before.is_complete]
        sampled = sum(len(tokens) for _, tokens in sampler.seen)
        assert sampled == resumed.metrics["rollout/sampled_tokens"] == sum(t.counts["sampled_tokens"] for t in again)
        assert sum(heard) == 18
        heard.clear()
    # Rounds keep trees of this size together until the end.
    assert policy == "at2po" or {*completed} > {0}


def test_what_was_sampled_before_the_engine_failed_is_kept(renderer):
    config = rollout_config(policy="chain", paths=2)
    sampler = _failing_at(renderer, 4, one_call)
    with pytest.raises(CollectError, match="0 of 3 trees complete") as caught:
        collect(PROMPTS, sampler=sampler, tools=Pool(), renderer=renderer, config=config, seed=5)
    for tree in caught.value.collected.trees:
        assert [s.sampled for s in tree.response_segments(tree.leaves[0])] == [True, False, False]
        assert {leaf.end for leaf in tree.leaves} == {StopReason.CANCELLED}


def test_a_failed_submission_and_a_lost_request_are_failures_of_the_engine_too(renderer):
    class Refusing(ScriptedSampler):
        def submit(self, request):
            if request.id == 4:
                raise ValueError("no")
            super().submit(request)

    class Losing(ScriptedSampler):
        def step(self):
            self.running.pop(0, None)
            return super().step() if self.running else []

    # Says nothing of the ten likeliest tokens, which the policy reference asks for.
    silent = "no logprobs beside the sampled ones"
    for kind, sentence in ((Refusing, "ValueError: no"), (Losing, "lost 1 requests"), (ScriptedSampler, silent)):
        sampler = kind(renderer, lambda request: ("<search>mass</search>" if request.id % 2 else "x", None))
        config = rollout_config(policy="reference" if sentence == silent else "paper")
        with pytest.raises(CollectError, match=sentence) as caught:
            collect(PROMPTS, sampler=sampler, tools=Pool(), renderer=renderer, config=config, seed=5)
        check_trees(caught.value.collected.trees, config)
        assert not sampler.running


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 4}, "seed 4 and 8 leaves; expected paper, 5 and 8"),
        ({"policy": "random"}, "policy random"),
        ({"leaves": ()}, "0 leaves"),
        ({"prompt_id": "q"}, "answers prompt 'q'; expected one of the prompts"),
    ],
)
def test_finished_trees_of_another_call_are_refused(renderer, changes, sentence):
    collected, _ = collect_scripted(renderer, random_script, rollout_config())
    with pytest.raises(ValueError, match=sentence):
        collect_scripted(renderer, random_script, rollout_config(), finished=[replace(collected.trees[0], **changes)])


def test_metrics_say_where_the_time_went_and_what_was_reused(renderer):
    class Caching(ScriptedSampler):
        def step(self):
            time.sleep(0.001)
            cached = {id: len(running[0].tokens) - 1 for id, running in self.running.items()}
            events = super().step()
            return [replace(e, cached_tokens=cached[e.id]) if isinstance(e, Completion) else e for e in events]

    def answer(call):
        time.sleep(0.05)
        return ToolResult(call.name, "x", True, seconds=0.05, cached=call.text == "mass")

    def script(request):
        turn = turns_read(request)
        return (("<search>of</search>", "<search>mass</search>")[turn], [[0.1], [0.9]][turn]) if turn < 2 else (
            "<eos>", [0.95])  # fmt: skip

    config = rollout_config(paths=8, initial_paths=2, probe_tokens=1, deterministic=False)
    sampler = Caching(renderer, script)
    with ThreadPoolExecutor(8) as threads:
        collected = collect(
            PROMPTS[:1], sampler=sampler, tools=Pool(answer, threads), renderer=renderer, config=config, seed=5
        )
    m = {name.removeprefix("rollout/"): value for name, value in collected.metrics.items()}
    # Two paths fork at the first result, all four at the second: no room is left to start afresh.
    assert (m["forks"], m["forks_at_depth_1"], m["forks_at_depth_2"], m["fresh_paths"]) == (6, 2, 4, 0)
    assert (m["tool_calls"], m["tool_cache_hits"], m["requests"]) == (6, 4, 14)
    assert m["tool_seconds"] == pytest.approx(0.3)
    assert m["context_tokens"] == sum(len(request.tokens) for request, _ in sampler.seen)
    assert m["prefix_tokens_reused"] == m["context_tokens"] - 14
    assert m["prefix_cache_hits"] == 12
    assert m["tool_wait_seconds"] >= 0.04
    assert m["decode_idle_seconds"] == pytest.approx(m["seconds"] - m["decode_seconds"])
    assert m["decode_idle_seconds"] >= m["tool_wait_seconds"]
    assert m["decode_seconds"] >= 0.001 * sampler.steps
    assert all(isinstance(value, float) and math.isfinite(value) for value in m.values())
    silent, _ = collect_scripted(renderer, one_call, config)
    assert "rollout/prefix_tokens_reused" not in silent.metrics


def test_limits_are_off_by_default():
    config = RolloutConfig()
    names = ("max_tree_tool_calls", "max_tree_tokens", "max_open_requests", "max_open_calls")
    assert [getattr(config, name) for name in (*names, "path_timeout_s", "collect_timeout_s")] == [None] * 6


def test_a_collection_without_limits_equals_one_with_limits_that_do_not_bind(renderer):
    wide = {"max_tree_tool_calls": 999, "max_open_requests": 999, "max_open_calls": 999}
    wide |= {"path_timeout_s": 999.0, "collect_timeout_s": 999.0, "max_tree_tokens": 8 * 200}
    trees = [
        without_times(collect_scripted(renderer, random_script, rollout_config(policy="random", **limits))[0].trees)
        for limits in ({}, wide)
    ]
    assert trees[0] == trees[1]


@pytest.mark.parametrize("seed", range(4))
def test_a_tool_that_answers_between_two_looks_is_not_lost(renderer, seed):
    class Late(Future):
        """Done after so many looks, like one that another thread answers between two of them."""

        def __init__(self, looks):
            super().__init__()
            self.left = looks

        def done(self):
            self.left -= 1
            return self.left < 0

    class LatePool(Pool):
        def submit(self, call):
            self.calls.append(call)
            future = Late(looks.randrange(6))
            future.set_result(self.answer(call))
            return future

    looks, config = random.Random(seed), rollout_config(policy="chain", deterministic=False)
    collected, _ = collect_scripted(renderer, random_script, config, pool=LatePool())
    check_trees(collected.trees, config)
