"""Any scenario of models, tools, limits, deadlines and failures: every invariant holds, nothing stalls.

The suite takes 300 scenarios; `ARPO_SCENARIOS=10000 pytest python_tests/test_collect_world.py` takes as many.
"""

import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_world import Scenario, World, check

from arpo_ext.config import ReferenceConfig, RolloutConfig
from arpo_ext.render import Renderer

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
