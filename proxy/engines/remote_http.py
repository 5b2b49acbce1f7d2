"""The way to a server. The only file that imports httpcore: its exceptions end here.

httpcore is httpx without what would have to be switched off here (cookies, redirects, settings from
the environment, content encodings) and without what that costs each request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import anyio
import httpcore

from proxy.engines.base import EngineCrashed, EngineUnavailable

HEADERS = {
    "accept": "text/event-stream, application/json",
    "accept-encoding": "identity",
    "content-type": "application/json",
    "user-agent": "chatfold",
}
"""Sent with each request. Of a client's own headers only those follow that a caller of `exchange`
names: a key, a conversation."""

KEPT_CONNECTIONS = 32
KEPT_S = 4.0
"""Shorter than llama-server's and uvicorn's five seconds: a connection is rarely found closed."""
MAX_BODY_BYTES = 16 << 20

BROKEN_OFF = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol)
SAFE = "/%:@!$&'()*+,;=~"
"""What may stand in a path as it is (RFC 3986), besides letters and digits."""


class Unreachable(EngineUnavailable):
    """There is no connection to the server."""


class Answer:
    """A response whose headers were read. Good inside the block of `Http.exchange` only."""

    def __init__(self, response: httpcore.Response, http: Http) -> None:
        self._response = response
        self._http = http

    @property
    def status(self) -> int:
        return self._response.status

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes. Raises EngineUnavailable, EngineCrashed when it breaks off."""
        with self._http.translated():
            async for data in self._response.aiter_stream():
                yield data

    async def body(self) -> bytes:
        """The body, or its beginning where it is very long."""
        body = bytearray()
        async with aclosing(self.chunks()) as received:
            async for data in received:
                body += data
                if len(body) >= MAX_BODY_BYTES:
                    break
        return bytes(body)


class Http:
    """One client for one server. `shown` names the server in errors; waits are seconds.

    Nothing limits how many exchanges run at once: that is for the caller.
    """

    def __init__(self, *, shown: str, connect_s: float, read_s: float, key: str = "") -> None:
        self._shown = shown
        self._headers = HEADERS | (bearer(key) if key else {})
        self._timeouts = {"connect": connect_s, "read": read_s, "write": read_s, "pool": connect_s}
        self._ssl = httpcore.default_ssl_context()
        self._pool = self._open_pool(kept=KEPT_CONNECTIONS)
        self._fresh = self._open_pool(kept=0)

    def __repr__(self) -> str:
        return f"<Http {self._shown} open={self.n_open}>"

    @property
    def n_open(self) -> int:
        """Exchanges that the pools believe to be under way."""
        return sum(len(pool._requests) for pool in (self._pool, self._fresh))

    def _open_pool(self, *, kept: int) -> httpcore.AsyncConnectionPool:
        # Without a limit on connections: with one, the pool loses its places to requests that are
        # cancelled (httpcore #1093).
        return httpcore.AsyncConnectionPool(
            ssl_context=self._ssl,
            max_connections=None,
            max_keepalive_connections=kept,
            keepalive_expiry=KEPT_S,
        )

    async def aclose(self) -> None:
        await self._pool.aclose()
        await self._fresh.aclose()

    @asynccontextmanager
    async def exchange(
        self,
        method: str,
        url: str,
        content: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Answer]:
        """Sends a request. Leaving the block, or being cancelled anywhere, closes the connection
        at once unless the answer was read to its end. Raises Unreachable, EngineUnavailable,
        EngineCrashed."""
        response = await self._open(self._request(method, url, content, headers or {}))
        try:
            yield Answer(response, self)
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()

    def _request(
        self, method: str, url: str, content: bytes | None, headers: Mapping[str, str]
    ) -> httpcore.Request:
        target, host = address(url)
        sent = {"host": host, **self._headers, **headers}
        if content is not None:
            sent["content-length"] = str(len(content))
        return httpcore.Request(
            method,
            target,
            headers=[(name.encode(), header(value)) for name, value in sent.items()],
            content=content,
            extensions={"timeout": self._timeouts},
        )

    async def _open(self, request: httpcore.Request) -> httpcore.Response:
        """When a kept connection turns out to be closed, the request is sent once more on a fresh
        one: llama-server closes idle ones without a word. Nothing was received then, so that
        nobody is given anything twice."""
        with self.translated():
            connected = _Connected()
            request.extensions["trace"] = connected.trace
            try:
                return await self._pool.handle_async_request(request)
            except (httpcore.RemoteProtocolError, httpcore.ReadError, httpcore.WriteError):
                if connected:
                    raise
            return await self._fresh.handle_async_request(request)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """The one place where httpcore's exceptions become the engine's."""
        shown = self._shown
        try:
            yield
        except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
            raise Unreachable(f"The upstream server {shown} cannot be reached.") from exc
        except httpcore.TimeoutException as exc:
            raise EngineUnavailable(f"The upstream server {shown} does not answer.") from exc
        except BROKEN_OFF as exc:
            raise EngineCrashed(f"The upstream server {shown} broke off the connection.") from exc


class _Connected:
    """True once a request had to open a connection. `trace` is a trace function of httpcore."""

    def __init__(self) -> None:
        self._connected = False

    def __bool__(self) -> bool:
        return self._connected

    async def trace(self, event: str, info: dict[str, Any]) -> None:
        self._connected = self._connected or event == "connection.connect_tcp.started"


@lru_cache(maxsize=64)
def address(url: str) -> tuple[httpcore.URL, str]:
    """Where a request goes, and its host header."""
    parts = urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path = quote(parts.path, safe=SAFE)
    return httpcore.URL(urlunsplit(parts._replace(netloc=host, path=path))), host


def header(value: str) -> bytes:
    """A client's key goes on as the bytes that came: Starlette reads headers as latin-1."""
    try:
        return value.encode("latin-1")
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogatepass")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
