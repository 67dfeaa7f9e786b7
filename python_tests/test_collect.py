"""The collector with a scripted sampler: exact leaves, forks, budgets, order, overlap. No engine."""

import itertools
import math
import random
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import (
    PROMPTS,
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

from arpo_ext.errors import CollectError, DataError
from arpo_ext.render import Renderer
from arpo_ext.rollout import Completion, collect
from arpo_ext.types import Prompt, StopReason, ToolResult


@pytest.fixture(scope="module")
def renderer(tag_tokenizer):
    return Renderer(tag_tokenizer, ["search", "python"])


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_scenario_ends_with_exactly_m_leaves(renderer, data):
    paths = data.draw(st.integers(1, 9), "M")
    config = rollout_config(
        paths=paths,
        initial_paths=data.draw(st.integers(1, paths), "N"),
        branch_width=data.draw(st.integers(1, 3), "Z"),
        probe_tokens=data.draw(st.sampled_from([1, 2, 5, 30]), "k"),
        policy=data.draw(st.sampled_from(["paper", "aepo", "at2po", "appo", "random", "chain"])),
        rounds=data.draw(st.integers(1, 3)),
        min_distance=data.draw(st.integers(1, 4)),
        baseline=data.draw(st.sampled_from(["root", "post_tool"])),
        normalizer=data.draw(st.sampled_from(["mean_over_log_vocab", "sum_over_vocab"])),
        max_tool_calls=data.draw(st.integers(0, 4)),
        max_response_tokens=data.draw(st.sampled_from([1, 3, 12, 40, 300])),
        deterministic=data.draw(st.booleans()),
    )
    pool = Pool(lambda call: ToolResult(call.name, "fact " * random.Random(call.text).randint(0, 9), bool(call.text)))
    seed = data.draw(st.integers(0, 2**31))
    collected, sampler = collect_scripted(renderer, random_script, config, pool=pool, max_model_len=90, seed=seed)
    check_trees(collected.trees, config)
    asked = {(request.tokens, tokens) for request, tokens in sampler.seen}
    assert len({request.seed for request, _ in sampler.seen}) == len(sampler.seen)
    for tree in collected.trees:
        for segment in tree.segments:
            if segment.sampled and config.policy != "appo":
                # Token in, token out: what the tree stores is what the sampler was given and gave. appo cuts turns.
                assert (tuple(tree.path_tokens(segment.parent)), segment.tokens) in asked
            if segment.tool is not None and segment.tool.ok:
                assert segment.tool.text == segment.text
    m = collected.metrics
    assert m["rollout/tool_calls"] == len(pool.calls)
    answered = sum(tree.counts["tool_calls"] for tree in collected.trees)
    assert m["rollout/tool_calls"] + m["rollout/tool_calls_refused"] == answered
    beginnings = [s for t in collected.trees for s in t.segments if s.parent == 0]
    roots = len(beginnings) - sum(s.branch.children for s in beginnings if s.branch)
    assert roots + m["rollout/forks"] == paths * len(PROMPTS)
    if config.policy == "aepo":
        assert m["rollout/fresh_paths"] <= roots - len(PROMPTS)
    else:
        initial = paths if config.policy == "chain" else config.initial_paths
        assert m["rollout/fresh_paths"] == roots - initial * len(PROMPTS)


def test_forks_hang_from_the_tool_result_and_share_its_call(renderer):
    config = rollout_config(paths=4, initial_paths=2)
    pool = Pool()
    collected, _ = collect_scripted(renderer, one_call, config, pool=pool, prompts=PROMPTS[:1])
    (tree,) = collected.trees
    check_trees([tree], config)
    results = [i for i, s in enumerate(tree.segments) if s.tool is not None]
    assert len(results) == len(pool.calls) == 2
    assert sorted(sum(s.parent == r for s in tree.segments) for r in results) == [2, 2]
    assert [s.branch.children for s in tree.segments if s.branch] == [1, 1]
    assert collected.metrics["rollout/forks"] == 2
    assert collected.metrics["rollout/fresh_paths"] == 0
    assert collected.metrics["rollout/tool_calls_per_path"] == 1


def test_a_sibling_does_not_ask_again_at_the_result_it_was_forked_from(renderer):
    # Room for many, but one decision of width 1 per result: one sibling each.
    collected, _ = collect_scripted(renderer, one_call, rollout_config(paths=8, initial_paths=1), prompts=PROMPTS[:1])
    (tree,) = collected.trees
    readers = [sum(s.parent == i for s in tree.segments) for i, r in enumerate(tree.segments) if r.tool is not None]
    assert readers == [2, *[1] * 6]
    # The initial path forks once; both end; the six fresh ones have no room left.
    assert (collected.metrics["rollout/forks"], collected.metrics["rollout/fresh_paths"]) == (1, 6)


def test_branch_record_holds_score_and_room(renderer):
    collected, _ = collect_scripted(renderer, one_call, rollout_config(paths=3, initial_paths=2), prompts=PROMPTS[:1])
    branches = [s.branch for s in collected.trees[0].segments if s.branch]
    assert sorted(b.children for b in branches) == [0, 1]
    assert {b.room for b in branches} == {1}
    assert all(b.score > 0.5 for b in branches)
    probed = [s.probe_entropy for s in collected.trees[0].segments if s.sampled]
    assert sorted({round(p, 6) for p in probed}) == [0.1, 0.9]


def test_a_path_that_ends_within_the_probe_is_decided_on_what_it_has(renderer):
    config = rollout_config(paths=4, initial_paths=2, probe_tokens=50)
    collected, _ = collect_scripted(renderer, one_call, config, prompts=PROMPTS[:1])
    assert collected.metrics["rollout/forks"] == 2
    check_trees(collected.trees, config)


def test_branches_inherit_the_root_entropy_of_their_path(renderer):
    def script(request):
        turns = turns_read(request)
        # At the second result entropy lies between the root (0.1) and the sibling's own first window (0.9).
        return ("<search>mass</search>", [[0.1], [0.9], [0.5]][turns]) if turns < 2 else ("<eos>", [0.5])

    config = rollout_config(paths=4, initial_paths=1, probe_tokens=2)
    collected, _ = collect_scripted(renderer, script, config, prompts=PROMPTS[:1])
    # First result forks (2 paths), then both second results fork (4 paths): all above the root.
    assert collected.metrics["rollout/forks"] == 3


def test_missing_paths_start_fresh_all_at_once(renderer):
    starts = []

    def script(request):
        starts.append((len(request.tokens), sampler_steps()))
        return "<answer>1</answer><eos>", [0.1]

    sampler = ScriptedSampler(renderer, script)
    sampler_steps = lambda: sampler.steps  # noqa: E731
    config = rollout_config(paths=8, initial_paths=3)
    collected = collect(PROMPTS[:1], sampler=sampler, tools=Pool(), renderer=renderer, config=config, seed=0)
    assert [at for _, at in starts] == [0] * 3 + [4] * 5
    assert collected.metrics["rollout/fresh_paths"] == 5


def test_chain_starts_all_paths_at_once_and_records_no_decisions(renderer):
    config = rollout_config(paths=6, initial_paths=2, policy="chain")
    collected, sampler = collect_scripted(renderer, one_call, config, prompts=PROMPTS[:1])
    assert [len(r.tokens) for r, _ in sampler.seen[:6]] == [1] * 6
    assert not any(s.branch for s in collected.trees[0].segments)
    assert collected.metrics["rollout/fresh_paths"] == 0


def _three_calls(first, later):
    """Search three times and answer; entropies of the turn before a call and of those behind a result."""

    def script(request):
        turn = turns_read(request)
        text = "<search>mass</search>" if turn < 3 else "<answer>7</answer><eos>"
        return text, [later if turn else first]

    return script


@pytest.mark.parametrize(
    ("first", "later", "initial"),
    # 8 sigmoid(2 (first - later)), rounded: worked by hand.
    [(0.5, 0.5, 4), (0.5, 1.0, 2), (0.9, 0.1, 7), (0.1, 4.6, 1)],
)
def test_aepo_splits_by_the_path_it_monitors_and_keeps_that_path(renderer, first, later, initial):
    config = rollout_config(
        policy="aepo", paths=8, initial_paths=8, split_slope=2 * math.log(113), base=0.0, threshold=0.9
    )
    collected, sampler = collect_scripted(renderer, _three_calls(first, later), config, prompts=PROMPTS[:1])
    check_trees(collected.trees, config)
    (tree,) = collected.trees
    assert sum(s.parent == 0 for s in tree.segments) == 8
    assert collected.metrics["rollout/forks"] == 0
    assert collected.metrics["rollout/fresh_paths"] == 8 - initial
    # The monitored path is the first of the eight, sampled once and alone.
    assert [request.tokens for request, _ in sampler.seen].count(tree.segments[0].tokens) == 8
    monitored = [len(request.tokens) for request, _ in sampler.seen[:4]]
    assert monitored == sorted(set(monitored))


def test_aepo_without_a_tool_call_starts_every_path_at_the_prompt(renderer):
    config = rollout_config(policy="aepo", paths=5)
    collected, _ = collect_scripted(renderer, lambda r: ("<answer>1</answer><eos>", None), config, prompts=PROMPTS[:1])
    assert collected.metrics["rollout/fresh_paths"] == 0
    assert len(collected.trees[0].leaves) == 5


def test_aepo_makes_each_further_branch_of_a_path_harder(renderer):
    # dH = 0.4 after every result: 0.5 + 1 * 0.4 = 0.9, times 1 - 0.3 l for the l-th branch in a row: 0.9, 0.63, 0.36.
    script = _three_calls(0.1 * math.log(113), 0.5 * math.log(113))
    config = rollout_config(policy="aepo", paths=16, initial_paths=16, base=0.5, weight=1.0, threshold=0.6, penalty=0.3,
                     split_slope=0.0, max_tool_calls=9)  # fmt: skip
    collected, _ = collect_scripted(renderer, script, config, prompts=PROMPTS[:1])
    (tree,) = collected.trees
    check_trees([tree], config)
    scores = {}
    for index, segment in enumerate(tree.segments):
        if segment.branch:
            turn = sum(tree.segments[i].tool is not None for i in tree.path(index))
            scores.setdefault(turn, set()).add((round(segment.branch.score, 4), segment.branch.children > 0))
    assert scores[1] == {(0.9, True)}
    assert (0.63, True) in scores[2]
    assert all(score == 0.36 and not granted for score, granted in scores[3] if score < 0.5)


def test_at2po_samples_the_least_certain_turns_again(renderer):
    class Uncertain(ScriptedSampler):
        """Mean -log p of a turn: 0.1 at the prompt, 0.9 behind the first result, 0.5 behind the second."""

        def step(self):
            events = super().step()
            surprise = {e.id: (0.1, 0.9, 0.5, 0.2)[min(self.turns[e.id], 3)] for e in events}
            return [
                replace(e, logprobs=(-surprise[e.id],) * len(e.tokens)) if isinstance(e, Completion) else e
                for e in events
            ]

        turns: dict = {}  # noqa: RUF012 - one sampler per test

        def submit(self, request):
            self.turns[request.id] = turns_read(request)
            super().submit(request)

    config = rollout_config(policy="at2po", paths=6, initial_paths=2, rounds=2, weight=0.05)
    sampler = Uncertain(renderer, _three_calls(0.1, 0.1))
    collected = collect(PROMPTS[:1], sampler=sampler, tools=Pool(), renderer=renderer, config=config, seed=1)
    (tree,) = collected.trees
    check_trees([tree], config)
    # Two chains; room 2 in each of two rounds. Round 1: both turns behind a first result (0.9). Round 2: those again
    # and their siblings, all at 0.9 - 0.05: the two of lowest key.
    granted = [(i, s.branch) for i, s in enumerate(tree.segments) if s.branch and s.branch.children]
    assert sum(branch.children for _, branch in granted) == 4
    assert {branch.room for _, branch in granted} == {2}
    for index, branch in granted:
        assert sum(tree.segments[i].tool is not None for i in tree.path(index)) == 1
        assert branch.score == pytest.approx(0.9 if branch.children == 1 and index < 8 else 0.85, abs=0.051)
    assert collected.metrics["rollout/fresh_paths"] == 0
    # Every decision is kept, also those that granted nothing.
    assert all(s.branch is not None for s in tree.segments[1:] if s.sampled and s.parent == 0)


def test_appo_forks_at_the_least_certain_tokens(renderer):
    entropies = [0.1, 0.2, 3.0, 0.1, 2.0, 0.1]
    texts = ["<answer>abcd", "<answer>wxyz"]

    def script(request):
        text = texts[0] if request.seed % 2 else texts[1]
        return text + "<eos>", entropies

    config = rollout_config(policy="appo", paths=3, initial_paths=1, min_distance=1)
    collected, sampler = collect_scripted(renderer, script, config, prompts=PROMPTS[:1])
    (tree,) = collected.trees
    check_trees([tree], config)
    # One chain of six tokens; the two positions of highest entropy are tokens 2 and 4 of it.
    chain = sampler.seen[0][1]
    forked = sorted(request.tokens[1:] for request, _ in sampler.seen[1:])
    assert forked == sorted([chain[:2], chain[:4]])
    granted = [(tree.path_tokens(s.parent)[1:], s.branch.score) for s in tree.segments if s.branch]
    assert [len(before) for before, _ in sorted(granted)] == [2, 4]
    assert max(granted, key=lambda pair: pair[1])[0] == list(chain[:2])
    # Cut, but still what was sampled: the chain's tokens, logprobs and entropies in order.
    (leaf,) = [leaf for leaf in tree.leaves if tuple(tree.path_tokens(leaf.segment)[1:]) == chain][:1]
    assert [h for s in tree.response_segments(leaf) for h in s.entropies] == pytest.approx(entropies)
    assert "".join(s.text for s in tree.response_segments(leaf)) == renderer.answer_text(chain)


def test_appo_keeps_forks_of_a_turn_apart_and_fills_up_with_fresh_paths(renderer):
    config = rollout_config(policy="appo", paths=6, initial_paths=1, min_distance=3)
    script = lambda r: ("abcdef<eos>", [0.1, 2.0, 2.1, 0.1, 0.1, 0.1, 0.1])  # noqa: E731
    collected, sampler = collect_scripted(renderer, script, config, prompts=PROMPTS[:1])
    (tree,) = collected.trees
    check_trees([tree], config)
    positions = sorted(len(request.tokens) - 1 for request, _ in sampler.seen[1:])
    apart = [p for p in positions if p]
    assert all(b - a >= 3 for a, b in itertools.pairwise(apart))
    assert 2 in apart
    assert len(tree.leaves) == 6


def test_a_fork_inside_a_call_runs_the_call(renderer):
    def script(request):
        if turns_read(request):
            return "<answer>7</answer><eos>", [0.1]
        forked = "<search>" in renderer.decode(request.tokens)
        return ("of</search>" if forked else "<search>mass of</search>"), [0.1, 0.1, 0.9, 0.1]

    pool, config = Pool(), rollout_config(policy="appo", paths=2, initial_paths=1)
    (tree,) = collect_scripted(renderer, script, config, pool=pool, prompts=PROMPTS[:1])[0].trees
    check_trees([tree], config)
    assert [call.text for call in pool.calls] == ["mass of", "massof"]
    assert all(segment.tool.ok for segment in tree.segments if segment.tool)


def test_appo_cuts_no_character(bpe_tokenizer):
    renderer = Renderer(bpe_tokenizer, ["search"])
    answer = "a\N{LATIN SMALL LETTER E WITH ACUTE}b\N{OGHAM SPACE MARK}c"
    # Highest within a character: at its second byte.
    script = lambda request: (f"{answer}<|im_end|>", [0.1, 0.2, 0.9, 0.1, 0.1, 0.8, 0.7, 0.6, 0.1])  # noqa: E731
    config = rollout_config(policy="appo", paths=3, initial_paths=1)
    (tree,) = collect_scripted(renderer, script, config, prompts=PROMPTS[:1])[0].trees
    check_trees([tree], config)
    cuts = {len(tree.path_tokens(s.parent)) for s in tree.segments if s.branch}
    assert {cut - len(tree.segments[0].tokens) for cut in cuts} == {1, 7}
    texts = ["".join(segment.text for segment in tree.response_segments(leaf)) for leaf in tree.leaves]
    assert texts == [answer, "a" + answer, answer[:-1] + answer]


def test_appo_needs_the_entropies_of_all_tokens():
    with pytest.raises(ValueError, match="expected 'all'"):
        rollout_config(policy="appo", entropies="probe")


def test_at2po_counts_a_turn_chosen_twice(renderer):
    config = rollout_config(policy="at2po", paths=4, initial_paths=1, rounds=3, weight=0.0, max_tool_calls=0)
    collected, sampler = collect_scripted(
        renderer, lambda r: ("<answer>1</answer><eos>", None), config, prompts=PROMPTS[:1]
    )
    (tree,) = collected.trees
    check_trees([tree], config)
    assert sum(s.branch.children for s in tree.segments if s.branch) == 3
    assert len({request.seed for request, _ in sampler.seen}) == 4


def test_at_the_call_limit_the_model_is_told_and_may_answer_once(renderer):
    def script(request):
        return ("<answer>1</answer><eos>", None) if request.seed % 2 and turns_read(request) == 2 else (
            "<search>mass</search>", None)  # fmt: skip

    config = rollout_config(paths=8, initial_paths=8, max_tool_calls=1)
    pool = Pool()
    collected, _ = collect_scripted(renderer, script, config, pool=pool, prompts=PROMPTS[:1])
    check_trees(collected.trees, config)
    (tree,) = collected.trees
    assert len(pool.calls) == 8
    ends = set()
    for leaf in tree.leaves:
        results = [s for s in tree.response_segments(leaf) if s.tool]
        assert [s.tool.ok for s in results] == [True, False]
        assert "limit of 1 tool calls is reached" in results[1].text
        ends.add(leaf.end)
    assert ends == {StopReason.EOS, StopReason.TOOL}
    assert collected.metrics["rollout/tool_calls_refused"] == 8


@pytest.mark.parametrize("text", ["mass</search>", "<search> </search>", "<python>1</search>"])
def test_a_malformed_call_is_a_result_that_says_so(renderer, text):
    pool = Pool()
    config = rollout_config(paths=1, initial_paths=1)
    script = lambda request: ("<eos>", None) if turns_read(request) else (text, None)  # noqa: E731
    collected, _ = collect_scripted(renderer, script, config, pool=pool, prompts=PROMPTS[:1])
    (result,) = [s for s in collected.trees[0].segments if s.tool]
    assert not pool.calls
    assert not result.tool.ok
    assert (result.tool.name, result.sampled) == ("search", False)
    assert "malformed call: expected" in result.text
    # The tags it quotes are text, so they cannot close anything.
    assert result.tokens.count(renderer.stop_token_ids[0]) == 0


def test_a_failed_tool_is_a_record(renderer):
    pool = Pool(lambda call: ToolResult(call.name, "TimeoutError", False, seconds=3.0))
    collected, _ = collect_scripted(renderer, one_call, rollout_config(), pool=pool)
    results = [s.tool for t in collected.trees for s in t.segments if s.tool]
    assert {(r.ok, r.text, r.seconds) for r in results} == {(False, "<result>TimeoutError</result>", 3.0)}


def test_results_are_cut_to_the_budget_and_leave_room_to_answer(renderer):
    pool = Pool(lambda call: ToolResult(call.name, "x" * 1000, True))
    config = rollout_config(max_response_tokens=60, paths=3, initial_paths=3)
    collected, _ = collect_scripted(renderer, one_call, config, pool=pool)
    check_trees(collected.trees, config)
    for tree in collected.trees:
        for leaf in tree.leaves:
            call, result, answer = tree.response_segments(leaf)
            left = 60 - len(call.tokens)
            assert len(result.tokens) == left - left // 4
            assert leaf.end is StopReason.EOS or len(answer.tokens) == left // 4


def test_a_call_with_no_room_for_its_result_ends_the_path(renderer):
    pool = Pool()
    config = rollout_config(max_response_tokens=6, paths=1, initial_paths=1)
    script = lambda request: ("<search>abc</search>", None)  # noqa: E731
    collected, _ = collect_scripted(renderer, script, config, pool=pool, prompts=PROMPTS[:1])
    assert [leaf.end for leaf in collected.trees[0].leaves] == [StopReason.LENGTH]
    assert not pool.calls


def test_the_longest_sequence_of_the_engine_bounds_every_path(renderer):
    collected, _ = collect_scripted(renderer, lambda r: ("x" * 500, None), rollout_config(), max_model_len=50)
    for tree in collected.trees:
        assert {leaf.end for leaf in tree.leaves} == {StopReason.LENGTH}
        assert {len(tree.path_tokens(leaf.segment)) for leaf in tree.leaves} == {50}


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_runs(renderer):
    sampler = ScriptedSampler(renderer, one_call, max_model_len=20)
    long = Prompt("long", ({"role": "user", "content": "x" * 20},), ())
    with pytest.raises(
        DataError, match=r"prompt 'long' has 20 tokens; expected fewer than engine.max_model_len \(20\)"
    ):
        collect([*PROMPTS, long], sampler=sampler, tools=Pool(), renderer=renderer, config=rollout_config(), seed=0)
    assert (sampler.seen, sampler.resets) == ([], 0)


@pytest.mark.parametrize("policy", ["paper", "aepo", "at2po", "appo", "random"])
def test_deterministic_mode_fixes_the_tree_whatever_the_tools_take(renderer, policy):
    jitter = random.Random(1)

    def answer(call):
        threading.Event().wait(jitter.random() / 200)
        return ToolResult(call.name, call.text, True)

    config = rollout_config(policy=policy, paths=9, initial_paths=3)
    runs = []
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            collected, sampler = collect_scripted(renderer, random_script, config, pool=Pool(answer, threads))
            assert sampler.resets == 1
            runs.append(without_times(collected.trees))
    assert runs[0] == runs[1] == runs[2]
    other, _ = collect_scripted(renderer, random_script, config, seed=6)
    assert without_times(other.trees) != runs[0]


def test_the_order_in_which_an_engine_reports_changes_nothing(renderer):
    class Shuffled(ScriptedSampler):
        def step(self):
            events = super().step()
            random.Random(self.steps).shuffle(events)
            return events

    config, trees = rollout_config(policy="random", paths=9), []
    for kind in (ScriptedSampler, Shuffled):
        sampler = kind(renderer, random_script)
        trees.append(collect(PROMPTS, sampler=sampler, tools=Pool(), renderer=renderer, config=config, seed=5).trees)
    assert trees[0] == trees[1]


def test_draws_do_not_depend_on_the_other_prompts(renderer):
    config = rollout_config(policy="random")
    alone, _ = collect_scripted(renderer, random_script, config, prompts=PROMPTS[:1])
    together, _ = collect_scripted(renderer, random_script, config)
    assert without_times(alone.trees) == without_times(together.trees[:1])


def test_a_slow_tool_stops_no_other_path(renderer):
    slow, finished_at = Future(), {}

    class SlowForOne(Pool):
        def submit(self, call):
            return slow if call.text == "slow" else super().submit(call)

    def script(request):
        if turns_read(request):
            return "<answer>7</answer><eos>", None
        return ("<search>slow</search>" if len(request.tokens) == 1 else "<search>mass</search>" + "", None)

    sampler = ScriptedSampler(renderer, script)
    released = threading.Timer(5.0, lambda: slow.done() or slow.set_result(ToolResult("search", "late", False)))
    released.start()

    def watch():
        open_prompts = {len(r.tokens) for r, *_ in sampler.running.values()}
        finished_at[sampler.steps] = open_prompts

    sampler.before_step = watch
    ends = []

    def ended(count):
        ends.append(sampler.steps)
        if len(ends) == 2:
            # Both other prompts are done while the tool is still running.
            assert not slow.done()
            slow.set_result(ToolResult("search", "late", True))

    config = rollout_config(paths=1, initial_paths=1, deterministic=False)
    collected = collect(
        PROMPTS, sampler=sampler, tools=SlowForOne(), renderer=renderer, config=config, seed=0, progress=ended
    )
    released.cancel()
    assert len(ends) == 3
    assert all(s.tool.ok for t in collected.trees for s in t.segments if s.tool)
    assert collected.metrics["rollout/seconds"] < 5


def test_without_anything_to_decode_it_waits_for_the_first_tool_that_answers(renderer):
    with ThreadPoolExecutor(4) as threads:
        delays = iter([0.2, 0.01, 0.1])

        def answer(call):
            threading.Event().wait(next(delays))
            return ToolResult(call.name, "x", True)

        config = rollout_config(paths=1, initial_paths=1, deterministic=False)
        collected, sampler = collect_scripted(renderer, one_call, config, pool=Pool(answer, threads))
    check_trees(collected.trees, config)
    assert collected.metrics["rollout/tool_wait_seconds"] > 0.1
    assert sampler.resets == 0


def test_an_error_of_the_engine_leaves_no_open_request(renderer):
    sampler = ScriptedSampler(renderer, one_call)

    def fail():
        if sampler.steps == 3:
            raise RuntimeError("engine died")

    sampler.before_step = fail
    with pytest.raises(CollectError, match="0 of 3 trees complete: RuntimeError: engine died"):
        collect(PROMPTS, sampler=sampler, tools=Pool(), renderer=renderer, config=rollout_config(), seed=0)
    assert sampler.num_unfinished == 0


def test_entropies_beyond_the_probe_are_kept_only_on_request(renderer):
    for kept, expected in (("probe", 4), ("all", 12)):
        config = rollout_config(entropies=kept, paths=1, initial_paths=1)
        collected, _ = collect_scripted(renderer, lambda r: ("x" * 11 + "<eos>", [0.5]), config, prompts=PROMPTS[:1])
        assert len(collected.trees[0].segments[1].entropies) == expected


def test_progress_hears_of_every_path(renderer):
    heard = []
    collect_scripted(renderer, random_script, rollout_config(), progress=heard.append)
    assert sum(heard) == 8 * len(PROMPTS)


def test_greedy_reaches_the_sampler(renderer):
    _, sampler = collect_scripted(renderer, one_call, rollout_config(), greedy=True)
    assert all(request.greedy for request, _ in sampler.seen)
