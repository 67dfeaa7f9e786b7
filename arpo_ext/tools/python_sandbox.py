"""The Python tool: code of the model, run in a locked process of its own.

Every call gets a fresh fork of a small server process that has preloaded parts of the standard library, the `packages`
of the configuration and nothing else (no other site-packages, no torch). The fork waits in its jail before the call
comes. The value of a last bare expression is printed, hashes of strings do not vary.

With `state: path` a call finds what the earlier good calls of its path defined, as in a notebook. They are run again
before it, in the same fresh process and within the same time, because a process that lived on could be reached by the
paths that fork from this one. `random` starts from the same seed; what else differs from run to run (clocks, the
system's random numbers) may differ from what the model read.

Covered, and tested, where `sandbox` is "required":

- time: the wall-clock limit ends the whole process tree, however it was started; CPU time is limited as well.
- memory: RLIMIT_AS per process (beside what preloaded packages map), twice that over all processes of a call (looked
  at ten times a second), 16 processes or threads, 16 MiB files, 32 descriptors, a 32 MiB private folder.
- output: the first and the last `output_chars` are kept, the rest is read and dropped.
- files: the root holds the interpreter's libraries, the packages and five devices, read-only, and a private /tmp that
  vanishes with the call, initially empty but for packages that are installed below it; nothing else of the machine can
  be named. Programs that lie in library folders can be started and are held the same way.
- network: an empty network namespace, whose loopback is down; no sockets but Unix and Internet ones.
- processes and identity: a pid and an ipc namespace per call, an unused user id without capabilities and without a way
  to new ones, no environment, no inherited descriptor but the three standard ones. Nothing outlives the call, the
  tool or the process that started it.
- the kernel's wider interfaces (keyrings, tracing, io_uring, bpf, memory files and others): a system call filter, see
  `sandbox/syscalls.py`.

Not covered: faults of the kernel in the calls that are left, timing side channels, memory that the processes of a call
take within a tenth of a second (they are the first that the kernel ends when memory is short), the sum of CPU time over
the processes of a call and over calls, and the content of the machine's library folders, which can be read.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import sys
import textwrap
import threading
from collections import defaultdict
from importlib.metadata import PackageNotFoundError

from arpo_ext.config import PythonToolConfig
from arpo_ext.errors import ToolError
from arpo_ext.tools.python_server import Call, Server, ServerLost
from arpo_ext.tools.sandbox.packages import Packages, find_packages
from arpo_ext.types import ToolResult

_log = logging.getLogger(__name__)

NO_OUTPUT = "(no output)"

# Forking, clearing up and the way to and from the server, on a machine that is busy with sampling.
_OVERHEAD_S = 8.0
# Landlock is a second lock on what the private root has closed already.
_OPTIONAL = {"landlock"}
_FENCE = re.compile(r"\s*```[\w+-]*[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)


class PythonTool:
    """Runs Python code and gives back what it printed.

    The result has `ok=False` if the code raised (with a short traceback), exited with a status other than 0, ran out
    of time or of memory, or was killed. Code that prints nothing gives "(no output)", which is an answer.
    """

    name = "python"

    def __init__(self, config: PythonToolConfig) -> None:
        self.timeout_s = config.timeout_s + _OVERHEAD_S + 1
        self.workers = config.workers
        self.stateful = config.state == "path"
        # Mechanism -> why it does not work here; filled in by `start`.
        self.missing: dict[str, str] = {}
        self._config = config
        self._packages = Packages()
        self._server: Server | None = None
        self._started = False
        self._lock = threading.Lock()
        self._places = threading.Semaphore(config.workers)
        # Calls that run or wait for a place, by what `run` was given.
        self._calls: defaultdict[tuple[str, tuple[str, ...]], list[Call]] = defaultdict(list)

    def start(self) -> None:
        """Start the server and run a first call. ToolError names the mechanism that the kernel lacks."""
        if not sys.platform.startswith("linux"):
            raise ToolError(f"the python tool's sandbox needs Linux; this is {sys.platform}")
        try:
            self._packages = find_packages(self._config.packages)
        except PackageNotFoundError as error:
            raise ToolError(f"tools.python.packages names {error.name!r}, which is not installed") from None
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._started = True
            self.missing = self._running_server().missing
            self._check_mechanisms()
            first = self.run("6 * 7")
            if first.text != "42":
                raise ToolError(f"the python tool's sandbox does not work here: {first.text}")
            undo.pop_all()

    def run(self, text: str, history: tuple[str, ...] = ()) -> ToolResult:
        """history: earlier calls, oldest first, that are run again before this one, unheard; for `state: path`."""
        if not self._started:
            raise ToolError("the python tool is not started")
        code = _code_of(text)
        if not code.strip():
            return ToolResult(self.name, "the python call holds no code", ok=False)
        call, key = Call(), (text, history)
        with self._lock:
            self._calls[key].append(call)
        try:
            with self._places:
                return self._call(call, {"code": code, "history": self._history(history)})
        finally:
            with self._lock:
                self._calls[key].remove(call)
                if not self._calls[key]:
                    del self._calls[key]

    def abandon(self, text: str, history: tuple[str, ...] = ()) -> None:
        """End the calls of `run` with these arguments; they give a failure."""
        with self._lock:
            calls = list(self._calls.get((text, history), ()))
        for call in calls:
            call.abandon()

    def close(self) -> None:
        """End the server and with it every running call."""
        with self._lock:
            self._started = False
            server, self._server = self._server, None
        if server is not None:
            server.close()

    def _history(self, texts: tuple[str, ...]) -> list[str] | None:
        return [_code_of(text) for text in texts] if self.stateful else None

    def _call(self, call: Call, request: dict) -> ToolResult:
        # A lost server is replaced once: the code has no effects that a second run could double.
        for _ in range(2):
            server = None
            try:
                server = self._running_server()
                return self._result(server.call(call, request, self._config.timeout_s + _OVERHEAD_S))
            except ServerLost as lost:
                if call.is_abandoned:
                    return ToolResult(self.name, "the call was given up", ok=False)
                fault = str(lost)
                if server is not None:
                    server.await_end()
        return ToolResult(self.name, f"the python sandbox is not available: {fault}", ok=False)

    def _running_server(self) -> Server:
        with self._lock:
            if not self._started:
                raise ServerLost("it was closed")
            if self._server is not None and not self._server.alive:
                _log.warning("the python tool's server ended (status %s); starting another", self._server.status)
                self._server.close()
                self._server = None
            if self._server is None:
                config = self._config
                limits = {name: getattr(config, name) for name in ("workers", "timeout_s", "memory_mb")}
                self._server = Server(self._packages, {**limits, "output_bytes": 4 * config.output_chars})
            return self._server

    def _check_mechanisms(self) -> None:
        needed = {name: why for name, why in self.missing.items() if name not in _OPTIONAL}
        listed = "; ".join(f"{name} ({why})" for name, why in self.missing.items())
        if needed and self._config.sandbox == "required":
            raise ToolError(
                f"the python tool's sandbox lacks {listed}; expected a kernel and a container that allow it, "
                "or tools.python.sandbox=best_effort to run without"
            )
        if self.missing:
            _log.warning("the python tool's sandbox runs without %s", listed)

    def _result(self, reply: dict) -> ToolResult:
        if "error" in reply:
            return ToolResult(self.name, f"the python sandbox could not run the code: {reply['error']}", ok=False)
        status, out, err = reply["status"], reply["out"].rstrip(), reply["err"].rstrip()
        ok = status == 0 and reply["fault"] is None
        if reply["fault"] == "time":
            parts = [out, err, f"TimeoutError: stopped after {self._config.timeout_s:g} s"]
        elif reply["fault"] == "memory":
            parts = [out, err, "MemoryError: stopped, its processes together held too much memory"]
        elif ok:
            # Warnings beside an output would only distract.
            parts = [out or err or NO_OUTPUT]
        else:
            parts = [out, err or _status_text(status)]
        text = "\n".join(part for part in parts if part)
        return ToolResult(self.name, _cut(text, self._config.output_chars, reply["bytes"]), ok)


def _code_of(text: str) -> str:
    """The code without a Markdown fence around it and without common indentation."""
    fenced = _FENCE.fullmatch(text)
    return textwrap.dedent(fenced[1] if fenced else text).strip("\n").rstrip()


def _status_text(status: int) -> str:
    with contextlib.suppress(ValueError):
        return f"stopped by {signal.Signals(status - 128).name}"
    return f"exit status {status}"


def _cut(text: str, limit: int, size: int) -> str:
    """`text` in at most `limit` characters: its start and its end, and between them how much there was."""
    if len(text) <= limit:
        return text
    note = f"\n[cut: {size} bytes in all]\n"
    room = limit - len(note)
    if room < 2:
        return text[:limit]
    return text[: room - room // 2] + note + text[len(text) - room // 2 :]
