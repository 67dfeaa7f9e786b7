"""An MCP server for the tests, started as a program: `python mcp_server.py`."""

import os

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("test")


@server.tool()
def shout(text: str) -> str:
    return text.upper()


@server.tool()
def add(a: int, b: int) -> str:
    return str(a + b)


@server.tool()
def fail(text: str) -> str:
    raise ToolError(f"no {text} today")


@server.tool()
def die(text: str) -> str:
    os._exit(1)


@server.tool()
def picture(text: str) -> list:
    return ["a picture", Image(data=b"x", format="png")]


if __name__ == "__main__":
    server.run()
