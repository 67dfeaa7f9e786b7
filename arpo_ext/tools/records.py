"""Every tool call as one JSON line, and a tool that answers from such lines alone.

A row holds `name`, `text` (the call), `history` (see `ToolCall`), `result`, `ok`, `seconds`, `cached`, `attempts` and
`time` (Unix seconds). A run that replays the records of another sees the same answers whatever the network, the corpus
or the sandbox do meanwhile.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from arpo_ext.errors import ToolError
from arpo_ext.types import ToolCall, ToolResult

_log = logging.getLogger(__name__)

# How every row begins; a line that does, but is no JSON, was torn by a full disk or the end of its process.
_BEGINNING = '{"name": '
# What was asked along a path: the texts of the earlier calls that count, then the call's own.
Asked = tuple[str, ...]


class CallRecords:
    """Appends one line per call. A disk that fails later costs the records from there on and one warning."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Line-buffered: a line is one write, so that several processes may share the file and a killed one
            # loses nothing.
            self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()
            if _ends_torn(path):
                self._file.write("\n")
        except OSError as error:
            raise ToolError(f"the tool records {path} cannot be opened ({error}); expected a writable file") from None
        self._path = path
        self._lock = threading.Lock()
        self._failed = False

    def add(self, call: ToolCall, result: ToolResult, *, attempts: int) -> None:
        row = {
            "name": call.name,
            "text": call.text,
            "history": call.history,
            "result": result.text,
            "ok": result.ok,
            "seconds": round(result.seconds, 6),
            "cached": result.cached,
            "attempts": attempts,
            "time": round(time.time(), 3),
        }
        line = json.dumps(row) + "\n"
        with self._lock:
            if self._failed or self._file.closed:
                return
            try:
                self._file.write(line)
            except OSError as error:
                self._failed = True
                _log.warning("the tool records %s cannot be written (%s); the run goes on without", self._path, error)

    def close(self) -> None:
        with self._lock:
            try:
                self._file.close()
            except OSError as error:
                # What a full disk left in the buffer; the descriptor is released all the same.
                if not self._failed:
                    _log.warning("the tool records %s lack their last line (%s)", self._path, error)


def _ends_torn(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def read_records(path: Path) -> dict[str, dict[Asked, list[ToolResult]]]:
    """Tool name -> what was asked -> its answers in the order of the file; repeats of a cached answer are left out.

    A torn row is left out with a warning. ToolError names the file and the line that is not a record.
    """
    answers: dict[str, dict[Asked, list[ToolResult]]] = defaultdict(lambda: defaultdict(list))
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"the tool records {path} cannot be read ({error}); expected a UTF-8 file") from None
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            name, asked = row["name"], (*row.get("history", ()), row["text"])
            result = ToolResult(name, row["result"], ok=row["ok"], seconds=row["seconds"])
            cached = row["cached"]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, json.JSONDecodeError) and line.startswith(_BEGINNING):
                _log.warning("line %d of the tool records %s is torn and left out", number, path)
                continue
            raise ToolError(
                f"line {number} of the tool records {path} is {line[:60]!r} ({error!r}); expected a recorded call"
            ) from None
        if not cached or asked not in answers[name]:
            answers[name][asked].append(result)
    return answers


class ReplayTool:
    """Answers the calls of one tool from records; a call that was not recorded is a failure that says so.

    A call recorded several times (a failure, then an answer) is answered in that order, the last answer again and
    again. `wait`: take as long as the recorded call did.
    """

    def __init__(
        self, name: str, answers: Mapping[Asked, Sequence[ToolResult]], *, workers: int, wait: bool = False
    ) -> None:
        self.name = name
        self.workers = workers
        longest = max((result.seconds for results in answers.values() for result in results), default=0.0)
        self.timeout_s = 2 * longest + 5.0
        self.stateful = any(len(asked) > 1 for asked in answers)
        self._answers = answers
        self._wait = wait
        self._lock = threading.Lock()
        self._given: dict[Asked, int] = {}

    def start(self) -> None:
        with self._lock:
            self._given.clear()

    def run(self, text: str, history: tuple[str, ...] = ()) -> ToolResult:
        asked = (*history, text)
        results = self._answers.get(asked)
        if not results:
            return ToolResult(self.name, f"no recorded answer of the {self.name} tool to this call", ok=False)
        with self._lock:
            turn = self._given.get(asked, 0)
            self._given[asked] = turn + 1
        result = results[min(turn, len(results) - 1)]
        if self._wait:
            time.sleep(result.seconds)
        return result

    def close(self) -> None:
        pass
