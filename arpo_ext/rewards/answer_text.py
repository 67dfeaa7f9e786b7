"""Readings of a short answer that all scorers share: out of its box, without its LaTeX dress, as a number."""

from __future__ import annotations

import re
from fractions import Fraction

_DELIMITERS = [("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")]
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad\b|~")
_SIZES = re.compile(r"\\(?:left|right|big|Big|displaystyle)(?![A-Za-z])\s*")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-+]?\d+)\s*\}\s*\{\s*([-+]?\d+)\s*\}")
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|°)$")
_NUMBER = re.compile(r"([-+]?)\s*(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+|\.)?")
# Longer digit strings are identifiers or noise, and exact arithmetic on them costs time.
_MAX_DIGITS = 60


def braced(text: str, start: int, *, escapes: bool) -> str | None:
    """What the brace at `start` encloses; None if it is never closed. escapes: `\\{` and `\\}` do not count."""
    depth = 0
    for index in range(start, len(text)):
        if escapes and index > 0 and text[index - 1] == "\\":
            continue
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return text[start + 1 : index]
    return None


def last_boxed(text: str) -> str | None:
    """The content of the last complete `\\boxed{...}`, of the innermost one if it is nested; None without any."""
    for match in reversed(list(re.finditer(r"\\boxed\s*(?=\{)", text))):
        content = braced(text, match.end(), escapes=True)
        if content is not None:
            return content
    return None


def unboxed(answer: str) -> str:
    """What the last `\\boxed{...}` in `answer` holds, or `answer` if there is none. Some accepted answers have one."""
    inner = last_boxed(answer)
    return answer.strip() if inner is None else unboxed(inner)


def plain_text(answer: str) -> str:
    """`answer` without math delimiters, text commands, spacing and sizing commands, and with single spaces."""
    text = answer.strip()
    for opening, closing in _DELIMITERS:
        if len(text) >= len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : len(text) - len(closing)]
            break
    while (unwrapped := _WRAPPER.sub(r" \1 ", text)) != text:
        text = unwrapped
    text = text.replace("\\!", "").replace("\\$", "$").replace("\\%", "%").replace("\u2212", "-")
    return " ".join(_SIZES.sub("", _SPACING.sub(" ", text)).split())


def as_number(answer: str) -> Fraction | None:
    """The exact value of an integer, a decimal (thousands in groups of three or not) or a fraction; else None.

    Dollar and degree signs and punctuation at the end are passed over.
    """
    if len(answer) > 4 * _MAX_DIGITS:
        return None
    text = _DEGREES.sub("", plain_text(answer)).removeprefix("$").rstrip(".,;").replace("{,}", ",")
    sign, text = (text[0], text[1:].strip()) if text[:1] in ("-", "+") else ("", text)
    fraction = _FRACTION.fullmatch(text)
    parts = list(fraction.groups()) if fraction else text.split("/")
    values = [_decimal(part.strip()) for part in parts]
    if len(values) > 2 or None in values or values[1:] == [0]:
        return None
    value = values[0] / values[1] if len(values) == 2 else values[0]
    return -value if sign == "-" else value


def _decimal(text: str) -> Fraction | None:
    match = _NUMBER.fullmatch(text)
    if match is None or not re.search(r"\d", text) or len(text) > _MAX_DIGITS:
        return None
    return Fraction(text.replace(",", "").replace(" ", ""))
