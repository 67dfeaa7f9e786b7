"""The browser tool against a server on this machine: what it reads, what it refuses, what it chooses of a long page."""

import gzip
import json
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from arpo_ext.config import BrowserToolConfig, ToolsConfig
from arpo_ext.errors import ToolError, TransientToolError
from arpo_ext.tools import open_pool, page_text, web_page
from arpo_ext.tools.browser import BrowserTool
from arpo_ext.tools.page_text import windows
from arpo_ext.tools.web_page import PageError, fetch, is_public
from arpo_ext.types import ToolCall

pytest.importorskip("trafilatura", reason="trafilatura is not installed (extra: browser)")

ARTICLE = (
    "<html><head><title>Sun</title></head><body><nav>Home | About</nav><article><h1>Sun</h1>"
    "<p>The sun is a star at the centre of the solar system, and its mass is 333,000 times that of the earth.</p>"
    "<p>It formed about 4.6 billion years ago from matter in a large molecular cloud.</p></article></body></html>"
)


class Site:
    """pages: path -> (status, headers, body) or a function that takes the handler."""

    def __init__(self, pages):
        self.pages = pages
        self.requests = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                length = int(self.headers.get("Content-Length") or 0)
                site.requests.append((self.path, dict(self.headers.items()), self.rfile.read(length)))
                page = site.pages[self.path]
                if callable(page):
                    page(self)
                    return
                status, headers, body = page
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_): ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def html(body=ARTICLE, **headers):
    return (
        200,
        {"Content-Type": "text/html; charset=utf-8", **headers},
        body if isinstance(body, bytes) else body.encode(),
    )


def get(url, **options):
    return fetch(url, **{"timeout_s": 5.0, "max_bytes": 1 << 20, "allow_private": True, **options})


def tool(**settings):
    made = BrowserTool(BrowserToolConfig(allow_private=True, **settings))
    made.start()
    return made


def test_a_page_is_read_without_its_menus():
    with Site({"/sun": html()}) as site:
        result = tool().run(f" {site.url}/sun mass of the sun\n")
    assert result.ok
    assert "333,000 times" in result.text
    assert "molecular cloud" in result.text
    assert "About" not in result.text


def test_plain_text_stays_as_it_is_in_its_charset():
    with Site({"/t": (200, {"Content-Type": "text/plain; charset=latin-1"}, "café\n  two".encode("latin-1"))}) as site:
        assert tool().run(f"{site.url}/t").text == "café\n  two"


@pytest.mark.parametrize(
    ("status", "headers", "body", "message"),
    [
        (404, {}, b"", "status 404"),
        (200, {"Content-Type": "application/pdf"}, b"%PDF", "application/pdf"),
        (200, {"Content-Type": "text/html", "Content-Encoding": "br"}, b"x", "'br'"),
        (200, {"Content-Type": "text/html", "Content-Encoding": "gzip"}, b"not gzip", "not the gzip"),
    ],
)
def test_what_cannot_be_read_is_said(status, headers, body, message):
    with Site({"/x": (status, headers, body)}) as site:
        result = tool().run(f"{site.url}/x")
    assert not result.ok
    assert message in result.text


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_site_is_asked_again_by_the_pool(status):
    pages = {"/x": (status, {}, b"")}
    with Site(pages) as site:
        with pytest.raises(TransientToolError, match=str(status)):
            tool().run(f"{site.url}/x")

        def mend(handler):
            pages["/x"] = html()
            handler.send_response(status)
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        pages["/x"] = mend
        config = ToolsConfig(browser={"allow_private": True}, retry_delay_s=0.01)
        with open_pool(config) as pool:
            assert "333,000" in pool.submit(ToolCall("browser", f"{site.url}/x")).result(timeout=10).text


PRIVATE = [
    "http://127.0.0.1/",
    "http://localhost/",
    "http://[::1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0.0.0.0/",
    "http://10.0.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fd00::1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[2002:7f00:1::]/",
    "http://224.0.0.1/",
]


@pytest.mark.parametrize("url", PRIVATE)
def test_addresses_inside_are_refused(url):
    with pytest.raises(PageError, match="not a public address"):
        get(url, allow_private=False)


@pytest.mark.parametrize(
    "address",
    [
        "::127.0.0.1",
        "::ffff:0:127.0.0.1",
        "64:ff9b:1::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "fec0::1",
        "5f00::1",
        "3fff::1",
        "192.0.0.8",
        "192.88.99.1",
        "2002:7f00:1::",
        "2001:0:7f00:1::1",
    ],
)
def test_forms_that_carry_or_were_never_given_out_are_not_public(address):
    assert not is_public(address)


