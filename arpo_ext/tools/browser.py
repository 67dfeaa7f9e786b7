"""The browser tool: an address and what to look for in, the passages that matter out."""

from __future__ import annotations

import os

from arpo_ext.config import BrowserToolConfig, SummarizerConfig
from arpo_ext.errors import ToolError, TransientToolError
from arpo_ext.tools.page_text import extract_text, windows
from arpo_ext.tools.web_page import PageError, fetch
from arpo_ext.types import ToolResult

_PROMPT = (
    "Below is the text of a web page. Write down what it says about the question, in at most {words} words, with "
    'names, numbers and dates as they stand there. If it says nothing about it, write "nothing relevant".\n\n'
    "Question: {query}\n\nPage:\n{text}"
)


class BrowserTool:
    """Reads one web page. The call holds an address and, after a space or newline, what to look for.

    The answer is the page's text where it matches the query (see `page_text.windows`), at most `page_chars` characters,
    or what the summarizer made of that text. Pages are fetched from this process: only public http and https addresses,
    at most `max_mb`, within `timeout_s`.
    """

    name = "browser"

    def __init__(self, config: BrowserToolConfig) -> None:
        self.timeout_s = config.timeout_s + (0 if config.summarizer is None else config.summarizer.timeout_s)
        self.workers = config.workers
        self._config = config
        self._summarizer = None if config.summarizer is None else Summarizer(config.summarizer)
        self.identity = f"browser 1 {config.model_dump_json(exclude={'workers', 'timeout_s'})}"

    def start(self) -> None:
        try:
            import httpcore  # noqa: F401 - asked for before the first call needs it
            import trafilatura  # noqa: F401
        except ImportError as error:
            raise ToolError(
                f"the browser tool needs the {error.name} library: pip install 'arpo-ext[browser]'"
            ) from None
        if self._summarizer is not None:
            self._summarizer.open()

    def run(self, text: str) -> ToolResult:
        url, _, query = text.strip().partition("\n" if "\n" in text.strip() else " ")
        try:
            answer = self._read(url.strip(), query.strip())
        except (PageError, ValueError) as error:
            return ToolResult(self.name, str(error), ok=False)
        return ToolResult(self.name, answer, ok=True)

    def _read(self, url: str, query: str) -> str:
        if not url:
            raise PageError("the call is empty; expected an address")
        config = self._config
        page = fetch(
            url,
            # Of the call's time, so that a second attempt fits.
            timeout_s=config.timeout_s / 2,
            max_bytes=int(config.max_mb * 2**20),
            allow_private=config.allow_private,
        )
        content = extract_text(page).strip()
        if not content:
            return "the page holds no text"
        passages = windows(content, query, window_chars=config.window_chars, max_chars=config.page_chars)
        return passages if self._summarizer is None else self._summarizer.run(passages, query)

    def close(self) -> None:
        if self._summarizer is not None:
            self._summarizer.close()


class Summarizer:
    """Asks a chat model behind an OpenAI-compatible endpoint what a page says about a question."""

    def __init__(self, config: SummarizerConfig) -> None:
        self._config = config
        self._client = None

    def open(self) -> None:
        if self._client is not None:
            return
        import httpx

        key = os.environ.get(self._config.key_variable, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(timeout=self._config.timeout_s / 2, headers=headers)

    def run(self, text: str, query: str) -> str:
        """ValueError in words for the model, TransientToolError if a later attempt may do."""
        import httpx

        config = self._config
        prompt = _PROMPT.format(words=config.max_tokens // 2, query=query or "What is this page about?", text=text)
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": config.max_tokens,
            "temperature": 0,
        }
        try:
            response = self._client.post(f"{config.url.rstrip('/')}/chat/completions", json=body)
        except httpx.TransportError as error:
            raise TransientToolError(f"the summarizer does not answer: {type(error).__name__}: {error}") from None
        if response.status_code in (408, 425, 429) or response.status_code >= 500:
            raise TransientToolError(f"the summarizer answered with status {response.status_code}")
        if response.status_code != 200:
            raise ValueError(f"the summarizer refused with status {response.status_code}")
        try:
            return str(response.json()["choices"][0]["message"]["content"]).strip()
        except (ValueError, KeyError, IndexError, TypeError):
            raise ValueError("the summarizer did not answer in the form of chat completions") from None

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()
