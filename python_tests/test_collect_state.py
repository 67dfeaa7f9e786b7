"""Collecting with a tool that keeps state along a path: forks share what was before them and nothing after."""

import sys

import pytest
from scripted import PROMPTS, Pool, ScriptedSampler, check_trees, rollout_config, turns_read

from arpo_ext.config import PythonToolConfig
from arpo_ext.errors import ToolError
from arpo_ext.render import Renderer
from arpo_ext.rollout import collect
from arpo_ext.tools import ToolPool
from arpo_ext.tools.python_sandbox import PythonTool
from arpo_ext.types import ToolResult


@pytest.fixture(scope="module")
def renderer(tag_tokenizer):
    return Renderer(tag_tokenizer, ["search", "python"])


def collected(renderer, turns, pool, config):
    """Every path says `turns`, one after each tool result; the number of its request stands for {id}."""

    def script(request):
        turn = turns[min(turns_read(request), len(turns) - 1)]
        return turn.replace("{id}", str(request.id)), [0.1] if not turns_read(request) else [0.9]

    sampler = ScriptedSampler(renderer, script)
    trees = collect(PROMPTS[:1], sampler=sampler, tools=pool, renderer=renderer, config=config, seed=1).trees
    check_trees(trees, config)
    return trees


def test_a_call_brings_the_good_calls_of_its_own_path_and_tool(renderer):
    turns = [
        "<python>one {id}</python>",
        "<search>other</search>",
        "<python>bad</python>",
        "<python>two {id}</python>",
        "<python>three</python>",
        "<answer>7</answer><eos>",
    ]
    pool = Pool(lambda call: ToolResult(call.name, "x", call.text != "bad"))
    config = rollout_config(paths=4, initial_paths=2, max_tool_calls=9, max_response_tokens=900)
    collected(renderer, turns, pool, config)
    last = [call for call in pool.calls if call.text == "three"]
    assert len(last) == 4
    for call in last:
        assert [text.split()[0] for text in call.history] == ["one", "two"]
    assert len({call.history[0] for call in last}) == 2
    assert len({call.history[1] for call in last}) == 4
    assert {call.history for call in pool.calls if call.name == "search"} == {()}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")
def test_real_code_finds_what_its_path_defined(renderer):
    turns = [
        "<python>x = {id}</python>",
        "<python>x = 100 * x + {id}</python>",
        "<python>x</python>",
        "<answer>7</answer><eos>",
    ]
    config = rollout_config(paths=4, initial_paths=2, max_tool_calls=3, max_response_tokens=900)
    pool = ToolPool([PythonTool(PythonToolConfig(state="path", timeout_s=20))])
    try:
        pool.__enter__()
    except ToolError as error:
        pytest.skip(str(error))
    with pool:
        (tree,) = collected(renderer, turns, pool, config)
    said = []
    for leaf in tree.leaves:
        path = [tree.segments[i] for i in tree.path(leaf.segment)]
        first, second = (s.text.partition(" = ")[2].partition("</")[0] for s in path if " = " in s.text)
        answer = [s.tool for s in path if s.tool is not None][-1]
        assert answer.ok
        said.append(answer.text)
        assert answer.text == f"<result>{100 * int(first) + int(second.rpartition(' ')[2])}</result>"
    assert len(set(said)) == 4
