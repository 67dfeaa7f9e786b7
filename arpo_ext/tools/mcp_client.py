"""A tool of any MCP server (modelcontextprotocol.io), through the official client library."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any

from arpo_ext.config import McpToolConfig
from arpo_ext.errors import ToolError, TransientToolError
from arpo_ext.types import ToolResult

if TYPE_CHECKING:
    import mcp


class McpTool:
    """One tool of an MCP server: a program that speaks over its standard streams, or a server at an address.

    The call's text becomes the tool's only parameter, or the one that `argument` names; without `argument` a tool with
    several parameters takes the call as one JSON object. The answer is the text of the result's blocks. A session that
    breaks (a server that died) is a transient fault: the next attempt opens a new one.
    """

    def __init__(self, name: str, config: McpToolConfig) -> None:
        self.name = name
        self.timeout_s = config.timeout_s
        self.workers = config.workers
        self._config = config
        self._session: _Session | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        try:
            import mcp  # noqa: F401 - asked for before a thread is made
        except ImportError:
            raise ToolError(f"the {self.name} tool needs the mcp library: pip install 'arpo-ext[mcp]'") from None
        try:
            self._opened()
        except TransientToolError as error:
            raise ToolError(f"the {self.name} tool cannot start: {error}") from None

    def run(self, text: str) -> ToolResult:
        session = self._opened()
        try:
            arguments = session.arguments(text)
        except ValueError as error:
            return ToolResult(self.name, str(error), ok=False)
        answer, failed = session.call(self._config.tool, arguments, self.timeout_s)
        return ToolResult(self.name, answer, ok=not failed)

    def close(self) -> None:
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            session.close()

    def _opened(self) -> _Session:
        with self._lock:
            if self._session is not None and not self._session.is_alive():
                self._session.close()
                self._session = None
            if self._session is None:
                self._session = _Session(self.name, self._config)
            return self._session


class _Session:
    """An open client on an event loop in a thread of its own: the client must be entered and left by one task."""

    def __init__(self, name: str, config: McpToolConfig) -> None:
        self._name = name
        self._config = config
        self._parameters: list[str] = []
        self._client: mcp.Client | None = None
        self._broken = False
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, args=(ready,), name=f"mcp-{name}", daemon=True)
        self._thread.start()
        try:
            ready.result(timeout=config.timeout_s)
        except FutureTimeoutError:
            self.close()
            raise TransientToolError(f"its MCP server did not open a session within {config.timeout_s:g} s") from None

    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._broken

    def arguments(self, text: str) -> dict[str, Any]:
        """ValueError in words for the model if the text does not give the tool's parameters."""
        argument = self._config.argument
        if argument is None and len(self._parameters) == 1:
            argument = self._parameters[0]
        if argument is not None:
            return {argument: text}
        expected = f"expected a JSON object with {', '.join(self._parameters) or 'no keys'}"
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the call is not JSON ({error}); {expected}") from None
        if not isinstance(found, dict):
            raise ValueError(f"the call is a JSON {type(found).__name__}; {expected}")
        return found

    def call(self, tool: str, arguments: dict[str, Any], timeout_s: float) -> tuple[str, bool]:
        """The answer's text, and whether the tool says that it failed."""
        import mcp

        try:
            running = asyncio.run_coroutine_threadsafe(self._client.call_tool(tool, arguments), self._loop)
            result = running.result(timeout=timeout_s)
        except mcp.MCPError as error:
            # Either the server refused these arguments, or the connection is gone: then it no longer answers a ping.
            if self._answers():
                return str(error), True
            self._broken = True
            raise TransientToolError(f"the session with its MCP server broke: {error}") from None
        except FutureTimeoutError:
            running.cancel()
            raise TransientToolError(f"its MCP server did not answer within {timeout_s:g} s") from None
        except Exception as error:  # noqa: BLE001 - whatever a transport raises, the session is lost
            self._broken = True
            raise TransientToolError(f"the session with its MCP server broke: {error!r}") from None
        texts = [getattr(block, "text", f"[{block.type}]") for block in result.content]
        return "\n".join(texts), bool(result.is_error)

    def _answers(self) -> bool:
        try:
            asyncio.run_coroutine_threadsafe(self._client.list_tools(cache_mode="refresh"), self._loop).result(5)
        except Exception:  # noqa: BLE001 - any failure means no
            return False
        return True

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=5)

    def _work(self, ready: Future[None]) -> None:
        try:
            self._loop.run_until_complete(self._serve(ready))
        except ToolError as error:
            ready.set_exception(error)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            if not ready.done():
                ready.set_exception(TransientToolError(f"its MCP server cannot be reached: {_innermost(error)!r}"))
        finally:
            self._loop.close()

    async def _serve(self, ready: Future[None]) -> None:
        import mcp

        async with mcp.Client(self._server()) as client:
            self._client = client
            self._parameters = _parameters_of(await client.list_tools(), self._name, self._config)
            ready.set_result(None)
            await self._stop.wait()

    def _server(self) -> str | mcp.StdioServerParameters:
        import mcp

        if self._config.url is not None:
            return self._config.url
        command, *arguments = self._config.command
        return mcp.StdioServerParameters(command=command, args=arguments)


def _parameters_of(listed: Any, name: str, config: McpToolConfig) -> list[str]:
    known = {tool.name: tool for tool in listed.tools}
    if config.tool not in known:
        raise ToolError(
            f"the MCP server of {name} has no tool {config.tool!r}; expected tools.mcp.{name}.tool to be one of "
            f"{', '.join(known) or 'none'}"
        )
    parameters = list(known[config.tool].input_schema.get("properties", {}))
    if config.argument is not None and config.argument not in parameters:
        raise ToolError(
            f"the MCP tool {config.tool!r} has no parameter {config.argument!r}; expected one of "
            f"{', '.join(parameters) or 'none'}"
        )
    return parameters


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    return error
