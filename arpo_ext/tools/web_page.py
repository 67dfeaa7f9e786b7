"""Fetches one web page for a model that chose the address: size, time and reach are limited.

Only http and https, only public addresses unless told otherwise. The address a name stands for is checked where the
connection is made, so neither a redirect nor a name server that changes its answer leads inside.

What it leaves out: cookies, forms, scripts, proxies, documents other than HTML and text.
"""

from __future__ import annotations

import ipaddress
import socket
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from arpo_ext.errors import ToolError, TransientToolError

if TYPE_CHECKING:
    import httpcore

_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BUSY = frozenset({408, 425, 429})
_TEXT_TYPES = ("text/", "application/xhtml", "application/json", "application/xml")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class PageError(Exception):
    """The page cannot be had, in words for the model."""


@dataclass(frozen=True, slots=True)
class Page:
    """url: where redirects led. content: at most `max_bytes`, decompressed. content_type: lower case, "" if unknown."""

    url: str
    content: bytes
    content_type: str
    charset: str | None


def fetch(url: str, *, timeout_s: float, max_bytes: int, allow_private: bool = False) -> Page:
    """GET `url`. PageError if that cannot be, TransientToolError if it may be later."""
    import httpcore

    deadline = time.monotonic() + timeout_s
    with httpcore.ConnectionPool(network_backend=_backend(allow_private), max_connections=1) as pool:
        for _ in range(_MAX_REDIRECTS + 1):
            _check_url(url)
            try:
                with pool.stream("GET", url, headers=_HEADERS, extensions=_timeouts(deadline)) as response:
                    location = _header(response.headers, b"location")
                    if response.status not in _REDIRECTS or not location:
                        return _read(url, response, deadline, max_bytes)
            except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
                raise TransientToolError(f"{url} cannot be read: {type(error).__name__}: {error}") from None
            except (httpcore.UnsupportedProtocol, UnicodeError, ValueError) as error:
                raise PageError(f"{url} is not an address that can be fetched: {error}") from None
            url = urljoin(url, location)
    raise PageError(f"the page redirects more than {_MAX_REDIRECTS} times")


# The server is asked not to compress; one that does so anyway is read with the same limit on what comes out.
_HEADERS = {"User-Agent": "arpo-ext", "Accept": "text/html,text/plain;q=0.9,*/*;q=0.1", "Accept-Encoding": "identity"}


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise PageError(f"{url} is not an address: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PageError(f"{url} is not an http or https address")
    if parts.username is not None or parts.password is not None:
        raise PageError(f"{url} holds a user name; expected an address without")


def _timeouts(deadline: float) -> dict[str, Any]:
    rest = max(deadline - time.monotonic(), 1e-3)
    return {"timeout": {"connect": rest, "read": rest, "write": rest, "pool": rest}}


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in headers if key.lower() == name), "")


def _read(url: str, response: httpcore.Response, deadline: float, max_bytes: int) -> Page:
    if response.status in _BUSY or response.status >= 500:
        raise TransientToolError(f"{url} answered with status {response.status}")
    if response.status != 200:
        raise PageError(f"{url} answered with status {response.status}")
    kind, _, parameters = _header(response.headers, b"content-type").partition(";")
    kind = kind.strip().lower()
    if kind and not kind.startswith(_TEXT_TYPES):
        raise PageError(f"{url} is {kind}; only HTML and text can be read")
    decode = _decoder(url, _header(response.headers, b"content-encoding").strip().lower())
    content = b""
    for chunk in response.iter_stream():
        content += decode(chunk, max_bytes - len(content))
        if len(content) >= max_bytes:
            break
        # Each read waits anew for its timeout: a server that drips bytes is stopped here.
        if time.monotonic() > deadline:
            raise TransientToolError(f"{url} did not arrive in time")
    charset = next(
        (p.split("=", 1)[1].strip(" \"'") for p in parameters.split(";") if p.strip().startswith("charset=")), None
    )
    return Page(url, content[:max_bytes], kind, charset)


def _decoder(url: str, encoding: str) -> Any:
    if encoding in ("", "identity"):
        return lambda chunk, _room: chunk
    if encoding in ("gzip", "deflate"):
        inflate = zlib.decompressobj(wbits=47 if encoding == "gzip" else 15)

        def decode(chunk: bytes, room: int) -> bytes:
            try:
                return inflate.decompress(inflate.unconsumed_tail + chunk, max(room, 1))
            except zlib.error as error:
                raise PageError(f"{url} is not the {encoding} it says it is: {error}") from None

        return decode
    raise PageError(f"{url} is compressed as {encoding!r}, which cannot be read")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open Internet, also once unwrapped from IPv6 forms that carry an IPv4."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        carried = [ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            carried.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if not all(is_public(str(inner)) for inner in carried if inner is not None):
            return False
    return ip.is_global and not ip.is_multicast


def _backend(allow_private: bool) -> httpcore.NetworkBackend:
    import httpcore

    class PublicOnly(httpcore.NetworkBackend):
        """Resolves a name once, checks what it stands for, and connects to just that."""

        def __init__(self) -> None:
            self._inner = httpcore.SyncBackend()

        def connect_tcp(
            self,
            host: str,
            port: int,
            timeout: float | None = None,
            local_address: str | None = None,
            socket_options: Any = None,
        ) -> httpcore.NetworkStream:
            addresses = _resolve(host, port)
            if not allow_private and not all(map(is_public, addresses)):
                raise PageError(f"{host} is not a public address")
            failure: Exception | None = None
            for address in addresses:
                try:
                    return self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
                except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                    failure = error
            assert failure is not None
            raise failure

        def sleep(self, seconds: float) -> None:
            time.sleep(seconds)

    return PublicOnly()


def _resolve(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise TransientToolError(f"the name {host} cannot be resolved now: {error.strerror}") from None
        raise PageError(f"there is no host named {host}") from None
    except UnicodeError:
        raise PageError(f"{host!r} is not a host name") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def extract_text(page: Page) -> str:
    """The readable text of a page, by the trafilatura library; plain text as it is. "" if there is none."""
    if page.content_type and not page.content_type.startswith(("text/html", "application/xhtml")):
        try:
            return page.content.decode(page.charset or "utf-8", errors="replace")
        except LookupError:
            return page.content.decode("utf-8", errors="replace")
    try:
        import trafilatura
    except ImportError:
        raise ToolError("the browser tool needs the trafilatura library: pip install 'arpo-ext[browser]'") from None
    return trafilatura.extract(page.content, include_comments=False, include_tables=True, favor_recall=True) or ""


_Window = tuple[int, int]


def windows(text: str, query: str, *, window_chars: int, max_chars: int) -> str:
    """The parts of `text` that share most words with `query`, in the order of the text, at most `max_chars` in all.

    Windows of `window_chars` start at every half window; the best ones by distinct words of the query, then by how many
    they hold, are kept, neighbours joined. Without a query, or where no word occurs, the beginning.
    """
    if len(text) <= max_chars:
        return text
    words = {word for word in query.casefold().split() if len(word) > 2}
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
