"""Documents from elsewhere: a retriever over HTTP, or a web search provider.

Faults of the network and of the service (connection, timeout, status 429 or 5xx) raise TransientToolError, which the
pool answers by trying again; what a later attempt cannot mend raises ValueError with words for the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arpo_ext.config import SearchToolConfig
from arpo_ext.errors import ToolError, TransientToolError
from arpo_ext.types import Document

if TYPE_CHECKING:
    import httpx

_BUSY = frozenset({408, 425, 429})


@dataclass(frozen=True, slots=True)
class Provider:
    """How one service is asked: its address, the variable that holds its key, the request, and the answer's hits."""

    url: str | None
    key_variable: str | None
    request: Callable[[str, int, str], dict[str, Any]]  # query, top_k, key -> arguments of httpx.Client.request
    hits: Callable[[Any], list[Mapping[str, Any]]]
    document: Callable[[Mapping[str, Any]], Document]


def _retriever_document(hit: Mapping[str, Any]) -> Document:
    # Search-R1's server puts the title on the first line of the contents.
    title, _, text = hit["document"]["contents"].partition("\n")
    return Document(text, title.strip('"')) if text else Document(title)


def _snippet_document(text_key: str) -> Callable[[Mapping[str, Any]], Document]:
    return lambda hit: Document(str(hit.get(text_key) or ""), str(hit.get("title") or ""))


# http: the request form of Search-R1's retrieval server (github.com/PeterGriffinJin/Search-R1).
PROVIDERS = {
    "http": Provider(
        None,
        None,
        lambda query, top_k, key: {
            "method": "POST",
            "json": {"queries": [query], "topk": top_k, "return_scores": True},
        },
        lambda answer: answer["result"][0],
        _retriever_document,
    ),
    "serper": Provider(
        "https://google.serper.dev/search",
        "SERPER_API_KEY",
        lambda query, top_k, key: {
            "method": "POST",
            "json": {"q": query, "num": top_k},
            "headers": {"X-API-KEY": key},
        },
        lambda answer: answer.get("organic", []),
        _snippet_document("snippet"),
    ),
    "brave": Provider(
        "https://api.search.brave.com/res/v1/web/search",
        "BRAVE_API_KEY",
        lambda query, top_k, key: {
            "method": "GET",
            "params": {"q": query, "count": top_k},
            "headers": {"X-Subscription-Token": key},
        },
        lambda answer: answer.get("web", {}).get("results", []),
        _snippet_document("description"),
    ),
}


class WebSource:
    """The hits of `config.source`, asked at `config.url` or at the provider's own address.

    The key comes from the environment (SERPER_API_KEY, BRAVE_API_KEY), never from a configuration that is written into
    run folders.
    """

    def __init__(self, config: SearchToolConfig) -> None:
        self._name = config.source
        self._provider = PROVIDERS[config.source]
        url = config.url or self._provider.url
        if url is None:
            raise ToolError(f"the search source {self._name!r} has no address; expected tools.search.url")
        self._url = url
        self._timeout_s = config.timeout_s
        self._key = ""
        self._client: httpx.Client | None = None
        self.identity = f"{self._name} 1 {url}"

    def open(self) -> None:
        if self._client is not None:
            return
        variable = self._provider.key_variable
        if variable is not None:
            self._key = os.environ.get(variable, "")
            if not self._key:
                raise ToolError(f"the search source {self._name!r} needs a key; expected the variable {variable}")
        try:
            import httpx
        except ImportError:
            raise ToolError("this search source needs the httpx library: pip install 'arpo-ext[search]'") from None
        # Of the call's time, so that a second attempt fits.
        self._client = httpx.Client(timeout=self._timeout_s / 3, headers={"User-Agent": "arpo-ext"})

    def search(self, query: str, top_k: int) -> list[Document]:
        if not query.strip():
            raise ValueError("the search query is empty")
        answer = self._ask(self._provider.request(query.strip(), top_k, self._key))
        try:
            return [self._provider.document(hit) for hit in self._provider.hits(answer)[:top_k]]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the search service answered in a form that {self._name!r} does not have: {error!r}"
            ) from None

    def _ask(self, request: dict[str, Any]) -> Any:
        import httpx

        try:
            response = self._client.request(url=self._url, **request)
        except httpx.TransportError as error:
            raise TransientToolError(f"the search service does not answer: {type(error).__name__}: {error}") from None
        if response.status_code in _BUSY or response.status_code >= 500:
            raise TransientToolError(f"the search service answered with status {response.status_code}")
        if response.status_code != 200:
            raise ValueError(f"the search service refused the query with status {response.status_code}")
        try:
            return response.json()
        except ValueError:
            raise ValueError("the search service did not answer in JSON") from None

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()