def test_open_addresses_are_public():
    assert all(map(is_public, ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")))


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://x/y",
        "http://",
        "x",
        "",
        "http://a:b@example.com/",
        "http://h:99999/",
        "http://[::1",
        "http://a b/",
    ],
)
def test_other_schemes_and_broken_addresses_are_refused(url):
    with pytest.raises(PageError):
        get(url)


def test_redirects_are_followed_and_each_is_checked(monkeypatch):
    def to(location):
        return 302, {"Location": location}, b""

    pages = {"/a": to("/b"), "/b": to("sun"), "/sun": html(), "/loop": to("/loop"), "/file": to("file:///etc/passwd")}
    with Site(pages) as site:
        assert get(f"{site.url}/a").url == f"{site.url}/sun"
        with pytest.raises(PageError, match="redirects more than 5"):
            get(f"{site.url}/loop")
        with pytest.raises(PageError, match="not an http or https"):
            get(f"{site.url}/file")
        pages["/inside"] = to(site.url.replace("127.0.0.1", "127.0.0.2") + "/sun")
        monkeypatch.setattr(web_page, "is_public", lambda address: address == "127.0.0.1")
        with pytest.raises(PageError, match=r"127\.0\.0\.2 is not a public address"):
            get(f"{site.url}/inside", allow_private=False)


def test_a_name_is_resolved_once_and_connected_to_what_was_checked(monkeypatch):
    answers = [["127.0.0.1"], ["127.0.0.2"]]
    with Site({"/sun": html()}) as site:
        monkeypatch.setattr(web_page, "_resolve", lambda host, port: answers.pop(0))
        monkeypatch.setattr(web_page, "is_public", lambda address: address == "127.0.0.1")
        url = site.url.replace("127.0.0.1", "changing.example") + "/sun"
        assert get(url, allow_private=False).content == ARTICLE.encode()
        assert len(answers) == 1
        with pytest.raises(PageError, match=r"changing\.example is not"):
            get(url, allow_private=False)


def test_a_name_with_one_private_address_is_refused(monkeypatch):
    monkeypatch.setattr(web_page, "_resolve", lambda host, port: ["8.8.8.8", "10.0.0.1"])
    with pytest.raises(PageError, match="not a public"):
        get("http://mixed.example/", allow_private=False)


def test_a_large_page_is_cut_and_a_compressed_bomb_too():
    bomb = gzip.compress(b"a" * (50 << 20))
    compressed = {"Content-Encoding": "gzip"}
    pages = {
        "/large": html(b"a" * 300_000),
        "/bomb": html(bomb, **compressed),
        "/gzip": html(gzip.compress(ARTICLE.encode()), **compressed),
        "/deflate": html(zlib.compress(ARTICLE.encode()), **{"Content-Encoding": "deflate"}),
    }
    with Site(pages) as site:
        assert len(get(f"{site.url}/large", max_bytes=1000).content) == 1000
        assert len(get(f"{site.url}/bomb", max_bytes=1000).content) == 1000
        for name in ("gzip", "deflate"):
            assert get(f"{site.url}/{name}").content == ARTICLE.encode()


def test_a_site_that_drips_is_left(monkeypatch):
    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"a")
            handler.wfile.flush()
            time.sleep(0.05)

    with Site({"/x": drip}) as site:
        start = time.monotonic()
        with pytest.raises(TransientToolError, match="ReadTimeout"):
            get(f"{site.url}/x", timeout_s=0.3)
        assert time.monotonic() - start < 3


def test_a_site_that_is_away_is_a_transient_fault():
    with Site({}) as site:
        url = site.url
    with pytest.raises(TransientToolError, match="cannot be read"):
        get(url)


def test_windows_take_what_matches_in_the_order_of_the_text():
    filler = "lorem ipsum dolor sit amet " * 40
    text = (
        f"{filler}The mass of bornak is 12. {filler}{filler}Nothing of note. {filler}bornak was found in 1840. {filler}"
    )
    found = windows(text, "bornak mass", window_chars=200, max_chars=600)
    assert found.index("mass of bornak is 12") < found.index("found in 1840")
    assert "Nothing of note" not in found
    assert len(found) <= 600 + 2 * len("\n…\n") + 2
    assert found.startswith("…")
    assert found.endswith("…")


def test_windows_without_a_match_are_the_beginning_and_short_texts_are_whole():
    text = "abc " * 1000
    assert windows(text, "zzz", window_chars=100, max_chars=50) == text[:50] + "…"
    assert windows(text, "", window_chars=100, max_chars=50) == text[:50] + "…"
    assert windows("short", "zzz", window_chars=100, max_chars=50) == "short"


