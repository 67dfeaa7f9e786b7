"""Every tool call as one JSON line, and a tool that answers from such lines alone.

A row holds `name`, `text` (the call), `result`, `ok`, `seconds`, `cached`, `attempts` and `time` (Unix seconds). A run
that replays the records of another sees the same answers whatever the network, the corpus or the sandbox do meanwhile.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from arpo_ext.errors import ToolError
from arpo_ext.types import ToolCall, ToolResult

_log = logging.getLogger(__name__)


class CallRecords:
    """Appends one line per call. A disk that fails later costs the records from there on and one warning."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Line-buffered: a line is one write, so that several processes may share the file and a killed one
            # loses nothing.
            self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise ToolError(f"the tool records {path} cannot be opened ({error}); expected a writable file") from None
        self._path = path
        self._lock = threading.Lock()
        self._failed = False

    def add(self, call: ToolCall, result: ToolResult, *, attempts: int) -> None:
        row = {
            "name": call.name,
            "text": call.text,
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


def read_records(path: Path) -> dict[str, dict[str, list[ToolResult]]]:
    """Tool name -> call text -> its answers in the order of the file; repeats of a cached answer are left out.

    ToolError names the file and the line that is not a record.
    """
    answers: dict[str, dict[str, list[ToolResult]]] = defaultdict(lambda: defaultdict(list))
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"the tool records {path} cannot be read ({error}); expected a UTF-8 file") from None
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            name, text = row["name"], row["text"]
            result = ToolResult(name, row["result"], ok=row["ok"], seconds=row["seconds"])
            cached = row["cached"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ToolError(
                f"line {number} of the tool records {path} is {line[:60]!r} ({error!r}); expected a recorded call"
            ) from None
        if not cached or text not in answers[name]:
            answers[name][text].append(result)
    return answers


class ReplayTool:
    """Answers the calls of one tool from records; a call that was not recorded is a failure that says so.

    A call recorded several times (a failure, then an answer) is answered in that order, the last answer again and
    again. `wait`: take as long as the recorded call did.
    """

    def __init__(
        self, name: str, answers: Mapping[str, Sequence[ToolResult]], *, workers: int, wait: bool = False
    ) -> None:
        self.name = name
        self.workers = workers
        longest = max((result.seconds for results in answers.values() for result in results), default=0.0)
        self.timeout_s = 2 * longest + 5.0
        self._answers = answers
        self._wait = wait
        self._lock = threading.Lock()
        self._given: dict[str, int] = {}

    def start(self) -> None:
        with self._lock:
            self._given.clear()

    def run(self, text: str) -> ToolResult:
        results = self._answers.get(text)
        if not results:
            return ToolResult(self.name, f"no recorded answer of the {self.name} tool to this call", ok=False)
        with self._lock:
            turn = self._given.get(text, 0)
            self._given[text] = turn + 1
        result = results[min(turn, len(results) - 1)]
        if self._wait:
            time.sleep(result.seconds)
        return result

    def close(self) -> None:
        pass
