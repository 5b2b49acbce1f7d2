"""Noticing that the client has gone, and stopping the work for it at once.

Two traps are avoided here. Awaiting the work alone never notices a client that leaves before the
first byte: so the work races `http.disconnect`. Polling `request.is_disconnected()` notices late
and eats messages: so one task waits on `receive`.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import anyio
from anyio.abc import TaskGroup
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from proxy.sse import PING

T = TypeVar("T")

STREAM_HEADERS = {
    "cache-control": "no-cache",
    "content-type": "text/event-stream; charset=utf-8",
    # nginx and its kin would buffer the stream.
    "x-accel-buffering": "no",
}


class ClientGone(Exception):
    """The client closed the connection; nobody is there to answer to."""


async def run_until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, or ClientGone as soon as the client leaves.

    `receive` is ASGI's; the request's body must have been read before. Work that loses is cancelled
    and awaited: when this returns or raises, nothing of it runs any more. Runs `work` in the
    caller's task. Raises what `work` raises.
    """
    gone = False

    async def watch() -> None:
        nonlocal gone
        await _disconnected(receive)
        gone = True
        group.cancel_scope.cancel()

    async with _task_group() as group:
        group.start_soon(watch)
        result = await work
        group.cancel_scope.cancel()
        return result
    if gone:
        raise ClientGone
    raise AssertionError("a scope that nobody cancelled ended without a result")


class EventStream(Response):
    """Streams `frames` as server-sent events until they end or the client leaves.

    Headers go out at once, a ping after every `ping_s` seconds of silence; before the first frame,
    `nudge` after every `nudge_s` already, if that is less. `prelude` stands before the first of all
    these and goes out with it: a write of its own would wake the client for nothing, right before
    the work begins. A slow reader slows the
    frames down: no frame is taken before the one before it was accepted. When the client leaves,
    `frames` is cancelled where it waits, or closed where it stands at a `yield`; either way its
    `finally` blocks have run when the response ends. A client that leaves before the headers are
    out ends it before `frames` has begun: so take inside of `frames` whatever must be freed.

    What `frames` raises is raised here, and the stream is left unfinished, so that no client takes
    it for complete.
    """

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        *,
        prelude: bytes = b"",
        ping_s: float = 10.0,
        nudge: bytes = PING,
        nudge_s: float = math.inf,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.frames = frames
        self.prelude = prelude
        self.ping_s = ping_s
        self.nudge = nudge
        self.nudge_s = nudge_s
        self.status_code = status_code
        self.background = None
        self.init_headers({**(headers or {}), **STREAM_HEADERS})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        line = _Line(send, self.prelude)
        try:
            with suppress(ClientGone):
                async with _task_group() as group:
                    group.start_soon(_cancel_when_gone, receive, group)
                    await line.open(self.status_code, self.raw_headers)
                    group.start_soon(self._ping, line)
                    async for frame in self.frames:
                        await line.write(frame)
                        line.frames += 1
                    # Nobody may ping behind the end.
                    await line.close()
                    group.cancel_scope.cancel()
        finally:
            # A no-op unless the client left while a frame was on its way out.
            with anyio.CancelScope(shield=True):
                await self.frames.aclose()

    async def _ping(self, line: _Line) -> None:
        while True:
            early = not line.frames and self.nudge_s < self.ping_s
            idle_s = self.nudge_s if early else self.ping_s
            await anyio.sleep_until(line.idle_since + idle_s)
            await line.write_if_idle(self.nudge if early else PING, idle_s=idle_s)


class _Line:
    """The way to the client. One writer at a time; `idle_since` is the time of the last write,
    `frames` counts what was written but for pings."""

    def __init__(self, send: Send, prelude: bytes) -> None:
        self._send = send
        self._prelude = prelude
        self._lock = anyio.Lock()
        self.idle_since = anyio.current_time()
        self.frames = 0

    async def open(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        start = {"type": "http.response.start", "status": status, "headers": headers}
        await self._put(start)

    async def write(self, data: bytes) -> None:
        async with self._lock:
            await self._put_body(data)

    async def write_if_idle(self, data: bytes, *, idle_s: float) -> None:
        async with self._lock:
            if anyio.current_time() >= self.idle_since + idle_s:
                await self._put_body(data)

    async def close(self) -> None:
        # Takes the lock for good: a ping that waits for it stays waiting until it is cancelled.
        await self._lock.acquire()
        await self._put({"type": "http.response.body", "body": b"", "more_body": False})

    async def _put_body(self, data: bytes) -> None:
        data, self._prelude = self._prelude + data, b""
        await self._put({"type": "http.response.body", "body": data, "more_body": True})

    async def _put(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError as exc:  # ASGI 2.4: how some servers say that the client is gone
            raise ClientGone from exc
        self.idle_since = anyio.current_time()


async def _cancel_when_gone(receive: Receive, group: TaskGroup) -> None:
    await _disconnected(receive)
    group.cancel_scope.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def _task_group() -> AsyncIterator[TaskGroup]:
    """A task group that raises a lone exception as itself, so that callers can name it."""
    try:
        async with anyio.create_task_group() as group:
            yield group
    except BaseExceptionGroup as many:
        if len(many.exceptions) > 1:
            raise
        raise many.exceptions[0] from many.exceptions[0].__cause__
