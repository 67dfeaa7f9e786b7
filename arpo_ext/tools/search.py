"""Search over a local corpus with BM25.

What it leaves out: stemming and stop words (results would depend on a language and on what is installed), phrase
queries, corpora that do not fit into memory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arpo_ext.config import SearchToolConfig
from arpo_ext.errors import ToolError
from arpo_ext.types import ToolResult

if TYPE_CHECKING:
    import bm25s

NO_RESULTS = "no results"

# A title says what a document is about, so its words count this many times.
_TITLE_WEIGHT = 2
# Chinese and Japanese are written without spaces: there every character is a word of its own.
_CJK = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


@dataclass(frozen=True, slots=True)
class Document:
    """`title` and `text` are searched, `text` is what the model gets to read."""

    text: str
    title: str = ""


class SearchTool:
    """The best `top_k` documents for a query, as their texts joined by newlines, each cut at `snippet_chars`.

    Documents whose title has the very words of the query come first, then the order is by BM25 score (Lucene's form,
    k1 = 1.5, b = 0.75, bm25s library); equal scores keep the order of the corpus. A query no document shares a word
    with gives the text "no results", which is an answer; a query without any word is a failure.
    """

    name = "search"

    def __init__(self, config: SearchToolConfig) -> None:
        self.timeout_s = config.timeout_s
        self.workers = config.workers
        self._config = config
        self._documents: list[Document] = []
        self._by_title: dict[str, list[int]] = {}
        self._index: bm25s.BM25 | None = None

    @property
    def identity(self) -> str:
        """Changes when the corpus or what is made of it does."""
        status = os.stat(self._config.corpus)
        settings = self._config.model_dump_json(include={"corpus", "top_k", "snippet_chars"})
        return f"bm25 1 {settings} {status.st_size} {status.st_mtime_ns}"

    def start(self) -> None:
        if self._config.corpus is None:
            raise ToolError(
                "the search tool has no corpus; expected tools.search.corpus to name a .jsonl or .json file"
            )
        try:
            import bm25s
        except ImportError:
            raise ToolError("the search tool needs the bm25s library: pip install 'arpo-ext[search]'") from None
        documents = read_corpus(self._config.corpus)
        words = [_words(d.title) * _TITLE_WEIGHT + _words(d.text) for d in documents]
        if not any(words):
            raise ToolError(f"search corpus {self._config.corpus} holds no word in any document; expected text")
        index = bm25s.BM25(backend="numpy")
        index.index(words, show_progress=False)
        for number, document in enumerate(documents):
            self._by_title.setdefault(" ".join(_words(document.title)), []).append(number)
        self._documents, self._index = documents, index

    def run(self, text: str) -> ToolResult:
        if self._index is None:
            raise ToolError("the search tool is not started")
        query = _words(text)
        if not query:
            return ToolResult(self.name, "the search query is empty", ok=False)
        hits = self._best(query)
        if not hits:
            return ToolResult(self.name, NO_RESULTS, ok=True)
        return ToolResult(self.name, "\n".join(self._snippet(number) for number in hits), ok=True)

    def close(self) -> None:
        self._index = None
        self._documents = []
        self._by_title = {}

    def _best(self, query: list[str]) -> list[int]:
        """Numbers of at most top_k documents, best first."""
        top_k = self._config.top_k
        exact = self._by_title.get(" ".join(query), [])[:top_k]
        word_ids = self._index.get_tokens_ids(query)
        if not word_ids:
            return exact
        scores = self._index.get_scores_from_ids(word_ids)
        scores[exact] = 0
        candidates = scores.nonzero()[0]
        if len(candidates) > top_k:
            # Keep everything that ties with the last place, so that the stable sort decides by corpus order.
            last = -top_k
            bound = scores.copy()
            bound.partition(last)
            candidates = (scores >= bound[last]).nonzero()[0]
        order = candidates[(-scores[candidates]).argsort(kind="stable")]
        return (exact + order.tolist())[:top_k]

    def _snippet(self, number: int) -> str:
        text = self._documents[number].text
        limit = self._config.snippet_chars
        return text if len(text) <= limit else text[: limit - 1] + "…"


def read_corpus(path: Path) -> list[Document]:
    """Documents of a .jsonl file (rows with "text" and perhaps "title") or of a .json map from query to text.

    A text of the map may be nested: all strings in it count, in their order, one a line. ToolError if the file is
    missing, empty or of another form.
    """
    readers = {".jsonl": _read_rows, ".json": _read_map}
    reader = readers.get(path.suffix)
    if reader is None:
        raise ToolError(f"search corpus {path} has the ending {path.suffix!r}; expected .jsonl or .json")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"search corpus {path} cannot be read ({error}); expected a UTF-8 file") from None
    documents = list(reader(path, content))
    if not documents:
        raise ToolError(f"search corpus {path} is empty; expected at least one document")
    return documents


def _read_rows(path: Path, content: str) -> Iterator[Document]:
    # Not splitlines(): JSON strings may hold U+2028 and other line ends as they are.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse(line, f"line {number} of search corpus {path}")
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ToolError(f'line {number} of search corpus {path} is {line[:60]!r}; expected an object with a "text"')
        title = row.get("title") or ""
        if not isinstance(title, str):
            raise ToolError(f"line {number} of search corpus {path} has the title {title!r}; expected a string")
        yield Document(row["text"], title)


def _read_map(path: Path, content: str) -> Iterator[Document]:
    table = _parse(content, f"search corpus {path}")
    if not isinstance(table, dict):
        raise ToolError(f"search corpus {path} holds a {type(table).__name__}; expected a map from query to text")
    for title, value in table.items():
        yield Document("\n".join(_strings(value)), title)


def _parse(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ToolError(f"{what} is not JSON: {error}") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif value is not None:
        yield str(value)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
