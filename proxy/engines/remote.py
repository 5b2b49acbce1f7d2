"""The remote engine: any OpenAI-compatible server behind a URL.

The server may have one sequence only and may cut off an answer when another request comes
(llama_cpp.server does both): so it is asked in class order, no more at a time than it can serve,
and background work is taken back when a user asks.

Limits: `continues` cannot be said in this API; the messages are sent as they are. llama-server goes
on with a partial answer, many others begin a new one behind it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio

from memory.context import Context
from memory.ports import Budget
from proxy.config import Config
from proxy.engines import remote_embeddings
from proxy.engines.base import (
    ContextOverflow,
    Embeddings,
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    Event,
    Generate,
    ModelInfo,
    Place,
    Priority,
    RequestRefused,
    Warmth,
)
from proxy.engines.hermes import told
from proxy.engines.remote_call import Call
from proxy.engines.remote_count import Counter
from proxy.engines.remote_emptying import Emptying
from proxy.engines.remote_errors import failure
from proxy.engines.remote_http import Http, Unreachable
from proxy.engines.remote_limits import refuse_embeddings, refuse_what_is_missing
from proxy.engines.remote_next import NextChat
from proxy.engines.remote_probe import Found, Probe
from proxy.engines.remote_server import Kind, Server
from proxy.engines.remote_session import Session
from proxy.engines.remote_settings import RemoteSettings, from_config
from proxy.engines.remote_turns import Ticket, Turns
from proxy.engines.remote_watch import Watch

log = logging.getLogger("chatfold.engine")

INTERRUPTIONS_MOST = 8
KEYS_MOST = 1024
ANNOUNCED_S = 0.1
"""From counting a message to asking for its answer."""


class RemoteEngine:
    """Engine over a server that may come and go: it is asked again until it is there."""

    def __init__(self, settings: RemoteSettings) -> None:
        self._settings = settings
        self._maybe_http: Http | None = None
        self._watch: Watch | None = None
        self._session: Session | None = None
        self._turns = Turns(limit=settings.queue_limit)
        self._counter = Counter()
        self._calls: dict[Call, asyncio.Task[None]] = {}
        self._next = NextChat(self._turns, queue_s=settings.queue_s, on_failure=self._take_note)
        self._reading: asyncio.Task[None] | None = None
        self._emptying = Emptying()
        self._keys: OrderedDict[str, str] = OrderedDict()
        """The key that each owner's client last sent, where keys are forwarded: for the background
        work of that owner."""
        self.info: ModelInfo | None = None

    @classmethod
    def from_config(cls, config: Config) -> RemoteEngine:
        return cls(from_config(config))

    def __repr__(self) -> str:
        return f"<RemoteEngine {self._settings.upstream.shown} {self._watch!r} {self._turns!r}>"

    # -- Engine ----------------------------------------------------------------------------------

    async def start(self) -> None:
        settings = self._settings
        if settings.upstream.left_out:
            log.warning("user info and query of the upstream URL are not sent to the server")
        http = Http(
            shown=settings.upstream.shown,
            connect_s=settings.connect_s,
            read_s=max(settings.first_token_s, settings.between_tokens_s),
            key=settings.api_key,
        )
        probe = Probe(
            http,
            settings.upstream,
            n_ctx=settings.n_ctx,
            model=settings.model,
            any_key=settings.forwards_key and not settings.api_key,
        )
        self._maybe_http = http
        self._watch = Watch(
            probe,
            self._turns,
            shown=settings.upstream.shown,
            recheck_s=settings.recheck_s,
            on_found=self._on_found,
        )
        self._watch.start()
        self._reading = asyncio.create_task(self._counter.get_ready(), name="remote-vocabulary")

    async def stop(self) -> None:
        self._next.stop()
        for call in self._calls:
            call.fail(EngineUnavailable("The proxy is shutting down."))
            call.life.cancel()
        if self._calls:
            await asyncio.wait(self._calls.values())
        await self._emptying.stop()
        if self._reading:
            await self._reading
        if self._watch:
            await self._watch.stop()
        http, self._maybe_http = self._maybe_http, None
        if http:
            await http.aclose()

    def ready(self) -> bool:
        return self.info is not None and self._watch is not None and self._watch.there

    async def model(self) -> ModelInfo:
        """Waits `connect_s` for a server that never answered yet, longer if it is being asked."""
        if self.info is None and self._watch:
            await self._watch.until_known(within_s=self._settings.connect_s)
        if self.info is None:
            trouble = self._watch.trouble if self._watch else ""
            raise EngineUnavailable(trouble or "The upstream server has not answered yet.")
        return self.info

    async def count(self, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        await self.model()
        session = self._the_session
        if session.server.kind is not Kind.LLAMA_CPP:
            return await session.count(texts)
        if self._turns.would_wait(Priority.CHAT):
            # Somebody reads an answer: a question would break it off.
            return await self._counter.estimate(texts)
        return await self._count_in_turn(session, texts)

    async def embed(self, inputs: Sequence[str | tuple[int, ...]]) -> Embeddings:
        """By a server that is none of llama.cpp's: those would give up a chat's place for it."""
        await self.model()
        session, upstream = self._the_session, self._settings.upstream
        refuse_embeddings(session.server.kind, forwards_key=self._settings.forwards_key)
        body = remote_embeddings.body(session.server.name, inputs)
        try:
            async with (
                asyncio.timeout(self._settings.embeddings_s),
                self._http.exchange("POST", upstream.embeddings, body) as answer,
            ):
                received = await answer.body()
        except TimeoutError as exc:
            raise EngineUnavailable("The upstream server found no time for embeddings.") from exc
        if answer.status != 200:
            raise failure(answer.status, received)
        return remote_embeddings.embeddings(received, n_inputs=len(inputs))

    async def count_tools(self, tools: str) -> int:
        (n_tokens,) = await self.count([told(tools) + "\n\n"])
        # A system message of their own, if there is none.
        return n_tokens + (self.info.budget.message_tokens if self.info else 0)

    @property
    def tells_warmth(self) -> bool:
        return False

    async def warmth(self, owner: str, context: Context) -> Warmth:
        raise RequestRefused("The upstream server does not tell what is in its cache.")

    def place(self, owner: str, conversation: str) -> Place | None:
        return self._session.place(owner, conversation) if self._session else None

    def check(self, request: Generate) -> None:
        """Before a server was found, only what no kind of server is asked for is refused."""
        refuse_what_is_missing(request, self._session.server.kind if self._session else None)

    @asynccontextmanager
    async def generate(self, request: Generate) -> AsyncIterator[AsyncIterator[Event]]:
        await self.model()
        request = self._with_key(request)
        # The exchange has a task of its own: it can be cancelled wherever it waits, and a reader
        # that stops reading does not keep the next one from its turn.
        call = Call(request, self._turns.enter(request.priority))
        task = asyncio.create_task(self._drive(call), name="remote-call")
        self._calls[call] = task
        task.add_done_callback(call.end)
        task.add_done_callback(lambda _: self._calls.pop(call, None))
        task.add_done_callback(lambda _: self._next.after(self._session))
        task.add_done_callback(lambda _: self._emptying.go_on(self._session))
        try:
            yield call.events()
        finally:
            call.life.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])

    async def forget(self, owner: str) -> None:
        """The owner's key and prompts, and llama-server's slots and files where slots can be saved
        and erased; another server's own cache is out of reach."""
        self._keys.pop(owner, None)
        for call in self._calls:
            call.forgotten = call.forgotten or call.request.owner == owner
        self._next.drop()
        session = self._session
        if session:
            session.forget(owner)
        self._emptying.go_on(self._session)

    def status(self) -> dict[str, Any]:
        info, session, classes = self.info, self._session, [p.name.lower() for p in Priority]
        return {
            "kind": "remote",
            "url": self._settings.upstream.shown,
            "ready": self.ready(),
            "trouble": self._watch.trouble if self._watch else "",
            "times_found": self._watch.times_found if self._watch else 0,
            "model": info.name if info else None,
            "window_tokens": info.budget.window_tokens if info else None,
            "details": info.details if info else {},
            "calibration": repr(self._counter.calibration),
            "slots": repr(session.seats) if session else None,
            "running": dict(zip(classes, self._turns.running(), strict=True)),
            "waiting": dict(zip(classes, self._turns.waiting(), strict=True)),
            "ahead": int(self._next.at_work),
            "preemptions": self._turns.interruptions,
        }

    def check_integrity(self) -> None:
        """Raises AssertionError when the line or the books of slots are out of order."""
        self._turns.check_integrity()
        if self._session:
            self._session.seats.slots.check_integrity()

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
        await ticket.turn(within_s=self._settings.queue_s)
        try:
            with ticket.scope as scope:
                call.begin(anyio.current_time())
                scope.deadline = anyio.current_time() + self._settings.first_token_s
                await self._the_session.carry_out(call)
        finally:
            # Before the next one's turn, which may be the task that makes the next chat ready.
            if self._session and not ticket.interrupted:
                self._session.spoke(call)
            self._turns.leave(ticket)
        if call.finish_reason:
            await self._the_session.learn(call)
            await self._finish(call)
        elif ticket.interrupted:
            self._queue_again(ticket)
        else:
            raise EngineUnavailable("The upstream server took too long for the next token.")

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
        completion = call.completion_tokens if completion is None else completion
        if completion is None:
            (counted,) = await self._counter.estimate([call.text])
            completion = min(counted, call.request.max_tokens or counted)
        call.finish(
            prompt_tokens=call.estimate_tokens if prompt is None else prompt,
            completion_tokens=completion,
        )

    async def _count_in_turn(self, session: Session, texts: Sequence[str]) -> list[int]:
        ticket = self._turns.enter(Priority.CHAT)
        try:
            await ticket.turn(within_s=self._settings.queue_s)
            return await session.count(texts)
        finally:
            # What is counted is mostly about to be asked. Work in the background that began in
            # between would be in its way: the server finishes the prompt it has begun.
            self._turns.announce()
            asyncio.get_running_loop().call_later(ANNOUNCED_S, self._turns.arrived)
            self._turns.leave(ticket)

    def _with_key(self, request: Generate) -> Generate:
        if not self._settings.forwards_key:
            return request
        if request.client_key:
            self._keys[request.owner] = request.client_key
            self._keys.move_to_end(request.owner)
            if len(self._keys) > KEYS_MOST:
                self._keys.popitem(last=False)
        return replace(request, client_key=self._keys.get(request.owner, ""))

    # -- what the server is ----------------------------------------------------------------------

    @property
    def _the_session(self) -> Session:
        if self._session is None:
            raise EngineUnavailable("The proxy is starting or shutting down.")
        return self._session

    @property
    def _http(self) -> Http:
        if self._maybe_http is None:
            raise EngineUnavailable("The proxy is starting or shutting down.")
        return self._maybe_http

    def _take_note(self, exc: EngineError) -> None:
        """Of what a failure tells about the server."""
        if isinstance(exc, ContextOverflow):
            self._narrow(exc.window_tokens)
        # Whoever only refuses or is slow holds what it held.
        if self._session and isinstance(exc, Unreachable | EngineCrashed):
            self._session.lost()
        if self._watch:
            self._watch.take_note(exc)

    def _narrow(self, window_tokens: int) -> None:
        """The window turned out to be smaller than was thought."""
        session = self._session
        if session and 0 < window_tokens < session.server.window_tokens:
            log.warning("the upstream server's window is %d tokens", window_tokens)
            session.server = replace(
                session.server, window_tokens=window_tokens, window_from="refusal"
            )
            self.info = _info(session.server)

    def _on_found(self, found: Found) -> None:
        server, earlier = found.server, self._session
        if most := self._settings.parallel:
            is_known = server.kind is not Kind.OTHER
            server = replace(server, places=min(most, server.places) if is_known else most)
        self._turns.resize(places=server.places, exclusive=server.kind is not Kind.OTHER)
        self._session = Session(
            self._http, replace(found, server=server), self._settings, self._counter
        )
        if earlier and earlier.server.fingerprint == server.fingerprint:
            self._session.inherit(earlier)
        else:
            self._counter.forget()
        if earlier:
            self._emptying.anew(self._session, earlier)
        self.info = _info(server)
        log.info(
            "%s is %s with %s, window %d tokens (%s), %d at a time",
            self._settings.upstream.shown,
            server.kind.value,
            server.name,
            server.window_tokens,
            server.window_from,
            server.places,
        )


def _info(server: Server) -> ModelInfo:
    template = server.template
    return ModelInfo(
        name=server.name,
        fingerprint=server.fingerprint,
        budget=Budget(server.window_tokens, template.message_tokens, template.base_tokens),
        default_system=template.default_system,
        details=server.facts(),
    )
