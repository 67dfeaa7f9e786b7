"""Any scenario of models, tools, limits, deadlines and failures: every invariant holds, nothing stalls.

The suite takes 300 scenarios; `ARPO_SCENARIOS=10000 pytest python_tests/test_collect_world.py` takes as many.
"""

import os
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import without_times
from scripted_world import Scenario, World, check

from arpo_ext.config import ReferenceConfig, RolloutConfig
from arpo_ext.render import Renderer
from arpo_ext.rollout.branching import Brancher

SCENARIOS = int(os.environ.get("ARPO_SCENARIOS", "300"))
POLICIES = ("paper", "reference", "aepo", "at2po", "appo", "random", "chain")


@pytest.fixture(scope="module")
def renderers(tag_tokenizer, bpe_tokenizer):
    """Tags as single tokens, and as text of several."""
    return [Renderer(tokenizer, ["search", "python"]) for tokenizer in (tag_tokenizer, bpe_tokenizer)]


@st.composite
def scenarios(draw):
    paths = draw(st.integers(1, 9), "M")
    policy = draw(st.sampled_from(POLICIES))
    maybe = lambda strategy: draw(st.none() | strategy)  # noqa: E731
    config = RolloutConfig(
        paths=paths,
        initial_paths=draw(st.integers(1, paths)),
        branch_width=draw(st.integers(1, 3)),
        probe_tokens=draw(st.sampled_from([1, 2, 5, 30])),
        policy=policy,
        base=draw(st.sampled_from([0.2, 0.5, 0.8])),
        weight=draw(st.sampled_from([0.2, 2.0])),
        rounds=draw(st.integers(1, 3)),
        min_distance=draw(st.integers(1, 4)),
        baseline="root" if policy == "reference" else draw(st.sampled_from(["root", "post_tool"])),
        normalizer=draw(st.sampled_from(["mean_over_log_vocab", "sum_over_vocab"])),
        reference=ReferenceConfig(window_before_call=draw(st.booleans()), own_baseline=draw(st.booleans())),
        entropies="all" if policy == "appo" else draw(st.sampled_from(["all", "probe"])),
        max_tool_calls=draw(st.integers(0, 4)),
        max_response_tokens=draw(st.sampled_from([1, 3, 12, 40, 100, 300])),
        max_tree_tool_calls=maybe(st.integers(0, 6)),
        max_tree_tokens=maybe(st.integers(paths, 400)),
        max_open_requests=maybe(st.integers(1, 6)),
        max_open_calls=maybe(st.integers(1, 4)),
        path_timeout_s=maybe(st.floats(0.005, 2.0)),
        collect_timeout_s=maybe(st.floats(0.005, 4.0)),
        deterministic=draw(st.booleans()),
    )
    return Scenario(
        config,
        seed=draw(st.integers(0, 2**31)),
        prompts=draw(st.integers(1, 3)),
        max_model_len=draw(st.sampled_from([90, 140, 600])),
        fail_at=maybe(st.integers(0, 40)),
        cancel_at=maybe(st.floats(0.0, 2.0)),
    )


