"""Tools of one's own: a class by its path, and tools of an MCP server that runs as a program of its own."""

import sys
from pathlib import Path

import pytest

from arpo_ext.config import McpToolConfig, ToolsConfig
from arpo_ext.errors import ConfigError, ToolError, TransientToolError
from arpo_ext.tools import open_pool
from arpo_ext.tools.mcp_client import McpTool
from arpo_ext.types import ToolCall, ToolResult

SERVER = [sys.executable, str(Path(__file__).parent / "mcp_server.py")]


class Reverse:
    timeout_s = 5.0
    workers = 1

    def __init__(self, name, *, suffix=""):
        self.name, self._suffix = name, suffix

    def start(self): ...

    def run(self, text):
        return ToolResult(self.name, text[::-1] + self._suffix, ok=True)

    def close(self): ...


class Nameless(Reverse):
    def __init__(self, name):
        super().__init__("other")


class Incomplete:
    def __init__(self, name):
        self.name = name


def test_a_class_by_its_path_is_a_tool(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_tools", sys.modules[__name__])
    config = ToolsConfig(custom={"back": {"path": "my_tools:Reverse", "options": {"suffix": "!"}}})
    assert config.names == ("back",)
    with open_pool(config) as pool:
        assert pool.submit(ToolCall("back", "abc")).result(timeout=10).text == "cba!"


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("no_such_module:X", {}, "cannot be imported"),
        ("my_tools:Missing", {}, "names no class 'Missing'"),
        ("my_tools:Reverse", {"colour": "red"}, "cannot be made from its options"),
        ("my_tools:Incomplete", {}, "lacks timeout_s, workers, start, run, close"),
        ("my_tools:Nameless", {}, "calls itself 'other'"),
    ],
)
def test_a_class_that_is_no_tool_is_one_sentence(path, options, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_tools", sys.modules[__name__])
    with pytest.raises(ToolError, match=message):
        open_pool(ToolsConfig(custom={"back": {"path": path, "options": options}}))


@pytest.mark.parametrize(
    "tools",
    [
        {"custom": {"search": {"path": "a:B"}}},
        {"custom": {"x": {"path": "a:B"}}, "mcp": {"x": {"command": ["a"], "tool": "t"}}},
        {"custom": {"a b": {"path": "a:B"}}},
        {"custom": {"x": {"path": "a.B"}}},
        {"mcp": {"x": {"tool": "t"}}},
        {"mcp": {"x": {"tool": "t", "command": ["a"], "url": "http://b"}}},
    ],
)
def test_names_and_servers_are_checked(tools):
    with pytest.raises((ConfigError, ValueError)):
        ToolsConfig(**tools)


def mcp_tool(tool, **settings):
    pytest.importorskip("mcp", reason="mcp is not installed (extra: mcp)")
    made = McpTool("tool", McpToolConfig(command=SERVER, tool=tool, **settings))
    made.start()
    return made


def test_an_mcp_tool_answers_fails_and_takes_several_parameters():
    pytest.importorskip("mcp", reason="mcp is not installed (extra: mcp)")
    servers = {name: {"command": SERVER, "tool": name} for name in ("shout", "add", "fail", "picture")}
    with open_pool(ToolsConfig(mcp=servers)) as pool:
        calls = {
            "shout": " what is <this>\n",
            "add": '{"a": 2, "b": 3}',
            "fail": "tea",
            "picture": "x",
        }
        results = {name: pool.submit(ToolCall(name, text)).result(timeout=30) for name, text in calls.items()}
        wrong = [pool.submit(ToolCall("add", text)).result(timeout=30) for text in ("2 3", "[2, 3]", '{"a": "x"}')]
    assert (results["shout"].text, results["shout"].ok) == (" WHAT IS <THIS>\n", True)
    assert results["add"].text == "5"
    assert not results["fail"].ok
    assert "no tea today" in results["fail"].text
    assert results["picture"].text == "a picture\n[image]"
    assert not any(result.ok for result in wrong)
    assert "expected a JSON object with a, b" in wrong[0].text
    assert "a JSON list" in wrong[1].text


def test_a_server_that_dies_is_started_again():
    tool = mcp_tool("die")
    try:
        with pytest.raises(TransientToolError, match="broke"):
            tool.run("x")
        tool._config = tool._config.model_copy(update={"tool": "shout"})
        assert tool.run("again").text == "AGAIN"
    finally:
        tool.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tool": "missing"}, "has no tool 'missing'; expected .* one of shout, add"),
        ({"tool": "add", "argument": "c"}, "has no parameter 'c'; expected one of a, b"),
    ],
)
def test_a_tool_the_server_does_not_have_names_those_it_has(settings, message):
    with pytest.raises(ToolError, match=message):
        mcp_tool(**settings)


def test_a_server_that_cannot_start_is_a_tool_error():
    pytest.importorskip("mcp", reason="mcp is not installed (extra: mcp)")
    with pytest.raises(ToolError, match="cannot start"):
        McpTool("tool", McpToolConfig(command=["/no/such/program"], tool="t")).start()
    with pytest.raises(ToolError, match="cannot start"):
        McpTool("tool", McpToolConfig(command=[sys.executable, "-c", "pass"], tool="t", timeout_s=20)).start()
