"""The one way out to other hosts: to origins that the operator named, at addresses that were checked, within limits.

A URL is read once: what was compared with the operator's list is what is looked up, and the address that was checked is
the one that is connected to. So neither two readings of one text nor a name that changes its address (DNS rebinding)
leads anywhere else. The name stays in the Host header and in TLS. No proxy of the environment is used; through one that
the operator named, names are looked up there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import os
import re
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import httpx

from diffusion_api.errors import Misconfigured, Unreachable, UrlRefused

log = logging.getLogger(__name__)

CONNECT = 5.0
"""Seconds for one connection."""

TOTAL = 10.0
"""Seconds for one request, from the look-up of the name to the head of the answer."""

MAX_URL = 2000

MAX_LOCATION = 16_000
"""Characters of a URL that a host redirects to; those of signed storage are long."""

REDIRECTS = 3
"""So many in a row are followed by what fetches."""

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver: TypeAlias = Callable[[str, int], Sequence[str]]
"""Host and port → addresses. May block; raises OSError."""

Value = TypeVar("Value")

PORTS = {"https": 443, "http": 80}

# What is not public, after IANA's special-purpose registries. Python's is_global differs between its releases, and
# knows neither multicast nor the address at which one cloud serves its metadata amid public ones.
_CLOSED = tuple(
    (kind, ipaddress.ip_network(network))
    for kind, network in (
        ("unspecified", "0.0.0.0/8"),
        ("private", "10.0.0.0/8"),
        ("shared", "100.64.0.0/10"),  # carrier-grade NAT
        ("loopback", "127.0.0.0/8"),
        ("cloud metadata", "168.63.129.16/32"),
        ("link-local", "169.254.0.0/16"),  # the metadata of most clouds too
        ("private", "172.16.0.0/12"),
        ("reserved", "192.0.0.0/24"),
        ("documentation", "192.0.2.0/24"),
        ("reserved", "192.88.99.0/24"),
        ("private", "192.168.0.0/16"),
        ("benchmark", "198.18.0.0/15"),
        ("documentation", "198.51.100.0/24"),
        ("documentation", "203.0.113.0/24"),
        ("multicast", "224.0.0.0/4"),
        ("reserved", "240.0.0.0/4"),
        ("unspecified", "::/128"),
        ("loopback", "::1/128"),
        ("IPv4-mapped", "::ffff:0:0/96"),
        ("reserved", "2001::/23"),  # Teredo and other protocols
        ("documentation", "2001:db8::/32"),
        ("6to4", "2002::/16"),
        ("documentation", "3fff::/20"),
        ("private", "fc00::/7"),
        ("link-local", "fe80::/10"),
        ("multicast", "ff00::/8"),
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
_PERMITTED_BY_NAME = ("private", "shared", "loopback")

_HOST_NAME = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")


class Origin(NamedTuple):
    """Where a URL leads: scheme, host (a name in ASCII, or an address) and port."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        """The origin as a URL, its port always written."""
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def origins(text: str) -> tuple[Origin, ...]:
    """The operator's list of allowed origins: entries ``[scheme://]host[:port]``, separated by commas.

    Without a scheme a name means https; a private address means https and http, and naming it is the permission to call
    it. Without a port the scheme's own is meant. Raises Misconfigured.
    """
    return tuple(origin for entry in text.split(",") if entry.strip() for origin in _entry(entry.strip()))


def origin_of(url: str) -> Origin:
    """Where the operator's own URL leads. It may have any name, for it is to be called by a fetcher that is ``trusted``.

    Raises Misconfigured.
    """
    try:
        origin = _origin(httpx.URL(url))
    except httpx.InvalidURL as error:
        raise Misconfigured(f"{url!r} is no URL: {error}") from error
    if origin.scheme not in PORTS or not origin.host:
        raise Misconfigured(f"{url!r} leads nowhere: write http://host:port")
    return origin


def closed(address: Address) -> str | None:
    """Why an address is not called: its kind, None for a public one."""
    if address in _NAT64:
        return closed(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    for kind, network in _CLOSED:
        if address in network:
            return kind
    return "reserved" if address.version == 6 and address not in _PUBLIC_IPV6 else None


def masked(url: str) -> str:
    """What may be shown of a URL that was checked: without the values of its query, which are often credentials."""
    read = httpx.URL(url)
    query = read.query.decode()
    hidden = "&".join(
        f"{name}=***" if equals else "***" for name, equals, _ in (p.partition("=") for p in query.split("&"))
    )
    return str(read.copy_with(query=None, fragment=None)) + (f"?{hidden}" if query else "")


def system_addresses(host: str, port: int) -> list[str]:
    """What the system's resolver knows, in its order of preference. Blocks; raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Fetcher:
    """Sends requests to the origins in ``allowed``, with ``public`` also by https to any name whose addresses are public.
    Certificates are checked against Mozilla's list unless ``tls`` is given. With ``trusted`` names may lead to any address:
    those of ``allowed`` are the operator's own hosts.

    ``connect`` and ``total`` are seconds, see :data:`CONNECT` and :data:`TOTAL`. ``proxy`` is the URL of one, ``setting`` where
    the operator allows more.
    """

    def __init__(
        self,
        allowed: Sequence[Origin],
        *,
        public: bool = False,
        trusted: bool = False,
        proxy: str | None = None,
        setting: str | None = None,
        resolve: Resolver = system_addresses,
        tls: ssl.SSLContext | None = None,
        connect: float = CONNECT,
        total: float = TOTAL,
    ) -> None:
        self._allowed, self._public, self._trusted = allowed, public, trusted
        self._proxy, self._setting = proxy, setting
        self._resolve = resolve
        self._tls = tls or httpx.create_ssl_context(trust_env=False)
        self._total = total
        self._timeout = httpx.Timeout(total, connect=connect)

    def check(self, url: str, *, field: str) -> Origin:
        """Where a caller's URL leads. Raises UrlRefused, which names ``field`` and what is allowed."""
        return self._checked(_read(url, field=field), field=field)

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], *, field: str) -> int:
        """The status of the answer to a POST; redirects are not followed and the answer's body is not read.

        Raises UrlRefused, and Unreachable when there was no answer.
        """
        target = _read(url, field=field)
        try:
            async with (
                asyncio.timeout(self._total),
                self._client(field) as client,
                client.stream("POST", target, content=body, headers={**headers, "Connection": "close"}) as response,
            ):
                return response.status_code
        except TimeoutError as error:
            raise Unreachable(f"no answer within {self._total:g} s") from error
        except (httpx.TransportError, OSError) as error:
            raise Unreachable(_reason(error)) from error

    @contextlib.asynccontextmanager
    async def get(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        field: str,
        secrets: Mapping[str, str] | None = None,
        longest: int = MAX_URL,
    ) -> AsyncIterator[httpx.Response]:
        """The answer to a GET, whose body is still to be read as it comes (``aiter_raw``): a pause of ``total`` seconds ends
        it. Redirects are followed, each checked like the first; ``secrets`` are headers for the first origin alone, ``longest``
        the characters that the URL may have.

        Raises UrlRefused, and Unreachable, also while the body is read.
        """
        target = _read(url, field=field, longest=longest)
        first = _origin(target)
        async with self._client(field) as client, contextlib.AsyncExitStack() as opened:
            for _ in range(REDIRECTS + 1):
                extra = secrets if secrets and _origin(target) == first else {}
                request = client.build_request(
                    "GET", target, headers={**headers, **extra, "Accept-Encoding": "identity"}
                )
                try:
                    async with asyncio.timeout(self._total):
                        response = await client.send(request, stream=True)
                except TimeoutError as error:
                    raise Unreachable(f"no answer within {self._total:g} s") from error
                except (httpx.TransportError, OSError) as error:
                    raise Unreachable(_reason(error)) from error
                opened.push_async_callback(response.aclose)
                if not response.has_redirect_location:
                    break
                target = _read(str(target.join(response.headers["location"])), field=field, longest=MAX_LOCATION)
            else:
                raise UrlRefused(f"{field} leads on and on: more than {REDIRECTS} redirects", field=field)
            try:
                yield response
            except httpx.TransportError as error:
                raise Unreachable(_reason(error)) from error

    @contextlib.asynccontextmanager
    async def _client(self, field: str) -> AsyncIterator[httpx.AsyncClient]:
        """A client that goes nowhere but where this fetcher may."""
        async with (
            httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False, proxy=self._proxy) as inner,
            httpx.AsyncClient(
                transport=_Checked(inner, lambda where: self._addresses(self._checked(where, field=field))),
                trust_env=False,
                timeout=self._timeout,
            ) as client,
        ):
            yield client

    def _checked(self, url: httpx.URL, *, field: str) -> Origin:
        origin = _origin(url)
        by_name = origin.scheme == "https" and _HOST_NAME.fullmatch(origin.host)
        if origin not in self._allowed and not (self._public and by_name):
            choices = ", ".join([*map(str, self._allowed), *["https:// and a public name"][: self._public]])
            more = f"; the operator can allow more: {self._setting}" if self._setting else ""
            raise UrlRefused(f"{field} leads to {str(origin)[:100]}; allowed: {choices}{more}", field=field)
        return origin

    async def _addresses(self, origin: Origin) -> list[str]:
        """Where to connect. One address that is not public is enough to call none: such a name is not to be trusted."""
        if _literal(origin.host) or self._proxy:
            return [origin.host]
        try:
            found = await _in_thread(lambda: self._resolve(origin.host, origin.port))
        except OSError as error:
            raise Unreachable(f"the name {origin.host} cannot be looked up; is this machine online?") from error
        for text in found if not self._trusted else ():
            address = _literal(text)
            kind = closed(address) if address else "no address"
            if kind:
                log.warning("%s is not called: its name leads to %s (%s)", origin, text, kind)
                raise Unreachable("its name leads to no address that may be called")
        return list(found)


