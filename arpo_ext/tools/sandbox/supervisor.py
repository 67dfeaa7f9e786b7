"""One call: a supervisor that is ready before the call comes, and the process that runs the code.

    server --fork--> supervisor --fork--> first process of a pid namespace --fork--> the code

The code's process enters the jail and waits there. The supervisor hands it the code, keeps the clock, bounds what is
kept of the output and answers; ending the first process ends whatever the code has started. Where there is no pid
namespace the supervisor adopts orphans and ends them one by one.
"""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
import time

from . import kernel, snippet
from .jail import Jail
from .usage import MemoryWatch

_CHUNK = 1 << 16
# How often the memory of all processes of a call is added up, and how much more than one of them they may hold.
_WATCH_S = 0.1
_MEMORY_FACTOR = 2
# Exit statuses above this one stand for a signal.
_KILLED = 128


def supervise(handover: socket.socket, jail: Jail, slot: int, limits: dict) -> None:
    """Get ready, wait for the socket of a call, answer that call. limits: see `server.main`."""
    kernel.adopt_orphans()
    try:
        folder = jail.open_call(slot)
        code, leader, outputs = _prepare(jail, slot, folder, limits)
    except Exception as error:  # noqa: BLE001 - whoever calls must learn why
        with _await_call(handover, None) as call:
            _send(call, {"error": getattr(error, "strerror", None) or repr(error)})
        return
    with _await_call(handover, leader) as call, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        try:
            answer = _run(call, code, leader, outputs, jail, limits)
        except OSError as error:
            answer = {"error": error.strerror or str(error)}
        jail.close_call(folder)
        _send(call, answer)


def _await_call(handover: socket.socket, leader: int | None) -> socket.socket:
    """The call's socket. Ends this process if the server has ended, or if somebody killed the code's process before it
    had any code: the server then makes another supervisor, and the call goes there."""
    poller = select.poll()
    poller.register(handover, select.POLLIN)
    if leader is not None:
        end = os.pidfd_open(leader)
        poller.register(end, select.POLLIN)
    while True:
        events = dict(poller.poll())
        if leader is not None and end in events:
            _end_if_killed(leader)
            poller.unregister(end)
        if handover.fileno() in events:
            break
    _, received, _, _ = socket.recv_fds(handover, 1, 1)
    if not received:
        os._exit(0)
    return socket.socket(fileno=received[0])


def _end_if_killed(leader: int) -> None:
    found = os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
    if found.si_code == os.CLD_KILLED or found.si_status > _KILLED:
        os._exit(0)


def _prepare(jail: Jail, slot: int, folder: str, limits: dict) -> tuple[int, int, dict[int, "_Output"]]:
    """Start the code's process: descriptor that takes the code, first process, descriptors of the outputs."""
    code, out, err = os.pipe(), os.pipe(), os.pipe()
    leader = _fork_leader(jail, slot, folder, limits, code[0], out[1], err[1])
    for fd in (code[0], out[1], err[1]):
        os.close(fd)
    return code[1], leader, {fd: _Output(limits["output_bytes"]) for fd in (out[0], err[0])}


def _run(call: socket.socket, code: int, leader: int, outputs: dict[int, "_Output"], jail: Jail, limits: dict) -> dict:
    """Run the call's code to its end or its limit. The answer holds status, output and errors."""
    request = _receive(call)
    try:
        with open(code, "wb") as stream:
            stream.write(request)
    except BrokenPipeError:
        # It could not enter the jail, and its output says why; or somebody killed it.
        _end_if_killed(leader)
    fault, status = _watch(call, leader, outputs, limits["timeout_s"], limits["memory_mb"] << 20, jail)
    out, err = outputs.values()
    return {
        "fault": fault,
        "status": status,
        "out": out.text(),
        "err": err.text(),
        "bytes": out.total + err.total,
    }


def _fork_leader(jail: Jail, slot: int, folder: str, limits: dict, code_fd: int, out: int, err: int) -> int:
    supervisor = os.pidfd_open(os.getpid())
    leader = os.fork()
    if leader:
        return leader
    kernel.die_with_parent(supervisor)
    if jail.has_pid_namespace:
        code = os.fork()
        if code:
            os.closerange(0, 1 << 16)
            while True:
                child, status = os.waitpid(-1, 0)
                if child == code:
                    os._exit(_exit_status(status))
    _run_code(jail, slot, folder, limits, code_fd, out, err, supervisor)