@pytest.mark.parametrize("window_chars", [1, 7, 100, 5000])
@pytest.mark.parametrize("max_chars", [1, 50, 3000])
def test_windows_stay_within_their_limit(window_chars, max_chars):
    text = "alpha beta gamma İstanbul " * 200
    found = windows(text, "gamma İstanbul", window_chars=window_chars, max_chars=max_chars)
    assert len(found.replace("\n…\n", "").strip("…")) <= max_chars


def chat(text):
    return 200, {"Content-Type": "application/json"}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def test_a_summarizer_gets_the_passages_and_its_words_are_the_answer(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with Site({"/sun": html(), "/v1/chat/completions": chat(" 333,000 earths ")}) as site:
        made = tool(summarizer={"url": f"{site.url}/v1/", "model": "m", "key_variable": "MY_KEY"})
        assert made.run(f"{site.url}/sun\nmass of {{the}} sun").text == "333,000 earths"
        made.close()
        _, headers, body = site.requests[1]
    asked = json.loads(body)
    assert headers["Authorization"] == "Bearer secret"
    assert asked["model"] == "m"
    assert "mass of {the} sun" in asked["messages"][0]["content"]
    assert "333,000 times" in asked["messages"][0]["content"]


@pytest.mark.parametrize(
    ("answer", "message"), [((401, {}, b""), "status 401"), ((200, {}, b"{}"), "chat completions")]
)
def test_a_summarizer_that_refuses_is_said(answer, message):
    with Site({"/sun": html(), "/v1/chat/completions": answer}) as site:
        result = tool(summarizer={"url": f"{site.url}/v1", "model": "m"}).run(f"{site.url}/sun x")
    assert not result.ok
    assert message in result.text


def test_a_page_without_text_and_a_call_without_address():
    with Site({"/e": html("<html><body></body></html>")}) as site:
        result = tool().run(f"{site.url}/e")
    assert (result.ok, result.text) == (True, "the page holds no text")
    assert not tool().run(" \n ").ok


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trafilatura", None)
    with pytest.raises(ToolError, match=r"arpo-ext\[browser\]"):
        BrowserTool(BrowserToolConfig()).start()


def test_an_address_with_other_letters_is_fetched_and_redirected_to():
    pages = {"/K%C3%B6ln?q=%C3%BC": html()}
    with Site(pages) as site:
        pages["/old"] = (302, {"Location": f"{site.url}/K\u00f6ln?q=\u00fc".encode().decode("latin-1")}, b"")
        for path in ("/K\u00f6ln?q=\u00fc", "/old", "/K%C3%B6ln?q=%C3%BC#part"):
            assert "333,000" in tool().run(f"{site.url}{path}").text


@pytest.mark.parametrize(
    "url", ["http://\u2460\u2461\u2466.0.0.1/", "http://127\u30020\u30020\u30021/", "http://0x7f.1/"]
)
def test_no_way_of_writing_an_inside_address_leads_inside(url):
    with pytest.raises(PageError, match="not a public"):
        get(url, allow_private=False)


def test_a_host_that_has_no_ascii_form_is_no_address():
    with pytest.raises(PageError, match="not an address"):
        get("http://\u00fc" + "a" * 70 + "/")


def test_a_server_that_drips_its_headers_is_given_up_in_time():
    def drip(handler):
        for _ in range(100):
            try:
                handler.wfile.write(b"H")
                handler.wfile.flush()
            except OSError:
                return
            time.sleep(0.1)

    with Site({"/drip": drip}) as site:
        start = time.monotonic()
        with pytest.raises(TransientToolError):
            get(f"{site.url}/drip", timeout_s=0.5)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("charset", ["hex", "idna", "undefined", "no-such"])
def test_a_charset_that_is_none_is_read_as_utf_8(charset):
    with Site({"/t": (200, {"Content-Type": f"text/plain; charset={charset}"}, "caf\u00e9".encode())}) as site:
        assert tool().run(f"{site.url}/t").text == "caf\u00e9"


def test_a_query_of_very_many_words_takes_no_time():
    text = "alpha beta " * 50_000
    start = time.process_time()
    windows(text, " ".join(f"word{i}" for i in range(5000)), window_chars=1000, max_chars=6000)
    assert time.process_time() - start < 2


def test_of_a_long_page_the_beginning_is_read(monkeypatch):
    monkeypatch.setattr(page_text, "_HTML_BYTES", 5000)
    body = b"<html><body><article><p>The first words of it.</p>" + b"<p>and many more words</p>" * 500
    text = page_text.extract_text(web_page.Page("http://x/", body, "text/html", None))
    assert "The first words" in text
    assert len(text) < 5000
