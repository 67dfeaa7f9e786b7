"""The readable text of a fetched page, and the parts of it that have to do with a query."""

from __future__ import annotations

from collections.abc import Iterable

from arpo_ext.errors import ToolError
from arpo_ext.tools.web_page import Page

# More of a query do not find a better place, but each takes a pass over the text.
_QUERY_WORDS = 64
# The time for HTML grows with the square of what it holds: 1 MiB of small paragraphs takes 4 s, 2 MiB 22 s.
_HTML_BYTES = 2 << 20


def extract_text(page: Page) -> str:
    """The readable text of a page, by the trafilatura library; plain text as it is. "" if there is none.

    Of HTML the first 2 MiB are read.
    """
    if page.content_type and not page.content_type.startswith(("text/html", "application/xhtml")):
        try:
            return page.content.decode(page.charset or "utf-8", errors="replace")
        except (LookupError, ValueError):  # not the name of an encoding, or of one that cannot replace
            return page.content.decode("utf-8", errors="replace")
    try:
        import trafilatura
    except ImportError:
        raise ToolError("the browser tool needs the trafilatura library: pip install 'arpo-ext[browser]'") from None
    return (
        trafilatura.extract(page.content[:_HTML_BYTES], include_comments=False, include_tables=True, favor_recall=True)
        or ""
    )


_Window = tuple[int, int]


def windows(text: str, query: str, *, window_chars: int, max_chars: int) -> str:
    """The parts of `text` that share most words with `query`, in the order of the text, at most `max_chars` in all.

    Windows of `window_chars` start at every half window; the best ones by distinct words of the query, then by how many
    they hold, are kept, neighbours joined. Without a query, or where no word occurs, the beginning.
    """
    if len(text) <= max_chars:
        return text
    words = list(dict.fromkeys(word for word in query.casefold().split() if len(word) > 2))[:_QUERY_WORDS]
    folded = text.casefold()
    if len(folded) != len(text):
        folded = text.lower() if len(text.lower()) == len(text) else text
    scored: list[tuple[tuple[int, int], int]] = []
    for start in range(0, max(len(text) - window_chars // 2, 1), max(window_chars // 2, 1)):
        counts = [folded.count(word, start, start + window_chars) for word in words]
        scored.append(((sum(map(bool, counts)), sum(counts)), start))
    scored.sort(key=lambda entry: (-entry[0][0], -entry[0][1], entry[1]))
    if not scored or scored[0][0][0] == 0:
        return text[:max_chars] + "…"
    chosen: list[_Window] = []
    for (distinct, _), start in scored:
        if distinct == 0:
            break
        merged = _merge([*chosen, (start, min(start + window_chars, len(text)))])
        if sum(end - begin for begin, end in merged) > max_chars:
            break
        chosen = merged
    chosen = chosen or [(scored[0][1], min(scored[0][1] + max_chars, len(text)))]
    joined = "\n…\n".join(text[begin:end].strip() for begin, end in chosen)
    return ("…" if chosen[0][0] > 0 else "") + joined + ("…" if chosen[-1][1] < len(text) else "")


def _merge(spans: Iterable[_Window]) -> list[_Window]:
    merged: list[_Window] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
