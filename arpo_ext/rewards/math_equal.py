"""Mathematical equality of two answers: quick exact readings first, then the math-verify library.

The library runs in a process of its own (`math_worker.py`): its time limits need a main thread, and no limit inside a
process stops a single huge power. A comparison past the limit counts as unequal.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

from arpo_ext.rewards.answer_text import as_number, plain_text, unboxed

_FUNCTIONS = frozenset(
    """
    sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln exp sqrt max min gcd lcm mod pi deg det
    """.split()  # noqa: SIM905 - a list of words reads better
)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[a-z*]+\}(?:\{[lcr|]*\})?")
_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mbox)\s*\{[^{}]*\}")
_WORD = re.compile(r"[^\W\d_]{2,}")
# 2010-12, 2001-05-04, 1/2/2003, 2:1: dates, spans and scores rather than something to evaluate.
_DATE_LIKE = re.compile(r"\s*\d+\s*(?:[-:]\s*\d+\s*){1,2}|\s*\d+/\d+/\d+\s*")
_ROOT = re.compile(r"√\s*(\d+|[A-Za-z])")
_MAX_LENGTH = 1000
_LIMIT_S = 5


def is_mathematical(gold: str) -> bool:
    """Whether `gold` is to be compared as mathematics: a number or an expression without words.

    A digit, an equals sign or a LaTeX command is needed: a choice letter is none, nor are words, dates, spans of years.
    """
    text = unboxed(gold)
    if as_number(text) is not None:
        return True
    if (
        len(text) > _MAX_LENGTH
        or text.count("{") != text.count("}")
        or _DATE_LIKE.fullmatch(text)
        or not re.search(r"[\d=π√∞]|\\[A-Za-z]", text)
    ):
        return False
    bare = _COMMAND.sub(" ", _TEXT.sub(" ", _ENVIRONMENT.sub(" ", text)))
    if "–" in text or not re.search(r"[\w∞√]", _COMMAND.sub("x", _TEXT.sub(" ", text))):
        return False
    # In a formula ab is a product and AC a segment; elsewhere two letters may be a word.
    longest = 3 if re.search(r"[\\^_]", text) else 2 if "=" in text else 1
    return all(len(word) <= longest or word in _FUNCTIONS for word in _WORD.findall(bare))


def math_equal(prediction: str, gold: str) -> bool:
    """Whether `prediction` is mathematically equal to `gold`, as far as math-verify can tell (1/2 = 0.5 = \\frac12,
    45\\% = 0.45, x = 5 = 5; (1, 2) is not [1, 2]). Numbers that are written as such are compared exactly.

    ImportError names the extra where the library is needed and missing.
    """
    prediction, gold = unboxed(prediction), unboxed(gold)
    if plain_text(prediction) == plain_text(gold):
        return True
    expected, value = as_number(gold), as_number(prediction)
    if expected is not None and value is not None:
        # A decimal may be a rounded fraction; the library's own measure is six places.
        exact = expected.denominator == value.denominator == 1
        return expected == value if exact else round(expected, 6) == round(value, 6)
    if len(prediction) > _MAX_LENGTH or not re.search(r"[\d\\]|[^\W\d_]", prediction):
        return False
    return _verified(_readable(prediction), _readable(gold))


def _readable(text: str) -> str:
    """`text` as the library reads it: without a stray comma at the end, with LaTeX for two Unicode signs."""
    return _ROOT.sub(r"\\sqrt{\1}", text).replace("°", "^\\circ").strip().rstrip(",;")


@lru_cache(maxsize=1 << 16)
def _verified(prediction: str, gold: str) -> bool:
    return _worker.compare(prediction, gold)


class _Worker:
    """One process that answers comparisons in turn; started when first needed, again when it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def compare(self, prediction: str, gold: str) -> bool:
        with self._lock:
            process = self._running()
            try:
                process.stdin.write(json.dumps([gold, prediction]) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if not answer:
                # It ended itself, at its limit of time or memory.
                self._end()
            return answer.strip() == "true"

    def close(self) -> None:
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[str]:
        if self._owner != os.getpid():
            # After a fork the pipes belong to the other process.
            self._process = None
        if self._process is None:
            if importlib.util.find_spec("math_verify") is None:
                raise ImportError("mathematical comparison needs math-verify: pip install 'arpo-ext[rewards]'")
            script = str(Path(__file__).with_name("math_worker.py"))
            self._process = subprocess.Popen(
                [sys.executable, "-P", script, str(_LIMIT_S)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
            self._owner = os.getpid()
        return self._process

    def _end(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None


_worker = _Worker()
atexit.register(_worker.close)