class _Checked(httpx.AsyncBaseTransport):
    """Asks where a request may go just before it goes, and connects nowhere else."""

    def __init__(
        self, inner: httpx.AsyncBaseTransport, addresses: Callable[[httpx.URL], Awaitable[Sequence[str]]]
    ) -> None:
        self._inner, self._addresses = inner, addresses

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send to the first address that can be connected to."""
        failure: httpx.TransportError = httpx.ConnectError("its name has no address")
        for address in await self._addresses(request.url):
            try:
                return await self._inner.handle_async_request(_pinned(request, address))
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure


def _pinned(request: httpx.Request, address: str) -> httpx.Request:
    """The same request to an address: its Host header is written already, and TLS is told the name."""
    return httpx.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": request.url.raw_host.decode()},
    )


def _read(url: str, *, field: str, longest: int = MAX_URL) -> httpx.URL:
    if len(url) > longest:
        raise UrlRefused(f"{field} has {len(url)} characters; at most {longest} are allowed", field=field)
    try:
        read = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UrlRefused(f"{field} is no URL: {error}", field=field) from error
    if read.userinfo:
        raise UrlRefused(f"{field} holds a user name or password; leave them out", field=field)
    return read


def _origin(url: httpx.URL) -> Origin:
    host = url.raw_host.decode()
    port = PORTS.get(url.scheme, 0) if url.port is None else url.port
    return Origin(url.scheme, str(_literal(host) or host), port)


def _literal(host: str) -> Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)
    return None


def _entry(text: str) -> list[Origin]:
    """The origins that one entry of the operator's list allows."""
    try:
        url = httpx.URL(text if "://" in text else f"https://{text}")
    except httpx.InvalidURL as error:
        raise Misconfigured(f"allowed host {text!r}: {error}") from error
    origin = _origin(url)
    if origin.scheme not in PORTS or url.raw_path != b"/" or url.userinfo or url.fragment:
        raise Misconfigured(f"allowed host {text!r}: write host, host:port, or either with http:// or https:// before")
    address = _literal(origin.host)
    kind = closed(address) if address else None
    if kind and kind not in _PERMITTED_BY_NAME:
        raise Misconfigured(f"allowed host {text!r}: {kind} addresses are never called")
    if not address and not _HOST_NAME.fullmatch(origin.host):
        raise Misconfigured(
            f"allowed host {text!r}: a name has at least one dot, as names must lead to public addresses; "
            "for a private receiver write its address, such as http://127.0.0.1:9000"
        )
    if kind and "://" not in text:
        return [origin, Origin("http", origin.host, url.port or PORTS["http"])]
    return [origin]


async def _in_thread(work: Callable[[], Value]) -> Value:
    """What blocking work returns. Nobody waits for its thread, neither a cancelled request nor the end of the process."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Value] = loop.create_future()

    def settle(tell: Callable[[], None]) -> None:
        if not result.done():
            tell()

    def run() -> None:
        try:
            value = work()
        except Exception as error:  # it belongs to whoever awaits, in another thread
            tell = functools.partial(result.set_exception, error)
        else:
            tell = functools.partial(result.set_result, value)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, tell)

    threading.Thread(target=run, daemon=True, name="look-up").start()
    return await result


def _reason(error: BaseException) -> str:
    """A failed connection in words that hold no address and no path."""
    if isinstance(error, httpx.ConnectTimeout):
        return "no connection in time"
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not valid: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed: {cause.reason}"
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno).lower()
        cause = cause.__cause__ or cause.__context__
    return "the answer was no HTTP" if isinstance(error, httpx.ProtocolError) else "the connection failed"
