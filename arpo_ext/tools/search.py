"""The search tool: a query in, snippets out, wherever the documents come from."""

from __future__ import annotations

from typing import Protocol

from arpo_ext.config import SearchToolConfig
from arpo_ext.errors import ToolError
from arpo_ext.tools.search_bm25 import Bm25Source
from arpo_ext.tools.search_web import PROVIDERS, WebSource
from arpo_ext.types import Document, ToolResult

NO_RESULTS = "no results"


class Source(Protocol):
    """Where documents come from.

    identity: differs whenever the same query may find something else; valid once open.
    """

    identity: str

    def open(self) -> None:
        """Get ready; ToolError if that cannot be."""

    def search(self, query: str, top_k: int) -> list[Document]:
        """At most top_k documents, best first; thread-safe.

        ValueError in words for the model if the query cannot be answered, TransientToolError if it may be later.
        """

    def close(self) -> None: ...


class SearchTool:
    """The best `top_k` documents for a query, as their texts joined by newlines, each cut at `snippet_chars`.

    A query that finds nothing gives the text "no results", which is an answer; a query without any word is a failure.
    """

    name = "search"

    def __init__(self, config: SearchToolConfig) -> None:
        self.timeout_s = config.timeout_s
        self.workers = config.workers
        self._config = config
        self._source: Source | None = None

    @property
    def identity(self) -> str:
        return f"{self._opened().identity} {self._config.top_k} {self._config.snippet_chars}"

    def start(self) -> None:
        source: Source = WebSource(self._config) if self._config.source in PROVIDERS else Bm25Source(self._config)
        source.open()
        self._source = source

    def run(self, text: str) -> ToolResult:
        try:
            documents = self._opened().search(text, self._config.top_k)
        except ValueError as error:
            return ToolResult(self.name, str(error), ok=False)
        if not documents:
            return ToolResult(self.name, NO_RESULTS, ok=True)
        return ToolResult(self.name, "\n".join(self._snippet(document.text) for document in documents), ok=True)

    def close(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def _opened(self) -> Source:
        if self._source is None:
            raise ToolError("the search tool is not started")
        return self._source

    def _snippet(self, text: str) -> str:
        limit = self._config.snippet_chars
        return text if len(text) <= limit else text[: limit - 1] + "…"
