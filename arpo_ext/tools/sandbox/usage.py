"""How much memory all processes below one hold together, which no limit of a process bounds."""

import contextlib
import os

_FIELDS = ("RssAnon:", "RssShmem:")


class MemoryWatch:
    """Memory of a process's descendants beyond what they inherited. proc: descriptor of /proc.

    Pages that a fork shares until one side writes count for each side.
    """

    def __init__(self, proc: int) -> None:
        self._proc = proc
        self._root = os.getpid()
        self._inherited = self._resident(self._root)

    def total_bytes(self) -> int:
        found, waiting = 0, self._children(self._root)
        while waiting:
            child = waiting.pop()
            found += max(0, self._resident(child) - self._inherited)
            waiting += self._children(child)
        return found

    def _resident(self, pid: int) -> int:
        lines = (line.split() for line in self._read(f"{pid}/status").splitlines())
        return sum(int(words[1]) << 10 for words in lines if words and words[0] in _FIELDS)

    def _children(self, pid: int) -> list[int]:
        with contextlib.suppress(OSError):
            folder = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._proc)
            try:
                threads = os.listdir(folder)
            finally:
                os.close(folder)
            return [int(child) for thread in threads for child in self._read(f"{pid}/task/{thread}/children").split()]
        return []

    def _read(self, name: str) -> str:
        """The file's text, "" for a process that has ended meanwhile."""
        with contextlib.suppress(OSError), open(os.open(name, os.O_RDONLY, dir_fd=self._proc)) as file:
            return file.read()
        return ""
