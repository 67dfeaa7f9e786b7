"""Accuracy "exact": the same text, or the same number."""

from arpo_ext.rewards.answer_text import as_number, plain_text, unboxed


def exact(prediction: str, gold: str) -> float:
    """1 if both are equal up to case, spaces, LaTeX dress and a final full stop, or are numbers of equal value
    (47 = 47.0 = 94/2); else 0."""
    prediction, gold = unboxed(prediction), unboxed(gold)
    return float(_same_text(prediction, gold) or _same_number(prediction, gold))


def _same_text(prediction: str, gold: str) -> bool:
    return _folded(prediction) == _folded(gold)


def _same_number(prediction: str, gold: str) -> bool:
    value = as_number(gold)
    return value is not None and as_number(prediction) == value


def _folded(text: str) -> str:
    return plain_text(text).casefold().rstrip(".").rstrip()