def _run_code(
    jail: Jail, slot: int, folder: str, limits: dict, code_fd: int, out: int, err: int, supervisor: int
) -> None:
    """The process of the code itself; never returns."""
    status = 1
    try:
        os.setsid()
        # Descriptor 0 is /dev/null already.
        os.dup2(out, 1)
        os.dup2(err, 2)
        jail.enter(slot, folder, memory_mb=limits["memory_mb"], cpu_s=int(limits["timeout_s"]) + 2)
        kernel.die_with_parent(supervisor)
        request = _take_code(code_fd)
        for name in [
            name for name in sys.modules if name.partition(".")[0] == __package__ and name != snippet.__name__
        ]:
            del sys.modules[name]
        status = snippet.run(request["code"], request["history"])
    except Exception as error:  # noqa: BLE001 - this process ends here; its parent must learn why
        os.write(2, f"the sandbox could not be entered: {error!r}\n".encode())
    finally:
        os._exit(status)


def _take_code(fd: int) -> dict:
    """Wait for the request, with nothing else open."""
    os.closerange(3, fd)
    os.closerange(fd + 1, 1 << 16)
    with open(fd, "rb") as stream:
        body = stream.read()
    if not body:
        os._exit(0)
    return json.loads(body)


def _watch(
    call: socket.socket, leader: int, outputs: dict[int, "_Output"], timeout_s: float, memory_bytes: int, jail: Jail
) -> tuple[str | None, int]:
    """Collect output until the leader ends, a limit is reached or the caller hangs up.

    ("time" or "memory" if that is why the call was ended, exit status).
    """
    deadline = time.monotonic() + timeout_s
    memory = MemoryWatch(jail.proc)
    end = os.pidfd_open(leader)
    poller = select.poll()
    for fd in (end, call.fileno(), *outputs):
        poller.register(fd, select.POLLIN)
    fault, waiting = None, True
    look = time.monotonic() + _WATCH_S
    while waiting:
        for fd, _ in poller.poll(max(0.0, min(deadline, look) - time.monotonic()) * 1000):
            if fd in outputs:
                if not outputs[fd].read(fd):
                    poller.unregister(fd)
            else:
                # Either the leader has ended, or the caller, who sends nothing more, has hung up.
                waiting = False
        now = time.monotonic()
        if now >= look:
            look = now + _WATCH_S
            if memory.total_bytes() > _MEMORY_FACTOR * memory_bytes:
                fault = "memory"
        if now >= deadline:
            fault = fault or "time"
        waiting = waiting and fault is None
    ended = select.select([end], [], [], 0)[0]
    os.kill(leader, signal.SIGKILL)
    status = _exit_status(os.waitpid(leader, 0)[1])
    if not jail.has_pid_namespace:
        _end_orphans()
    for fd, output in outputs.items():
        while output.read(fd):
            pass
    return None if ended else fault, status


def _end_orphans() -> None:
    """Kill every descendant; each becomes this process's child when its own parent is gone."""
    with contextlib.suppress(ChildProcessError):
        while True:
            with open("/proc/thread-self/children") as file:
                for child in file.read().split():
                    os.kill(int(child), signal.SIGKILL)
            os.waitpid(-1, 0)


def _exit_status(status: int) -> int:
    """As shells give it: 128 + signal for a process that a signal ended."""
    code = os.waitstatus_to_exitcode(status)
    return _KILLED - code if code < 0 else code


class _Output:
    """The first and the last `limit` bytes of a stream."""

    def __init__(self, limit: int) -> None:
        self.total = 0
        self._limit = limit
        self._head = bytearray()
        self._tail = bytearray()

    def read(self, fd: int) -> bool:
        """Take what is there to read; False at the end of the stream."""
        chunk = os.read(fd, _CHUNK)
        self.total += len(chunk)
        room = self._limit - len(self._head)
        self._head += chunk[:room]
        self._tail += chunk[room:]
        del self._tail[: -self._limit]
        return bool(chunk)

    def text(self) -> str:
        return (self._head + self._tail).decode("utf-8", "replace")


def _receive(call: socket.socket) -> bytes:
    """The request; ConnectionResetError if the caller hung up before it was complete."""
    with call.makefile("rb") as stream:
        head = stream.read(8)
        body = stream.read(*struct.unpack("!Q", head)) if len(head) == 8 else b""
    if not body:
        raise ConnectionResetError("the caller hung up")
    return body


def _send(call: socket.socket, answer: dict) -> None:
    call.sendall(json.dumps(answer).encode())
    # The caller need not wait for this process to end, which takes the kernel longer than the call itself.
    call.shutdown(socket.SHUT_WR)
