"""The remote engine: any OpenAI-compatible server behind a URL.

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
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import anyio
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
    RequestRefused,
)
from proxy.engines.remote_call import Call
from proxy.engines.remote_http import Answer, Http, Unreachable
from proxy.engines.remote_limits import refuse_what_is_missing
from proxy.engines.remote_stream import DONE, BadStream, Frames, piece
from proxy.engines.remote_turns import Ticket, Turns

log = logging.getLogger("chatfold.engine")

MESSAGE_TOKENS = 5
"""What templates put around a message: ChatML has 5, Llama 3 has 5, Gemma 4."""
BASE_TOKENS = 3 + 32
"""The header of the answer, and room for a system prompt that the template puts in by itself
(SmolLM2's has 22 tokens): no server tells."""

INTERRUPTIONS_MOST = 8
ASK_S = 10.0
"""Longest time for the server to say what it is."""
BACKOFF_FIRST_S = 0.1
BACKOFF_MOST_S = 5.0
TRAILER_S = 2.0
"""For what comes behind the finish_reason: usage, [DONE]."""
DRAIN_S = 0.25
"""For the last bytes behind [DONE], without which the connection cannot be used again."""
MAX_ANSWER_BYTES = 64 << 20
"""Answers are held for slow readers, so that these do not hold up everybody else's turn."""


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
        self._maybe_http: Http | None = None
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
        settings = RemoteSettings(
            upstream=wire.upstream(config.upstream),
            n_ctx=config.n_ctx,
            queue_limit=config.queue_limit,
            connect_s=waits.connect_s,
            first_token_s=waits.first_token_s,
            between_tokens_s=waits.between_tokens_s,
            queue_s=waits.queue_s,
        )
        return cls(settings)

    def __repr__(self) -> str:
        state = "ready" if self.ready() else self._trouble or "asking"
        return f"<RemoteEngine {self._settings.upstream.shown} {state} {self._turns!r}>"

    # -- Engine ----------------------------------------------------------------------------------

    async def start(self) -> None:
        settings = self._settings
        if settings.upstream.left_out:
            log.warning("user info and query of the upstream URL are not sent to the server")
        self._maybe_http = Http(
            shown=settings.upstream.shown,
            connect_s=settings.connect_s,
            read_s=max(settings.first_token_s, settings.between_tokens_s),
        )
        self._watcher = asyncio.create_task(self._watch(), name="remote-engine")

    async def stop(self) -> None:
        for call in self._calls:
            call.fail(EngineUnavailable("The proxy is shutting down."))
            call.life.cancel()
        if self._watcher:
            self._watcher.cancel()
        if tasks := [*self._calls.values(), *filter(None, [self._watcher])]:
            await asyncio.wait(tasks)
        http, self._maybe_http = self._maybe_http, None
        if http:
            await http.aclose()

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

    async def count_tools(self, tools: str) -> int:
        raise RequestRefused("Tools cannot be used with a remote server yet.")

    def check(self, request: Generate) -> None:
        refuse_what_is_missing(request)

    @asynccontextmanager
    async def generate(self, request: Generate) -> AsyncIterator[AsyncIterator[Event]]:
        await self.model()
        # The exchange has a task of its own: it can be cancelled wherever it waits, and a reader
        # that stops reading does not keep the next one from its turn.
        call = Call(request, self._turns.enter(request.priority))
        task = asyncio.create_task(self._drive(call), name="remote-call")
        self._calls[call] = task
        task.add_done_callback(call.end)
        task.add_done_callback(lambda _: self._calls.pop(call, None))
        try:
            yield call.events()
        finally:
            call.life.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])

    async def forget(self, owner: str) -> None:
        """Nothing: the server's own cache is out of reach, and this side keeps none."""

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
        """Raises AssertionError when the line of requests is out of order."""
        self._turns.check_integrity()

    # -- one request -----------------------------------------------------------------------------

    async def _drive(self, call: Call) -> None:
        with call.life:
            try:
                while not call.finished:
                    await self._attempt(call)
            except EngineError as exc:
                self._take_note(exc)
                call.fail(exc)
            finally:
                self._turns.leave(call.ticket)

    async def _attempt(self, call: Call) -> None:
        """One turn. Afterwards the call is finished or stands in line again; else it raises."""
        ticket = call.ticket
        await self._turn(ticket)
        try:
            with ticket.scope as scope:
                call.begin(anyio.current_time())
                scope.deadline = anyio.current_time() + self._settings.first_token_s
                await self._exchange(call)
        finally:
            self._turns.leave(ticket)
        if call.finish_reason:
            await self._finish(call)
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

    async def _finish(self, call: Call) -> None:
        """With the server's numbers, and our own where it gave none."""
        usage = call.usage
        prompt = usage.prompt_tokens if usage else None
        completion = usage.completion_tokens if usage else None
        if completion is None:
            (counted,) = await self._counter.count([call.text])
            completion = min(counted, call.request.max_tokens or counted)
        call.finish(
            prompt_tokens=call.estimate_tokens if prompt is None else prompt,
            completion_tokens=completion,
        )

    async def _exchange(self, call: Call) -> None:
        """Sends the request and reads the answer. Raises what the server reported."""
        call.estimate_tokens = await self._estimate(call.request.context)
        await self._stream(call)
        if not call.started:
            await self._hear_why(call)
        call.check_complete()

    async def _stream(self, call: Call) -> None:
        """A server that never took one is asked once more without `stream_options` when it
        refuses: it may not know that field."""
        for with_usage in (True, False) if self._takes_usage is None else (self._takes_usage,):
            body = self._body(call, with_usage=with_usage)
            async with self._http.exchange("POST", self._settings.upstream.chat, body) as answer:
                if answer.status == 200:
                    self._takes_usage = with_usage
                    return await self._read(call, answer)
                failed = wire.failure(answer.status, await answer.body())
            if answer.status not in (400, 422):
                break
        raise failed

    async def _hear_why(self, call: Call) -> None:
        """Asks for one token in one piece after a stream that ended before it began:
        llama_cpp.server says only then what was wrong, a prompt over its window above all."""
        info = self.info
        assert info is not None
        body = wire.body(call.request, model=info.name, max_tokens=1, stream=False)
        async with self._http.exchange("POST", self._settings.upstream.chat, body) as answer:
            if answer.status != 200:
                raise wire.failure(answer.status, await answer.body())

    def _body(self, call: Call, *, with_usage: bool) -> bytes:
        info, wanted = self.info, call.request.max_tokens
        assert info is not None
        # As far as the window has room for it: servers refuse more.
        room = max(1, info.budget.window_tokens - call.estimate_tokens)
        return wire.body(
            call.request,
            model=info.name,
            max_tokens=None if wanted is None else min(wanted, room),
            with_usage=with_usage,
        )

    async def _read(self, call: Call, answer: Answer) -> None:
        """To the answer's end. What breaks off behind it takes nothing away from it."""
        try:
            await self._read_frames(call, answer)
        except BadStream as exc:
            raise EngineError(f"The upstream server's stream cannot be read: {exc}.") from exc
        except EngineUnavailable:
            if not call.finish_reason:
                raise

    async def _read_frames(self, call: Call, answer: Answer) -> None:
        frames, n_bytes = Frames(), 0
        async with aclosing(answer.chunks()) as received:
            async for data in received:
                n_bytes += len(data)
                if n_bytes > MAX_ANSWER_BYTES:
                    raise EngineError("The upstream server's answer has no end.")
                for frame in frames.feed(data):
                    wait_s = self._on_frame(call, frame)
                    call.ticket.scope.deadline = anyio.current_time() + wait_s

    def _on_frame(self, call: Call, frame: bytes) -> float:
        """Returns how long the next one may take, in seconds."""
        if frame == DONE:
            return DRAIN_S
        read = piece(frame)
        if read.failed is not None:
            raise _mid_answer(wire.failure_in_stream(read.failed), call)
        call.usage = read.usage or call.usage
        if read.opens and not call.finish_reason:
            call.take(read, anyio.current_time())
        return TRAILER_S if call.finish_reason else self._settings.between_tokens_s

    async def _estimate(self, context: Context) -> int:
        """Tokens of the prompt, as far as can be said from outside."""
        shape = context.shape
        texts = shape.verbatim_tokens + shape.summary_tokens + shape.system_tokens
        if not texts:
            texts = sum(await self._counter.count([m.text for m in context.messages]))
        return texts + BASE_TOKENS + MESSAGE_TOKENS * len(context.messages)

    # -- what the server is ----------------------------------------------------------------------

    @property
    def _http(self) -> Http:
        if self._maybe_http is None:
            raise EngineUnavailable("The proxy is starting or shutting down.")
        return self._maybe_http

    def _take_note(self, exc: EngineError) -> None:
        """Of what a failure tells about the server."""
        if isinstance(exc, ContextOverflow):
            self._narrow(exc.window_tokens)
        if isinstance(exc, Unreachable):
            self._trouble = str(exc)
            if not self._lost.is_set():
                log.warning("%s", exc)
            self._lost.set()

    def _narrow(self, window_tokens: int) -> None:
        """The window turned out to be smaller than was thought."""
        info = self.info
        if info and 0 < window_tokens < info.budget.window_tokens:
            log.warning("the upstream server's window is %d tokens", window_tokens)
            budget = replace(info.budget, window_tokens=window_tokens)
            self.info = replace(info, budget=budget, details={"window_from": "refusal"})

    async def _watch(self) -> None:
        """Asks the server what it is until it answers, and again after it was lost."""
        while True:
            await self._lost.wait()
            backoff_s = BACKOFF_FIRST_S
            while not await self._ask():
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, BACKOFF_MOST_S)
            self._lost.clear()

    async def _ask(self) -> bool:
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
            self._trouble = self._trouble or "The upstream server does not answer."
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
        props = await self._get(upstream.props, absent=range(201, 600))
        return wire.found(models, props, n_ctx=self._settings.n_ctx)

    async def _get(self, url: str, *, absent: Sequence[int]) -> object:
        """The JSON there, None where there is none."""
        async with self._http.exchange("GET", url) as answer:
            received = await answer.body()
        if answer.status in absent:
            return None
        if answer.status != 200:
            raise wire.failure(answer.status, received)
        try:
            value: object = msgspec.json.decode(received)
        except (msgspec.DecodeError, UnicodeDecodeError):
            value = None
        return value

    def _on_found(self, found: wire.Found) -> None:
        window_tokens, source = found.window_tokens, found.window_from
        shown = self._settings.upstream.shown
        log.info("%s serves %s, window %d tokens (%s)", shown, found.name, window_tokens, source)
        self.info = ModelInfo(
            name=found.name,
            fingerprint=f"{self._counter.tokenizer}:{found.name}",
            budget=Budget(window_tokens, MESSAGE_TOKENS, BASE_TOKENS),
            default_system="",
            details={"window_from": source},
        )
        self._trouble = ""
        self._known.set()


def _mid_answer(error: EngineError, call: Call) -> EngineError:
    """An overflow after some text is no reason to begin anew: the reader has the text."""
    return EngineError(str(error)) if call.text and isinstance(error, ContextOverflow) else error
