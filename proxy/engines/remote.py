"""The remote engine: any OpenAI-compatible server behind a URL. The only file that imports httpx.

The server may have one sequence only and may cut off an answer when another request comes
(llama_cpp.server does both): so it is asked one thing at a time, in class order, and background
work is taken back when a user asks.

Limits: `continues` cannot be said in this API; the messages are sent as they are, and many servers
begin a new answer behind a partial one. A server that notices only between two tokens that nobody
listens (llama_cpp.server) finishes the prompt it has begun before it takes the next request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import anyio
import httpx
import msgspec

from memory.context import Context
from memory.ports import Budget
from memory.tokens import TiktokenCounter
from proxy.config import Config
from proxy.engines import remote_wire as wire
from proxy.engines.base import (
    ContextOverflow,
    EngineError,
    EngineUnavailable,
    Event,
    Generate,
    ModelInfo,
    Priority,
    QueueFull,
)
from proxy.engines.remote_call import Call
from proxy.engines.remote_stream import DONE, BadStream, Frames, Piece, piece
from proxy.engines.remote_turns import Ticket, Turns

log = logging.getLogger("chatfold.engine")

HEADERS = {
    "accept": "text/event-stream, application/json",
    "accept-encoding": "identity",
    "content-type": "application/json",
    "user-agent": "chatfold",
}
"""All that is sent: nothing of the client's own headers, and no key."""

MESSAGE_TOKENS = 5
"""What templates put around a message: ChatML has 5, Llama 3 has 5, Gemma 4."""
BASE_TOKENS = 3 + 32
"""The header of the answer, and room for a system prompt that the template puts in by itself
(SmolLM2's has 23 tokens): no server tells."""

KEPT_CONNECTIONS = 1
"""One at most is idle: so whoever sends again after a stale connection gets a fresh one."""
INTERRUPTIONS_MOST = 8
ASK_S = 10.0
"""Longest time for the server to say what it is."""
BACKOFF_FIRST_S = 0.1
BACKOFF_MOST_S = 5.0
TRAILER_S = 2.0
"""For what comes behind the finish_reason: usage, [DONE]."""
DRAIN_S = 0.25
"""For the last bytes behind [DONE], without which the connection cannot be used again."""
MAX_ERROR_BYTES = 1 << 16
MAX_ANSWER_BYTES = 64 << 20
"""Answers are held for slow readers, so that these do not hold up everybody else's turn."""


class Unreachable(EngineUnavailable):
    """There is no connection to the server."""


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """Where the server is and how long each wait may last, in seconds. `n_ctx` 0 means the
    server's own window."""

    upstream: wire.Upstream
    n_ctx: int = 0
    queue_limit: int = 64
    connect_s: float = 5.0
    first_token_s: float = 600.0
    between_tokens_s: float = 60.0
    queue_s: float = 300.0


