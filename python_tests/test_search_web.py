"""Search over HTTP against a server on this machine: each provider's form, its key, its faults."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from arpo_ext.config import SearchToolConfig
from arpo_ext.errors import ToolError, TransientToolError
from arpo_ext.tools import Retry, ToolPool
from arpo_ext.tools.search import SearchTool
from arpo_ext.types import ToolCall

ANSWERS = {
    "http": {"result": [[{"document": {"id": "7", "contents": '"Sun"\nThe sun is a star.'}, "score": 3.5}] * 5]},
    "serper": {"organic": [{"title": "Sun", "snippet": "The sun is a star.", "link": "https://x"}] * 5},
    "brave": {"web": {"results": [{"title": "Sun", "description": "The sun is a star.", "url": "https://x"}] * 5}},
}
KEYS = {"serper": ("SERPER_API_KEY", "x-api-key"), "brave": ("BRAVE_API_KEY", "x-subscription-token")}


class Service:
    """Answers with `statuses` in turn, then 200 and `body`; keeps what it was asked."""

    def __init__(self, body, statuses=()):
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.statuses = list(statuses)
        self.requests = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                length = int(self.headers.get("Content-Length") or 0)
                service.requests.append((self.command, self.path, dict(self.headers.items()), self.rfile.read(length)))
                self.send_response(service.statuses.pop(0) if service.statuses else 200)
                self.send_header("Content-Length", str(len(service.body)))
                self.end_headers()
                self.wfile.write(service.body)

            do_POST = do_GET

            def log_message(self, *_): ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/retrieve"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def started(service, source="http", **settings):
    tool = SearchTool(SearchToolConfig(source=source, url=service.url, **settings))
    tool.start()
    return tool


@pytest.mark.parametrize("source", ANSWERS)
def test_each_source_is_asked_in_its_form_and_read(source, monkeypatch):
    variable, header = KEYS.get(source, (None, None))
    if variable:
        monkeypatch.setenv(variable, "secret")
    with Service(ANSWERS[source]) as service:
        tool = started(service, source, top_k=2)
        result = tool.run(" what is the sun\n")
        tool.close()
    assert result.ok
    assert result.text == "The sun is a star.\nThe sun is a star."
    ((method, path, headers, body),) = service.requests
    if header:
        assert {name.lower(): value for name, value in headers.items()}[header] == "secret"
        assert "secret" not in tool._config.model_dump_json()
    if source == "http":
        assert json.loads(body) == {"queries": ["what is the sun"], "topk": 2, "return_scores": True}
    elif source == "serper":
        assert json.loads(body) == {"q": "what is the sun", "num": 2}
    else:
        assert (method, parse_qs(urlsplit(path).query)) == ("GET", {"q": ["what is the sun"], "count": ["2"]})


@pytest.mark.parametrize("source", KEYS)
def test_a_missing_key_names_its_variable(source, monkeypatch):
    monkeypatch.delenv(KEYS[source][0], raising=False)
    with pytest.raises(ToolError, match=KEYS[source][0]):
        SearchTool(SearchToolConfig(source=source)).start()


def test_a_retriever_without_address_is_an_error():
    with pytest.raises(ToolError, match=r"expected tools\.search\.url"):
        SearchTool(SearchToolConfig(source="http")).start()


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_service_is_asked_again(status):
    with Service(ANSWERS["http"], [status]) as service:
        tool = SearchTool(SearchToolConfig(source="http", url=service.url, top_k=1))
        with ToolPool([tool], retry=Retry(delay_s=0.01)) as pool:
            result = pool.submit(ToolCall("search", "sun")).result(timeout=10)
    assert result.text == "The sun is a star."
    assert len(service.requests) == 2


def test_a_service_that_is_away_is_a_transient_fault():
    with Service({}) as service:
        tool = started(service)
    with pytest.raises(TransientToolError, match="does not answer"):
        tool.run("sun")


@pytest.mark.parametrize(
    ("body", "statuses", "message"),
    [
        ({}, [401], "refused the query with status 401"),
        (b"<html>", [], "did not answer in JSON"),
        ({"result": 3}, [], "in a form that 'http' does not have"),
        ([], [], "in a form that 'http' does not have"),
    ],
)
def test_what_another_attempt_cannot_mend_is_an_answer_in_words(body, statuses, message):
    with Service(body, statuses) as service:
        result = started(service).run("sun")
    assert not result.ok
    assert message in result.text
    assert len(service.requests) == 1


def test_nothing_found_and_nothing_asked():
    with Service({"result": [[]]}) as service:
        tool = started(service)
        assert (tool.run("sun").text, tool.run("sun").ok) == ("no results", True)
        assert not tool.run(" \n").ok
    assert len(service.requests) == 2


def test_titles_stay_out_of_the_text_and_a_document_of_one_line_is_all_text():
    answer = {"result": [[{"document": {"contents": "only one line"}}, {"document": {"contents": "T\na\nb"}}]]}
    with Service(answer) as service:
        assert started(service).run("x").text == "only one line\na\nb"
