"""The server: keeps supervisors ready, hands each call that comes over a socket to one of them, and replaces it."""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections import deque

from . import kernel, snippet
from .jail import Jail
from .supervisor import supervise

# Supervisors, each with two processes below it, that wait beside those that are busy, at most.
_READY = 8
# How soon a fork that the system refused is tried again.
_RETRY_MS = 100


def main(package_parent: str, control_fd: str, parent_pid: str, packages: str, limits: str) -> None:
    """Serve until the control socket closes or the parent dies.

    packages: JSON of a `packages.Packages`. limits: JSON of what is the same for every call: workers (how many run at
    the same time), timeout_s, memory_mb, output_bytes (kept of the beginning and of the end of each stream).
    """
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
    # Nobody reads what is written there from here on; a full pipe would stop whoever writes.
    os.dup2(0, 2)
    os.environ.clear()
    # Collected pages would be copied in every child.
    gc.collect()
    gc.freeze()
    # Supervisors are reaped by the kernel.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    _Server(control, parent, jail, json.loads(limits)).serve()


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


class _Server:
    """control: brings the sockets of calls. parent: a pidfd."""

    def __init__(self, control: socket.socket, parent: int, jail: Jail, limits: dict) -> None:
        self._control, self._parent, self._jail, self._limits = control, parent, jail, limits
        # One user id per slot, so that the process limits of concurrent calls do not add up.
        self._free = list(range(limits["workers"] + 1))
        self._ready: deque[socket.socket] = deque()
        self._calls: deque[socket.socket] = deque()
        # A folder that does not vanish by itself is not made before there is a call whose end removes it.
        self._spare = _READY if jail.has_root else 0
        # Every supervisor that lives, by the descriptor of the socket to it: its slot and that socket.
        self._alive: dict[int, tuple[int, socket.socket]] = {}
        self._poller = select.poll()

    def serve(self) -> None:
        self._poller.register(self._control, select.POLLIN)
        self._poller.register(self._parent, select.POLLIN)
        while True:
            self._fill_up()
            for fd, _ in self._poller.poll(_RETRY_MS if self._calls else None):
                if fd in self._alive:
                    self._forget(fd)
                elif fd != self._control.fileno() or not self._take_call():
                    return

    def _fill_up(self) -> None:
        """Start what supervisors there is room for, and give them the calls that wait."""
        while self._free and len(self._ready) < max(self._spare, len(self._calls)) and self._add_supervisor():
            pass
        while self._calls and self._ready:
            # One that was killed meanwhile is found out here or, by the caller, when the call gets no answer.
            with contextlib.suppress(OSError):
                socket.send_fds(self._ready.popleft(), [b"c"], [self._calls[0].fileno()])
                self._calls.popleft().close()

    def _take_call(self) -> bool:
        _, calls, _, _ = socket.recv_fds(self._control, 1, 1)
        self._calls.extend(socket.socket(fileno=fd) for fd in calls)
        return bool(calls)

    def _add_supervisor(self) -> bool:
        slot = self._free[0]
        server = os.pidfd_open(os.getpid())
        ours, theirs = socket.socketpair()
        with open(server), theirs:
            try:
                child = os.fork()
            except OSError:
                ours.close()
                return False
            if child == 0:
                # A copy kept here would keep the caller from noticing that the call's own supervisor was killed.
                for inherited in (ours, self._control, *self._calls, *(end for _, end in self._alive.values())):
                    inherited.close()
                _be_supervisor(server, theirs, self._jail, slot, self._limits)
        self._free.remove(slot)
        self._alive[ours.fileno()] = (slot, ours)
        self._ready.append(ours)
        self._poller.register(ours, select.POLLIN)
        return True

    def _forget(self, fd: int) -> None:
        slot, ours = self._alive.pop(fd)
        self._poller.unregister(fd)
        if ours in self._ready:
            self._ready.remove(ours)
        ours.close()
        self._free.append(slot)


def _be_supervisor(server: int, handover: socket.socket, jail: Jail, slot: int, limits: dict) -> None:
    """In the new process; never returns."""
    try:
        kernel.die_with_parent(server)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        supervise(handover, jail, slot, limits)
    finally:
        os._exit(0)