@pytest.mark.timeout(max(300, SCENARIOS))
@settings(
    max_examples=SCENARIOS,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(scenario=scenarios(), tags_are_text=st.booleans())
def test_every_invariant_holds_in_every_scenario(renderers, scenario, tags_are_text):
    world = World(scenario, renderers[tags_are_text])
    outcome = world.run()
    check(scenario, outcome)
    if outcome.failed:
        complete = {tree.prompt_id: tree for tree in outcome.trees if tree.is_complete}
        scenario = replace(scenario, fail_at=None)
        again = World(scenario, renderers[tags_are_text]).run(outcome.trees)
        assert not again.failed
        check(scenario, again, finished=len(complete))
        assert [tree for tree in again.trees if tree.prompt_id in complete] == list(complete.values())
        # No token of what was complete is sampled again.
        new = sum(tree.counts["sampled_tokens"] for tree in again.trees if tree.prompt_id not in complete)
        assert again.metrics["rollout/sampled_tokens"] == new


class _Decisions:
    """What every path asked, and what it was told, whatever the order: (tree, key, turn) -> (window, score)."""

    def __init__(self):
        self.by_path, self.order, self._decide = {}, [], Brancher.decide

    def __enter__(self):
        def decide(brancher, windows, room):
            branches = self._decide(brancher, windows, room)
            for window, branch in zip(windows, branches, strict=True):
                assert (window.tree, window.key, window.turn) not in self.by_path
                self.by_path[window.tree, window.key, window.turn] = (window, branch and branch.score)
                self.order.append((window.tree, window.key, window.turn))
                if branch is not None:
                    # Alone and with room for everything, the path wishes what it wished among the others.
                    alone = self._alone(brancher.config, brancher, window, room)
                    assert branch.score == alone.score
                    assert branch.children <= alone.children
            return branches

        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(Brancher, "decide", decide)
        return self

    def _alone(self, config, brancher, window, room):
        other = Brancher(config, brancher.vocab_size, brancher.seed)
        return self._decide(other, [window], [1000] * len(room))[0]

    def __exit__(self, *error):
        self._patch.undo()


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("policy", ["paper", "reference", "aepo", "random"])
def test_a_path_wishes_the_same_whatever_ends_first(renderers, policy, deterministic):
    config = RolloutConfig(
        paths=9,
        initial_paths=3,
        branch_width=2,
        probe_tokens=3,
        policy=policy,
        weight=2.0,
        base=0.4,
        max_response_tokens=200,
        deterministic=deterministic,
    )
    compared, orders = 0, set()
    for seed in range(3):
        first = None
        for pace in range(4):
            scenario = Scenario(config, seed, prompts=3, max_model_len=600, pace=pace, latency=pace)
            with _Decisions() as asked:
                outcome = World(scenario, renderers[0]).run()
            assert all(tree.is_complete for tree in outcome.trees)
            orders.add(tuple(asked.order))
            if first is None:
                first = asked.by_path
            shared = first.keys() & asked.by_path.keys()
            assert all(first[path] == asked.by_path[path] for path in shared)
            compared += len(shared) if pace else 0
    # Many paths were asked in both runs, and in many different orders.
    assert compared > 50
    assert len(orders) > 6


@pytest.mark.parametrize("policy", ["at2po", "appo"])
def test_expansions_do_not_depend_on_what_ends_first(renderers, policy):
    config = RolloutConfig(
        paths=9, initial_paths=3, probe_tokens=3, policy=policy, max_response_tokens=200, deterministic=False
    )
    for seed in range(3):
        runs = []
        for pace in range(4):
            scenario = Scenario(config, seed, prompts=3, max_model_len=600, pace=pace, latency=pace)
            runs.append(
                [
                    Counter((*tree.path_tokens(s.parent), None, *s.tokens, s.branch) for s in tree.segments if s.branch)
                    for tree in World(scenario, renderers[0]).run().trees
                ]
            )
        assert runs[0] == runs[1] == runs[2] == runs[3]


@pytest.mark.parametrize("policy", POLICIES)
def test_deterministic_trees_do_not_depend_on_how_long_tools_take(renderers, policy):
    config = RolloutConfig(
        paths=9, initial_paths=3, probe_tokens=3, policy=policy, max_response_tokens=200, max_tree_tokens=900,
        max_tree_tool_calls=9, max_open_requests=5, max_open_calls=2, base=0.4, weight=2.0,
    )  # fmt: skip

    for seed in range(2):
        runs = []
        for latency in range(3):
            scenario = Scenario(config, seed, prompts=3, max_model_len=600, latency=latency)
            runs.append(without_times(World(scenario, renderers[1]).run().trees))
        assert runs[0] == runs[1] == runs[2]
