"""The way to a server. The only file that imports httpx: its exceptions end here."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import anyio
import httpx

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


class Unreachable(EngineUnavailable):
    """There is no connection to the server."""


class Answer:
    """A response whose headers were read. Good inside the block of `Http.exchange` only."""

    def __init__(self, response: httpx.Response, http: Http) -> None:
        self._response = response
        self._http = http

    @property
    def status(self) -> int:
        return self._response.status_code

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes. Raises EngineUnavailable, EngineCrashed when it breaks off."""
        with self._http.translated():
            async for data in self._response.aiter_bytes():
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
        self._timeout = httpx.Timeout(connect=connect_s, read=read_s, write=read_s, pool=connect_s)
        self._client = self._open_client(kept=KEPT_CONNECTIONS)
        self._fresh = self._open_client(kept=0)

    def __repr__(self) -> str:
        return f"<Http {self._shown} open={self.n_open}>"

    @property
    def n_open(self) -> int:
        """Exchanges that the pools believe to be under way."""
        pools = (client._transport._pool for client in (self._client, self._fresh))  # type: ignore[attr-defined]
        return sum(len(pool._requests) for pool in pools)

    def _open_client(self, *, kept: int) -> httpx.AsyncClient:
        # Without a limit on connections: with one, the pool loses its places to requests that are
        # cancelled (httpcore #1093). Cookies of answers are thrown away.
        return httpx.AsyncClient(
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=kept, keepalive_expiry=KEPT_S
            ),
            timeout=self._timeout,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            trust_env=False,
            follow_redirects=False,
        )

    async def aclose(self) -> None:
        await self._client.aclose()
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
        # Not `client.build_request`: that would add cookies and the client's default headers.
        request = httpx.Request(
            method, url, content=content, headers={**self._headers, **(headers or {})}
        )
        response = await self._open(request)
        try:
            yield Answer(response, self)
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()

    async def _open(self, request: httpx.Request) -> httpx.Response:
        """When a kept connection turns out to be closed, the request is sent once more on a fresh
        one: llama-server closes idle ones without a word. Nothing was received then, so that
        nobody is given anything twice."""
        with self.translated():
            connected = _Connected()
            request.extensions["trace"] = connected.trace
            try:
                return await self._client.send(request, stream=True)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                if connected:
                    raise
            return await self._fresh.send(request, stream=True)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """The one place where httpx's exceptions become the engine's."""
        shown = self._shown
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            raise Unreachable(f"The upstream server {shown} cannot be reached.") from exc
        except httpx.TimeoutException as exc:
            raise EngineUnavailable(f"The upstream server {shown} does not answer.") from exc
        except httpx.RequestError as exc:
            raise EngineCrashed(f"The upstream server {shown} broke off the connection.") from exc


class _Connected:
    """True once a request had to open a connection. `trace` is a trace function of httpcore."""

    def __init__(self) -> None:
        self._connected = False

    def __bool__(self) -> bool:
        return self._connected

    async def trace(self, event: str, info: dict[str, Any]) -> None:
        self._connected = self._connected or event == "connection.connect_tcp.started"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
