"""Fetches one web page for a model that chose the address: size, time and reach are limited.

Only http and https, only public addresses unless told otherwise. The address a name stands for is checked where the
connection is made, so neither a redirect nor a name server that changes its answer leads inside.

What it leaves out: cookies, forms, scripts, proxies, documents other than HTML and text.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from arpo_ext.errors import TransientToolError

if TYPE_CHECKING:
    import httpcore

_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BUSY = frozenset({408, 425, 429})
_TEXT_TYPES = ("text/", "application/xhtml", "application/json", "application/xml")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Where IPv6 has addresses of the open Internet at all; elsewhere are forms that carry IPv4 and what is not given out.
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
# Not global, though `ipaddress` of some Python versions says so: protocol assignments, 6to4 relays, documentation.
_NEVER_PUBLIC = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")))
# What stays as it is in a path or query; the rest is percent-encoded.
_URL_SAFE = "%/:=&?~#+!$,;'@()*[]|"


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
    with httpcore.ConnectionPool(network_backend=_backend(allow_private, deadline), max_connections=1) as pool:
        for _ in range(_MAX_REDIRECTS + 1):
            _check_url(url)
            try:
                with pool.stream("GET", _ascii(url), headers=_HEADERS, extensions=_timeouts(deadline)) as response:
                    location = _header(response.headers, b"location")
                    if response.status not in _REDIRECTS or not location:
                        return _read(url, response, max_bytes)
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


def _ascii(url: str) -> str:
    """The address as it goes over the wire: host in IDNA form, other characters percent-encoded. UnicodeError if the
    host has none."""
    parts = urlsplit(url)
    host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()
    place = f"[{host}]" if ":" in host else host
    path, query = (quote(part, safe=_URL_SAFE) for part in (parts.path or "/", parts.query))
    return urlunsplit((parts.scheme, place if parts.port is None else f"{place}:{parts.port}", path, query, ""))


def _timeouts(deadline: float) -> dict[str, Any]:
    rest = max(deadline - time.monotonic(), 1e-3)
    return {"timeout": {"connect": rest, "read": rest, "write": rest, "pool": rest}}


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str:
    value = next((value for key, value in headers if key.lower() == name), b"")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _read(url: str, response: httpcore.Response, max_bytes: int) -> Page:
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
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        carried = [inner for inner in (ip.sixtofour, *(ip.teredo or ())) if inner is not None]
        if ip not in _GLOBAL_UNICAST or not all(is_public(str(inner)) for inner in carried):
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _NEVER_PUBLIC)


def _backend(allow_private: bool, deadline: float) -> httpcore.NetworkBackend:
    import httpcore

    class Timed(httpcore.NetworkStream):
        """A stream whose reads and writes all end at the deadline, also where a server drips bytes."""

        def __init__(self, inner: httpcore.NetworkStream) -> None:
            self._inner = inner

        def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
            return self._inner.read(max_bytes, self._rest(httpcore.ReadTimeout))

        def write(self, buffer: bytes, timeout: float | None = None) -> None:
            self._inner.write(buffer, self._rest(httpcore.WriteTimeout))

        def start_tls(
            self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
        ) -> httpcore.NetworkStream:
            return Timed(self._inner.start_tls(ssl_context, server_hostname, self._rest(httpcore.ConnectTimeout)))

        def get_extra_info(self, info: str) -> Any:
            return self._inner.get_extra_info(info)

        def close(self) -> None:
            self._inner.close()

        def _rest(self, error: type[Exception]) -> float:
            rest = deadline - time.monotonic()
            if rest <= 0:
                raise error("the time for the page is over")
            return rest

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
                    return Timed(self._inner.connect_tcp(address, port, timeout, local_address, socket_options))
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
