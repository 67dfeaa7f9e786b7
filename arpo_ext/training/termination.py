"""SIGTERM as a request to stop: at once where nothing would be lost, else where the run stands whole again."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Terminated(BaseException):
    """Raised in the main thread by a SIGTERM inside `Termination.at_once`.

    Like KeyboardInterrupt no Exception: what samples or evaluates must not take it for a fault of its own.
    """


class Termination:
    """`with Termination() as termination:` notes a SIGTERM in `requested` instead of dying.

    The earlier handler is put back at the end. Outside the main thread, where Python allows no handler, nothing is
    noted.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interruptible = False

    def __enter__(self) -> Termination:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._earlier = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._earlier)

    @contextlib.contextmanager
    def at_once(self, enabled: bool = True) -> Iterator[None]:
        """What runs inside changes nothing that matters: a SIGTERM raises `Terminated` there, also one noted before."""
        if not enabled:
            yield
            return
        self._interruptible = True
        try:
            if self.requested:
                raise Terminated
            yield
        finally:
            self._interruptible = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._interruptible:
            self._interruptible = False
            raise Terminated
