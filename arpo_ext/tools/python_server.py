"""The near side of the sandbox's server: starts it, sends it calls, notices when it ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from arpo_ext.errors import ToolError
from arpo_ext.tools.sandbox.packages import Packages

LAUNCH = "import sys; sys.path.insert(0, sys.argv[1]); from sandbox.server import main; main(*sys.argv[1:])"
# Numeric libraries start threads when they are imported; a process with threads can neither be forked nor enter
# namespaces.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_START_TIMEOUT_S = 60.0


class ServerLost(Exception):
    """The server or a supervisor ended without an answer."""


class Call:
    """A call on its way, which another thread may give up."""

    def __init__(self) -> None:
        self.is_abandoned = False
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def abandon(self) -> None:
        with self._lock:
            self.is_abandoned = True
            if self._socket is not None:
                # Whoever waits for the answer wakes up, and the supervisor sees that nobody listens.
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def connected(self, end: socket.socket) -> Iterator[None]:
        """While inside, giving up closes `end`; ServerLost if that has happened already."""
        with self._lock:
            if self.is_abandoned:
                raise ServerLost("the call was given up")
            self._socket = end
        try:
            yield
        finally:
            with self._lock:
                self._socket = None


class Server:
    """The process that forks the calls, and the socket to it.

    packages: what to preload. limits: see `sandbox.server.main`.
    """

    def __init__(self, packages: Packages, limits: dict) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        tools = str(Path(__file__).resolve().parent)
        command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", "-c", LAUNCH]
        command += [tools, str(theirs.fileno()), str(os.getpid()), json.dumps(asdict(packages)), json.dumps(limits)]
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

    def call(self, call: Call, request: dict, timeout_s: float) -> dict:
        """Send one request over a socket of its own and wait for the answer; hanging up ends the call."""
        body = json.dumps(request).encode()
        ours, theirs = socket.socketpair()
        with ours:
            ours.settimeout(timeout_s)
            try:
                with theirs:
                    socket.send_fds(self._control, [b"c"], [theirs.fileno()])
                with call.connected(ours):
                    ours.sendall(struct.pack("!Q", len(body)) + body)
                    reply = b"".join(iter(lambda: ours.recv(1 << 16), b""))
            except TimeoutError:
                return {"error": f"no answer within {timeout_s:g} s"}
            except OSError as error:
                raise ServerLost(error.strerror or str(error)) from None
        if not reply:
            raise ServerLost("it was killed during the call")
        return json.loads(reply)

    def close(self) -> None:
        self._control.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stderr.close()