class RemoteEngine:
    """Engine over a server that may come and go: it is asked again until it is there."""

    def __init__(self, settings: RemoteSettings) -> None:
        self._settings = settings
        self._client: httpx.AsyncClient | None = None
        self._turns = Turns(limit=settings.queue_limit)
        self._counter = TiktokenCounter()
        self._calls: dict[Call, asyncio.Task[None]] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._known = asyncio.Event()
        self._lost = asyncio.Event()
        """Set while it is not known whether the server is there."""
        self._lost.set()
        self._takes_usage: bool | None = None
        """Whether the server takes `stream_options`; None before it answered for the first time."""
        self._trouble = ""
        self.info: ModelInfo | None = None

    @classmethod
    def from_config(cls, config: Config) -> RemoteEngine:
        waits = config.timeouts
        return cls(
            RemoteSettings(
                upstream=wire.upstream(config.upstream),
                n_ctx=config.n_ctx,
                queue_limit=config.queue_limit,
                connect_s=waits.connect_s,
                first_token_s=waits.first_token_s,
                between_tokens_s=waits.between_tokens_s,
                queue_s=waits.queue_s,
            )
        )

    def __repr__(self) -> str:
        state = "ready" if self.ready() else self._trouble or "asking"
        return f"<RemoteEngine {self._settings.upstream.shown} {state} {self._turns!r}>"

    # -- Engine ----------------------------------------------------------------------------------

    async def start(self) -> None:
        if self._settings.upstream.left_out:
            log.warning("user info and query of the upstream URL are not sent to the server")
        self._client = _client(self._settings)
        self._watcher = asyncio.create_task(self._watch(), name="remote-engine")

    async def stop(self) -> None:
        for call in self._calls:
            call.fail(EngineUnavailable("The proxy is shutting down."))
            call.life.cancel()
        if self._watcher:
            self._watcher.cancel()
        tasks = [*self._calls.values(), *filter(None, [self._watcher])]
        if tasks:
            await asyncio.wait(tasks)
        client, self._client = self._client, None
        if client:
            await client.aclose()

    def ready(self) -> bool:
        return self.info is not None and not self._lost.is_set()

    async def model(self) -> ModelInfo:
        """Waits `connect_s` at most for a server that never answered yet."""
        with anyio.move_on_after(self._settings.connect_s):
            await self._known.wait()
        if self.info is None:
            raise EngineUnavailable(self._trouble or "The upstream server has not answered yet.")
        return self.info

    async def count(self, texts: Sequence[str]) -> list[int]:
        return await self._counter.count(texts)

    @asynccontextmanager
    async def generate(self, request: Generate) -> AsyncIterator[AsyncIterator[Event]]:
        await self.model()
        # The exchange has a task of its own: it can then be cancelled wherever it waits, and a
        # reader that stops reading does not keep the next one from its turn.
        call = Call(request, self._turns.enter(request.priority))
        task = asyncio.create_task(self._drive(call), name="remote-call")
        task.add_done_callback(call.end)
        self._calls[call] = task
        try:
            yield call.events()
        finally:
            call.life.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])
            del self._calls[call]

    def status(self) -> dict[str, Any]:
        info, classes = self.info, [p.name.lower() for p in Priority]
        return {
            "kind": "remote",
            "url": self._settings.upstream.shown,
            "ready": self.ready(),
            "trouble": self._trouble,
            "model": info.name if info else None,
            "window_tokens": info.budget.window_tokens if info else None,
            "details": info.details if info else {},
            "running": dict(zip(classes, self._turns.running(), strict=True)),
            "waiting": dict(zip(classes, self._turns.waiting(), strict=True)),
            "preemptions": self._turns.interruptions,
        }

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not balance."""
        self._turns.check_integrity()

    # -- one request -----------------------------------------------------------------------------

    async def _drive(self, call: Call) -> None:
        with call.life:
            try:
                while not call.finished:
                    await self._attempt(call)
            except Unreachable as exc:
                self._lose(exc)
                call.fail(exc)
            except EngineError as exc:
                call.fail(exc)
            finally:
                self._turns.leave(call.ticket)

    async def _attempt(self, call: Call) -> None:
        """One turn. Afterwards the call is finished or stands in line again; else it raises."""
        ticket = call.ticket
        await self._turn(ticket)
        call.begin(anyio.current_time())
        try:
            with ticket.scope as scope:
                scope.deadline = anyio.current_time() + self._settings.first_token_s
                await self._exchange(call)
        finally:
            self._turns.leave(ticket)
        if call.finish_reason:
            call.finish(await self._prompt_tokens(call), await self._completion_tokens(call))
        elif ticket.interrupted:
            self._queue_again(ticket)
        else:
            raise EngineUnavailable("The upstream server took too long for the next token.")

    async def _turn(self, ticket: Ticket) -> None:
        queue_s = self._settings.queue_s
        with anyio.move_on_after(queue_s):
            await ticket.granted.wait()
        if not ticket.granted.is_set():
            raise QueueFull(f"The request has waited {queue_s:g} seconds for its turn.")

    def _queue_again(self, ticket: Ticket) -> None:
        if ticket.interruptions >= INTERRUPTIONS_MOST:
            if ticket.priority is Priority.BACKGROUND:
                raise EngineUnavailable("Users' requests came in between too often.")
            ticket.hold()
        self._turns.again(ticket)

    async def _exchange(self, call: Call) -> None:
        """Sends the request and reads the answer to its end."""
        response = await self._ask(call)
        try:
            if response.status_code != 200:
                raise wire.failure(response.status_code, await _bounded(response))
            await self._read(call, response)
        except ContextOverflow as exc:
            self._narrow(exc.window_tokens)
            raise
        finally:
            await _close(response)

    async def _ask(self, call: Call) -> httpx.Response:
        """The response, its headers read. A server that never answered is asked once more without
        `stream_options` when it refuses: it may not know that field."""
        response = await self._send(call, with_usage=self._takes_usage is not False)
        if self._takes_usage is None and response.status_code in (400, 422):
            await _close(response)
            response = await self._send(call, with_usage=False)
            if response.status_code == 200:
                self._takes_usage = False
        elif response.status_code == 200 and self._takes_usage is None:
            self._takes_usage = True
        return response

    async def _send(self, call: Call, *, with_usage: bool) -> httpx.Response:
        info, request = self.info, call.request
        assert info is not None
        content = wire.body(
            request,
            model=info.name,
            max_tokens=await self._max_tokens(request, info.budget),
            with_usage=with_usage,
        )
        return await self._open("POST", self._settings.upstream.chat, content)

    async def _read(self, call: Call, response: httpx.Response) -> None:
        frames, n_bytes = Frames(), 0
        try:
            with self._translated():
                async with aclosing(response.aiter_bytes()) as received:
                    async for data in received:
                        n_bytes += len(data)
                        if n_bytes > MAX_ANSWER_BYTES:
                            raise EngineError("The upstream server's answer has no end.")
                        for frame in frames.feed(data):
                            self._on_frame(call, frame)
        except BadStream as exc:
            raise EngineError(f"The upstream server's stream cannot be read: {exc}.") from exc
        except EngineUnavailable:
            # What breaks off behind the end of an answer takes nothing away from it.
            if not call.finish_reason:
                raise
        call.check_complete()

    def _on_frame(self, call: Call, frame: bytes) -> None:
        now = anyio.current_time()
        if frame == DONE:
            call.ticket.scope.deadline = now + DRAIN_S
            return
        read = piece(frame)
        if read.failed is not None:
            raise _mid_answer(wire.failure_in_stream(read.failed), call)
        self._on_piece(call, read, now)
        wait_s = TRAILER_S if call.finish_reason else self._settings.between_tokens_s
        call.ticket.scope.deadline = now + wait_s

    def _on_piece(self, call: Call, read: Piece, now: float) -> None:
        if read.usage:
            call.usage = read.usage
        if read.opens and not call.finish_reason:
            call.take(read, now)

    # -- tokens ----------------------------------------------------------------------------------

    async def _max_tokens(self, request: Generate, budget: Budget) -> int | None:
        """What is asked for, as far as the window has room for it: servers refuse more."""
        wanted = request.max_tokens
        if wanted is None or wanted <= 1:
            return wanted
        room = budget.window_tokens - await self._estimate(request.context)
        return max(1, min(wanted, room))

    async def _prompt_tokens(self, call: Call) -> int:
        if call.usage and call.usage.prompt_tokens is not None:
            return call.usage.prompt_tokens
        return await self._estimate(call.request.context)

    async def _completion_tokens(self, call: Call) -> int:
        if call.usage and call.usage.completion_tokens is not None:
            return call.usage.completion_tokens
        return (await self._counter.count([call.text]))[0]

    async def _estimate(self, context: Context) -> int:
        shape = context.shape
        texts = shape.verbatim_tokens + shape.summary_tokens + shape.system_tokens
        if not texts:
            texts = sum(await self._counter.count([m.text for m in context.messages]))
        return texts + BASE_TOKENS + MESSAGE_TOKENS * len(context.messages)

    def _narrow(self, window_tokens: int) -> None:
        """The server has just told that its window is smaller than was thought."""
        info = self.info
        if info and 0 < window_tokens < info.budget.window_tokens:
            log.warning("the upstream server's window is %d tokens", window_tokens)
            budget = replace(info.budget, window_tokens=window_tokens)
            details = {**info.details, "window_from": "refusal"}
            self.info = replace(info, budget=budget, details=details)

    # -- what the server is ----------------------------------------------------------------------

    def _lose(self, exc: Unreachable) -> None:
        self._trouble = str(exc)
        if not self._lost.is_set():
            log.warning("%s", exc)
            self._lost.set()

    async def _watch(self) -> None:
        while True:
            await self._lost.wait()
            await self._learn()
            self._lost.clear()

    async def _learn(self) -> None:
        """Asks until there is an answer."""
        backoff_s = BACKOFF_FIRST_S
        while not await self._asked():
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MOST_S)

    async def _asked(self) -> bool:
        """Whether the server said what it is. Takes a turn like any request: llama_cpp.server
        breaks off an answer for a question like this too."""
        try:
            ticket = self._turns.enter(Priority.BACKGROUND)
        except QueueFull:
            return False
        try:
            await ticket.granted.wait()
            with ticket.scope as scope:
                scope.deadline = anyio.current_time() + ASK_S
                self._on_found(await self._identify())
                return True
        except EngineError as exc:
            if str(exc) != self._trouble:
                log.warning("waiting for the upstream server: %s", exc)
            self._trouble = str(exc)
        finally:
            self._turns.leave(ticket)
        return False

    async def _identify(self) -> wire.Found:
        upstream = self._settings.upstream
        models = await self._get(upstream.models, absent=(404, 405))
        # Only llama-server has this; whatever others say to it means that they have no such thing.
        props = await self._get(upstream.props, absent=range(300, 600))
        return wire.found(models, props, n_ctx=self._settings.n_ctx)

    async def _get(self, url: str, *, absent: Sequence[int]) -> object:
        """The JSON there, None where there is none."""
        response = await self._open("GET", url)
        try:
            with self._translated():
                received = await _bounded(response, most_bytes=MAX_ANSWER_BYTES)
        finally:
            await _close(response)
        if response.status_code in absent:
            return None
        if response.status_code != 200:
            raise wire.failure(response.status_code, received)
        try:
            value: object = msgspec.json.decode(received)
        except (msgspec.DecodeError, UnicodeDecodeError):
            value = None
        return value

    def _on_found(self, found: wire.Found) -> None:
        if self.info is None or self.info.name != found.name:
            log.info(
                "upstream %s serves %s, window %d tokens (%s)",
                self._settings.upstream.shown,
                found.name,
                found.window_tokens,
                found.window_from,
            )
        self.info = ModelInfo(
            name=found.name,
            fingerprint=f"{self._counter.tokenizer}:{found.name}",
            budget=Budget(found.window_tokens, MESSAGE_TOKENS, BASE_TOKENS),
            default_system="",
            details={"window_from": found.window_from},
        )
        self._trouble = ""
        self._known.set()

    # -- httpx -----------------------------------------------------------------------------------

    async def _open(self, method: str, url: str, content: bytes | None = None) -> httpx.Response:
        """The response's headers. When a kept connection turns out to be closed, the request is
        sent once more on a fresh one: llama-server closes idle ones without a word."""
        with self._translated():
            for _ in range(KEPT_CONNECTIONS):
                fresh = _Fresh()
                try:
                    return await self._send_once(method, url, content, fresh)
                except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                    if fresh:
                        raise
            return await self._send_once(method, url, content, _Fresh())

    async def _send_once(
        self, method: str, url: str, content: bytes | None, fresh: _Fresh
    ) -> httpx.Response:
        if self._client is None:
            raise EngineUnavailable("The proxy is shutting down.")
        # Not `client.build_request`: that would add cookies and the client's defaults.
        request = httpx.Request(
            method, url, content=content, headers=HEADERS, extensions={"trace": fresh.trace}
        )
        return await self._client.send(request, stream=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        shown = self._settings.upstream.shown
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            raise Unreachable(f"The upstream server {shown} cannot be reached.") from exc
        except httpx.TimeoutException as exc:
            raise EngineUnavailable(f"The upstream server {shown} does not answer.") from exc
        except httpx.RequestError as exc:
            raise EngineCrashed(f"The upstream server {shown} broke off the connection.") from exc


class _Fresh:
    """True once a request had to open a connection. `trace` is an httpcore trace function."""

    def __init__(self) -> None:
        self._connected = False

    def __bool__(self) -> bool:
        return self._connected

    async def trace(self, event: str, info: dict[str, Any]) -> None:
        self._connected = self._connected or event == "connection.connect_tcp.started"


def _client(settings: RemoteSettings) -> httpx.AsyncClient:
    """Without a limit on connections: with one, the pool loses its places to requests that are
    cancelled (httpcore #1093). `Turns` is the limit. Answers' cookies are thrown away."""
    return httpx.AsyncClient(
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=KEPT_CONNECTIONS),
        timeout=httpx.Timeout(
            connect=settings.connect_s,
            read=max(settings.first_token_s, settings.between_tokens_s),
            write=settings.first_token_s,
            pool=settings.connect_s,
        ),
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        trust_env=False,
        follow_redirects=False,
    )


async def _bounded(response: httpx.Response, *, most_bytes: int = MAX_ERROR_BYTES) -> bytes:
    """The first bytes of a body."""
    body = bytearray()
    async with aclosing(response.aiter_bytes()) as received:
        async for data in received:
            body += data
            if len(body) > most_bytes:
                break
    return bytes(body[:most_bytes])


async def _close(response: httpx.Response) -> None:
    with anyio.CancelScope(shield=True):
        await response.aclose()


def _mid_answer(error: EngineError, call: Call) -> EngineError:
    """An overflow after some text is no reason to begin anew: the reader has the text."""
    return EngineError(str(error)) if call.text and isinstance(error, ContextOverflow) else error
