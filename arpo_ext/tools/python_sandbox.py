"""The Python tool: code of the model, run in a locked process of its own.

Every call gets a fresh fork of a small server process that has preloaded parts of the standard library, the `packages`
of the configuration and nothing else (no other site-packages, no torch). The value of a last bare expression is
printed, hashes of strings do not vary.

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
import json
import logging
import os
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from arpo_ext.config import PythonToolConfig
from arpo_ext.errors import ToolError
from arpo_ext.tools.sandbox.packages import Packages, find_packages
from arpo_ext.types import ToolResult

_log = logging.getLogger(__name__)

NO_OUTPUT = "(no output)"

_LAUNCH = "import sys; sys.path.insert(0, sys.argv[1]); from sandbox.server import main; main(*sys.argv[1:])"
# Numeric libraries start threads when they are imported; a process with threads can neither be forked nor enter
# namespaces.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_START_TIMEOUT_S = 60.0
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
        # Mechanism -> why it does not work here; filled in by `start`.
        self.missing: dict[str, str] = {}
        self._config = config
        self._packages = Packages()
        self._server: _Server | None = None
        self._started = False
        self._lock = threading.Lock()
        # One user id per slot, so that the process limits of concurrent calls do not add up.
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(config.workers):
            self._slots.put(slot)

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

    def run(self, text: str) -> ToolResult:
        if not self._started:
            raise ToolError("the python tool is not started")
        code = _code_of(text)
        if not code.strip():
            return ToolResult(self.name, "the python call holds no code", ok=False)
        slot = self._slots.get()
        try:
            return self._call(code, slot)
        finally:
            self._slots.put(slot)

    def close(self) -> None:
        """End the server and with it every running call."""
        with self._lock:
            self._started = False
            server, self._server = self._server, None
        if server is not None:
            server.close()

    def _call(self, code: str, slot: int) -> ToolResult:
        config = self._config
        request = {
            "code": code,
            "slot": slot,
            "timeout_s": config.timeout_s,
            "memory_mb": config.memory_mb,
            "output_bytes": 4 * config.output_chars,
        }
        # A lost server is replaced once: the code has no effects that a second run could double.
        for _ in range(2):
            server = None
            try:
                server = self._running_server()
                return self._result(server.call(request, config.timeout_s + _OVERHEAD_S))
            except _ServerLost as lost:
                fault = str(lost)
                if server is not None:
                    server.await_end()
        return ToolResult(self.name, f"the python sandbox is not available: {fault}", ok=False)

    def _running_server(self) -> _Server:
        with self._lock:
            if not self._started:
                raise _ServerLost("it was closed")
            if self._server is not None and not self._server.alive:
                _log.warning("the python tool's server ended (status %s); starting another", self._server.status)
                self._server.close()
                self._server = None
            if self._server is None:
                self._server = _Server(self._packages)
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


class _ServerLost(Exception):
    """The server or a supervisor ended without an answer."""


class _Server:
    """The process that forks the calls, and the socket to it."""

    def __init__(self, packages: Packages) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        tools = str(Path(__file__).resolve().parent)
        command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", "-c", _LAUNCH]
        command += [tools, str(theirs.fileno()), str(os.getpid()), json.dumps(asdict(packages))]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_ENVIRONMENT,
                cwd="/",
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._control.settimeout(_START_TIMEOUT_S)
        try:
            hello = self._control.recv(1 << 16)
        except TimeoutError:
            self._process.kill()
            hello = b""
        if not hello:
            _, said = self._process.communicate()
            self._control.close()
            last = said.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise ToolError(f"the python tool's server did not start: {last or 'no message'}")
        self.missing: dict[str, str] = json.loads(hello)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def await_end(self) -> None:
        """Give a server whose connection broke time to end: its sockets close before its exit can be seen, and the
        next call would be sent to it again. Returns after half a second if only the call was lost."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0.5)

    @property
    def status(self) -> int | None:
        return self._process.returncode

    def call(self, request: dict, timeout_s: float) -> dict:
        """Send one request over a socket of its own and wait for the answer; hanging up ends the call."""
        body = json.dumps(request).encode()
        ours, theirs = socket.socketpair()
        with ours:
            ours.settimeout(timeout_s)
            try:
                with theirs:
                    socket.send_fds(self._control, [b"c"], [theirs.fileno()])
                ours.sendall(struct.pack("!Q", len(body)) + body)
                reply = b"".join(iter(lambda: ours.recv(1 << 16), b""))
            except TimeoutError:
                return {"error": f"no answer within {timeout_s:g} s"}
            except OSError as error:
                raise _ServerLost(error.strerror or str(error)) from None
        if not reply:
            raise _ServerLost("it was killed during the call")
        return json.loads(reply)

    def close(self) -> None:
        self._control.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stderr.close()


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
