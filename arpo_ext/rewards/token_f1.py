"""Accuracy "token_f1": the harmonic mean of precision and recall over words, strict and as published."""

from __future__ import annotations

import re
import string
from collections import Counter

from arpo_ext.rewards.answer_text import as_number, plain_text, unboxed
from arpo_ext.rewards.exact import exact

_ARTICLES = frozenset({"a", "an", "the"})
_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_OPENING = "\"'`([{<*“‘«¿¡"
_CLOSING = "\"'`)]}>*”’».,;:!?"
_DIGIT_HYPHEN = re.compile(r"(?<=\d)-(?=[^\W\d])|(?<=[^\W\d])-(?=\d)")


def token_f1(prediction: str, gold: str) -> float:
    """Token F1 without luck from punctuation.

    Words lose case, punctuation and articles (unless nothing else is left). A token with a digit keeps sign, decimal
    point and slashes, and counts by its value where it is a number. A prediction with a number the gold does not hold,
    in place of one that it holds, gets 0: a wrong date is wrong. So does any other answer to a yes/no question.
    """
    if exact(prediction, gold):
        return 1.0
    predicted, expected = _tokens(prediction), _tokens(gold)
    numbers, expected_numbers = ({t for t in tokens if _has_digit(t)} for tokens in (predicted, expected))
    if numbers - expected_numbers and expected_numbers - numbers:
        return 0.0
    return _f1(predicted, expected)


def published_token_f1(prediction: str, gold: str) -> float:
    """Token F1 after lower-casing and removing every punctuation character and the articles, as the published scorer
    has it. "-3" equals "3" there, "9.80" equals "980", and the answer "A" is lost."""
    return _f1(*(_published_tokens(text) for text in (prediction, gold)))


def _f1(predicted: list[str], expected: list[str]) -> float:
    if predicted != expected and any(len(t) == 1 and t[0] in _CLOSED_ANSWERS for t in (predicted, expected)):
        return 0.0
    common = sum((Counter(predicted) & Counter(expected)).values())
    # 2 * precision * recall / (precision + recall)
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def _published_tokens(text: str) -> list[str]:
    bare = text.lower().translate(_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _tokens(text: str) -> list[str]:
    words = []
    for word in _DIGIT_HYPHEN.sub(" ", plain_text(unboxed(text)).casefold()).split():
        if _has_digit(word):
            word = word.lstrip(_OPENING).rstrip(_CLOSING)
            value = as_number(word)
            words.append(word if value is None else str(value))
        elif bare := word.translate(_PUNCTUATION):
            words.append(bare)
    return [word for word in words if word not in _ARTICLES] or words


def _has_digit(word: str) -> bool:
    return any(character.isdigit() for character in word)
