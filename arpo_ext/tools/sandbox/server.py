"""The server: takes calls over a socket and forks one supervisor per call, which forks the code's own process.

    server --fork--> supervisor --fork--> first process of a pid namespace --fork--> the code

The supervisor keeps the clock, bounds what is kept of the output and answers; ending the first process ends whatever
the code has started. Where there is no pid namespace the supervisor adopts orphans and ends them one by one.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import shutil
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


def main(package_parent: str, control_fd: str, parent_pid: str, packages: str) -> None:
    """Serve until the control socket closes or the parent dies. `packages`: JSON of a `packages.Packages`."""
    sys.path.remove(package_parent)
    control = socket.socket(fileno=int(control_fd))
    parent = os.pidfd_open(int(parent_pid))
    for name in snippet.PRELOADED:
        importlib.import_module(name)
    wanted = json.loads(packages)
    jail = Jail(wanted["paths"])
    before = _address_space()
    sys.path += wanted["roots"]
    for name in wanted["modules"]:
        importlib.import_module(name)
    # A call may use its memory beside what the packages map, which is more than they hold.
    jail.preloaded_bytes = _address_space() - before
    jail.prepare()
    control.send(json.dumps(jail.missing).encode())
    os.environ.clear()
    # Collected pages would be copied in every child.
    gc.collect()
    gc.freeze()
    # Supervisors are reaped by the kernel.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(parent, select.POLLIN)
    while all(fd == control.fileno() for fd, _ in poller.poll()):
        _, calls, _, _ = socket.recv_fds(control, 1, 1)
        if not calls:
            return
        _fork_supervisor(calls[0], jail)


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _fork_supervisor(call_fd: int, jail: Jail) -> None:
    server = os.pidfd_open(os.getpid())
    with open(server), socket.socket(fileno=call_fd) as call:
        try:
            child = os.fork()
        except OSError as error:
            _send(call, {"error": f"fork: {error.strerror}"})
            return
        if child == 0:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                try:
                    kernel.die_with_parent(server)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    answer = _supervise(call, _receive(call), jail)
                except OSError as error:
                    answer = {"error": error.strerror or str(error)}
                _send(call, answer)
            os._exit(0)


def _supervise(call: socket.socket, request: dict, jail: Jail) -> dict:
    """Run the request's code to its end or its limit. The answer holds status, output and errors."""
    kernel.adopt_orphans()
    folder = jail.open_call(request["slot"])
    out, err = os.pipe(), os.pipe()
    leader = _fork_leader(request, jail, folder, out[1], err[1])
    os.close(out[1])
    os.close(err[1])
    outputs = {out[0]: _Output(request["output_bytes"]), err[0]: _Output(request["output_bytes"])}
    memory_bytes = _MEMORY_FACTOR * request["memory_mb"] << 20
    fault, status = _watch(call, leader, outputs, request["timeout_s"], memory_bytes, jail)
    if not jail.has_root:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "fault": fault,
        "status": status,
        "out": outputs[out[0]].text(),
        "err": outputs[err[0]].text(),
        "bytes": sum(output.total for output in outputs.values()),
    }


def _fork_leader(request: dict, jail: Jail, folder: str, out: int, err: int) -> int:
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
    _run_code(request, jail, folder, out, err, supervisor)


def _run_code(request: dict, jail: Jail, folder: str, out: int, err: int, supervisor: int) -> None:
    """The process of the code itself; never returns."""
    status = 1
    try:
        os.setsid()
        # Descriptor 0 is /dev/null already.
        os.dup2(out, 1)
        os.dup2(err, 2)
        jail.enter(request["slot"], folder, memory_mb=request["memory_mb"], cpu_s=int(request["timeout_s"]) + 2)
        kernel.die_with_parent(supervisor)
        os.closerange(3, 1 << 16)
        for name in [
            name for name in sys.modules if name.partition(".")[0] == __package__ and name != snippet.__name__
        ]:
            del sys.modules[name]
        status = snippet.run(request["code"])
    except Exception as error:  # noqa: BLE001 - this process ends here; its parent must learn why
        os.write(2, f"the sandbox could not be entered: {error!r}\n".encode())
    finally:
        os._exit(status)


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
            if memory.total_bytes() > memory_bytes:
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
    return 128 - code if code < 0 else code


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


def _receive(call: socket.socket) -> dict:
    with call.makefile("rb") as stream:
        (size,) = struct.unpack("!Q", stream.read(8))
        return json.loads(stream.read(size))


def _send(call: socket.socket, answer: dict) -> None:
    call.sendall(json.dumps(answer).encode())
    # The caller need not wait for this process to end, which takes the kernel longer than the call itself.
    call.shutdown(socket.SHUT_WR)
