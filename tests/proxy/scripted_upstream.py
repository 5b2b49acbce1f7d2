"""A server that speaks the OpenAI chat API by script, byte for byte, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}


def say(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


def end(reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


def usage(prompt: int, completion: int, cached: int | None = None) -> dict[str, Any]:
    numbers: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        numbers["prompt_tokens_details"] = {"cached_tokens": cached}
    return {"choices": [], "usage": numbers}


def frames(*values: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(v).encode() + b"\n\n" for v in values)


DONE = b"data: [DONE]\n\n"
HELLO = frames(ROLE, say("Hel"), say("lo"), end(), usage(7, 2, 5)) + DONE


@dataclass
class Exchange:
    """One request that arrived, and the way back."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    connection: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def said(self) -> str:
        """The text of the last message: names the request in tests."""
        return str(self.body["messages"][-1]["content"])

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self, value: Any, *, status: int = 200, headers: bytes = b"") -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(content)}\r\n".encode()
        await self.send(head + headers + b"\r\n" + content)

    async def stream(self, data: bytes, *, headers: bytes = b"") -> None:
        """A whole stream, chunked, the connection kept."""
        await self.send(STREAM_HEAD + headers + b"transfer-encoding: chunked\r\n\r\n")
        if data:
            await self.chunk(data)
        await self.chunk(b"")

    async def chunk(self, data: bytes) -> None:
        await self.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def until_gone(self) -> None:
        """Returns when the other side has closed the connection."""
        while await self.reader.read(1024):
            pass

    def hang_up(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        self.writer.transport.abort()


Script = Callable[[Exchange], Awaitable[None]]


async def hello(exchange: Exchange) -> None:
    await exchange.stream(HELLO)


@dataclass
class Upstream:
    """Answers GET /v1/models and /props from `models` and `props`, chat by `chat`, and what else
    there is by `routes`.

    `seen` holds all chat requests in order of arrival, `log` what scripts note down.
    """

    chat: Script = hello
    models: Any = field(default_factory=lambda: {"data": [{"id": "tiny", "max_model_len": 1000}]})
    props: Any = None
    routes: dict[tuple[str, str], Script] = field(default_factory=dict)
    port: int = 0
    seen: list[Exchange] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    connections: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def note(self, line: str) -> None:
        async with self.changed:
            self.log.append(line)
            self.changed.notify_all()

    async def noted(self, line: str) -> None:
        """Returns once `line` is in the log."""
        async with self.changed:
            await self.changed.wait_for(lambda: line in self.log)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Upstream]:
        """On `port`, or a free one. Every connection is closed at the end."""
        tasks: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await self._serve(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass
            finally:
                writer.transport.abort()
                tasks.discard(task)

        server = await asyncio.start_server(connected, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = self.connections
        while not writer.is_closing():
            exchange = await _read(reader, writer, connection)
            await self._answer(exchange)

    async def _answer(self, exchange: Exchange) -> None:
        route = self.routes.get((exchange.method, exchange.path.partition("?")[0]))
        if route:
            await route(exchange)
        elif exchange.method == "POST" and not exchange.path.endswith("/chat/completions"):
            await exchange.reply({"error": {"message": "Not found."}}, status=404)
        elif exchange.method == "POST":
            self.seen.append(exchange)
            await self.note(f"asked {exchange.said}")
            await self.chat(exchange)
        else:
            answers = {"/v1/models": self.models, "/props": self.props}
            value = answers.get(exchange.path)
            found = value is not None
            await exchange.reply(value if found else {}, status=200 if found else 404)


async def _read(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int
) -> Exchange:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.rstrip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines)}
    content = await reader.readexactly(int(headers.get("content-length", 0)))
    body = json.loads(content) if content else None
    return Exchange(method, path, headers, body, connection, reader, writer)
