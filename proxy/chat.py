"""The path of one chat request, top to bottom: recognise, assemble, generate, store, wake the
keeper.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import anyio

from memory.context import Context, DoesNotFit, digest_of
from memory.conversations import (
    Assembled,
    History,
    answered,
    context_for,
    recognise,
    room_for,
    without_store,
)
from memory.keeper import Job, Keeper
from memory.policy import Policy
from memory.ports import TokenCounter
from memory.records import Answered
from memory.store import Store, StoreError
from memory.transcript import Transcript
from proxy.answering import Answering, ClientEvent
from proxy.bounds import within_bounds
from proxy.config import TimeoutsConfig
from proxy.engines.base import (
    CallFormat,
    ContextOverflow,
    Engine,
    EngineError,
    Event,
    Finished,
    Generate,
    JsonFormat,
    ModelInfo,
    Priority,
    Started,
)
from proxy.errors import bad_request
from proxy.librechat.summaries import summary_of, without_summary
from proxy.metrics import CHAT, SIDE, Metrics
from proxy.running import Running
from proxy.tools import NO_TOOLS
from proxy.wire import ChatRequest

log = logging.getLogger("chatfold.chat")

OVERFLOW_TRIES = 4
OVERFLOW_MARGIN_TOKENS = 32
COMMIT_S = 10.0
FIRST_TURN_MESSAGES = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """A request, its place in memory, and the context to send for it."""

    request: ChatRequest
    model: ModelInfo
    history: History
    assembled: Assembled
    degraded: bool
    client_id: str | None = None
    aside: bool = False
    """It belongs to no chat: after those, in no store, and nothing of it is kept."""
    client_key: str = field(default="", repr=False)

    @property
    def context(self) -> Context:
        return self.assembled.context


@dataclass(slots=True)
class _Sent:
    """What was really asked of the engine, and when its first token came: a prompt that turned out
    too long is cut further."""

    plan: Plan
    first_token_s: float = 0.0

    def answered(self, message: bytes, finished: Finished) -> Answered:
        assembled = self.plan.assembled
        room = assembled.room
        return Answered(
            message=message,
            prompt_tokens=finished.prompt_tokens,
            cached_tokens=finished.cached_tokens,
            generated_tokens=finished.completion_tokens,
            queued_s=finished.queued_s,
            first_token_s=self.first_token_s,
            summaries=assembled.blocks,
            room=(room.prompt_tokens, room.message_tokens, room.base_tokens, room.step_tokens),
            pinned=self.plan.history.system.pinned,
            context_digest=digest_of(assembled.context),
        )


def _format(request: ChatRequest) -> JsonFormat | CallFormat | None:
    tools = request.tools
    return CallFormat(tools.names, one_call=tools.one_call) if tools.must else request.format


def _wanted(plan: Plan) -> Generate:
    return Generate(
        owner=plan.history.owner,
        context=plan.context,
        priority=Priority.SIDE if plan.aside else Priority.CHAT,
        conversation="" if plan.aside else plan.history.conversation,
        keep=not plan.aside,
        client_key=plan.client_key,
        max_tokens=plan.request.max_tokens,
        sampling=plan.request.sampling,
        n=plan.request.n,
        format=_format(plan.request),
        thinks=plan.request.thinks,
    )


def _answering(plan: Plan) -> Answering:
    thinking, tools = plan.model.thinking, plan.request.tools
    if plan.context.continues or not plan.request.thinks:
        # No header stands before it that has opened a thought.
        thinking = replace(thinking, first=False)
    # JSON that was asked for calls no tool, whatever it looks like.
    return Answering(thinking, NO_TOOLS if isinstance(_format(plan.request), JsonFormat) else tools)


class Chats:
    """Serves chat requests over one engine and one store."""

    def __init__(
        self,
        *,
        engine: Engine,
        store: Store,
        keeper: Keeper,
        counter: TokenCounter,
        policy: Policy,
        metrics: Metrics,
        timeouts: TimeoutsConfig,
        running: Running,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._store = store
        self._keeper = keeper
        self._counter = counter
        self._policy = policy
        self._metrics = metrics
        self._timeouts = timeouts
        self._running = running
        self._clock = clock

    async def plan(
        self,
        request: ChatRequest,
        owner: str,
        *,
        client_id: str | None = None,
        aside: bool = False,
    ) -> Plan:
        """Reads only. `client_id` is the client's own name for the conversation, if it sends one.

        With `aside` the request belongs to no chat. Raises ApiError, EngineUnavailable or
        RequestRefused.
        """
        model = await self._engine.model()
        if aside:
            plan = await self._plan_aside(request, owner, model)
        else:
            history, degraded = await self._place(request, model, owner, client_id)
            assembled = self._assemble(request, model, history)
            plan = Plan(request, model, history, assembled, degraded, client_id)
        # Now, while it can still be told by a status: a stream has said 200 before it asks.
        self._engine.check(_wanted(plan))
        return plan

    async def run(self, plan: Plan) -> AsyncGenerator[ClientEvent, None]:
        """The answer's events. When the last one is given out, the turn is in the store.

        However it ends, the engine works no longer on it afterwards, and what was answered by then
        is stored. Raises EngineError.
        """
        if plan.aside:
            async with aclosing(self._answer(_Sent(plan), _answering(plan))) as said:
                async for event in said:
                    yield event
            return
        with self._running.answering(plan.history.owner):
            async with aclosing(self._run_chat(plan)) as events:
                async for event in events:
                    yield event

    async def _run_chat(self, plan: Plan) -> AsyncGenerator[ClientEvent, None]:
        answering, sent = _answering(plan), _Sent(plan)
        finished: Finished | None = None
        try:
            async with aclosing(self._answer(sent, answering)) as said:
                async for event in said:
                    if isinstance(event, Finished):
                        finished = event
                    else:
                        yield event
        finally:
            # A client that leaves must not take its turn along: it may come back with it.
            with anyio.move_on_after(COMMIT_S, shield=True):
                await self._commit(plan, answering, finished, sent)
        assert finished is not None, "an engine ends with Finished or raises"
        yield finished

    async def _answer(self, sent: _Sent, answering: Answering) -> AsyncGenerator[ClientEvent, None]:
        async with aclosing(self._generate(sent)) as events:
            async for event in events:
                for said in answering.events(event):
                    yield said
                if isinstance(event, Finished):
                    yield answering.closing(event)

    def count_failure(self, exc: Exception) -> None:
        self._metrics.error(type(exc).__name__)

    # -- before ----------------------------------------------------------------------------------

    async def _plan_aside(self, request: ChatRequest, owner: str, model: ModelInfo) -> Plan:
        transcript = request.transcript
        system = transcript.system or model.default_system
        history = await without_store(
            self._counter, owner, transcript, system=system, tools=request.tools.text
        )
        assembled = self._assemble(request, model, history)
        return Plan(request, model, history, assembled, degraded=False, aside=True)

    async def _place(
        self, request: ChatRequest, model: ModelInfo, owner: str, client_id: str | None
    ) -> tuple[History, bool]:
        try:
            history = await self._recognised(request, model, owner, client_id)
            # A write that failed is the same trouble: what is answered now may not be kept.
            return history, self._store.degraded
        except StoreError as exc:
            self._degraded("read", exc)
        transcript, tools = request.transcript, request.tools.text
        system = transcript.system or model.default_system
        return await without_store(
            self._counter, owner, transcript, system=system, tools=tools
        ), True

    async def _recognised(
        self, request: ChatRequest, model: ModelInfo, owner: str, client_id: str | None
    ) -> History:
        """A summary by the client itself is left out where all that it stands for is known. Raises
        StoreError.
        """
        bare = without_summary(request.transcript)
        if bare and bare.messages:
            told = summary_of(request.transcript)
            found = await self._recognise(request, bare, model, owner, client_id, told=told)
            if len(found.digests) > len(bare.messages):
                return found
        return await self._recognise(request, request.transcript, model, owner, client_id)

    async def _recognise(
        self,
        request: ChatRequest,
        transcript: Transcript,
        model: ModelInfo,
        owner: str,
        client_id: str | None,
        *,
        told: str = "",
    ) -> History:
        return await recognise(
            self._store,
            self._counter,
            owner,
            transcript,
            system=transcript.system or model.default_system,
            tools=request.tools.text,
            client_id=client_id,
            told=told,
            split=self._policy.system == "split",
        )

    def _assemble(
        self, request: ChatRequest, model: ModelInfo, history: History, *, spare_tokens: int = 0
    ) -> Assembled:
        limits = self._policy.limits(model.budget.window_tokens)
        room = room_for(
            model.budget, limits, max_tokens=request.max_tokens, spare_tokens=spare_tokens
        )
        try:
            return context_for(history, self._policy, room, tokenizer=model.fingerprint)
        except DoesNotFit as exc:
            raise bad_request(str(exc), param="messages", code="context_length_exceeded") from exc

    # -- the answer ------------------------------------------------------------------------------

    async def _generate(self, sent: _Sent) -> AsyncGenerator[Event, None]:
        """Asks the engine, with a shorter prompt if it finds that the estimate was too low."""
        spare = 0
        for _ in range(OVERFLOW_TRIES):
            try:
                async with aclosing(self._ask(sent)) as events:
                    async for event in events:
                        yield event
                return
            except ContextOverflow as exc:
                spare += exc.prompt_tokens - exc.window_tokens + OVERFLOW_MARGIN_TOKENS
                last = exc
            log.info("prompt over the window by %d tokens, cutting further", spare)
            plan = sent.plan
            assembled = self._assemble(plan.request, plan.model, plan.history, spare_tokens=spare)
            sent.plan = replace(plan, assembled=assembled)
        raise last

    async def _ask(self, sent: _Sent) -> AsyncGenerator[Event, None]:
        plan, arrived = sent.plan, time.monotonic()
        async with self._engine.generate(_wanted(plan)) as events:
            async for event in within_bounds(events, self._timeouts):
                if isinstance(event, Started) and not plan.aside:
                    sent.first_token_s = time.monotonic() - arrived
                    self._metrics.first_token(sent.first_token_s)
                elif isinstance(event, Finished):
                    self._count(event, SIDE if plan.aside else CHAT)
                yield event

    def _count(self, finished: Finished, work: str) -> None:
        if work == CHAT:
            self._metrics.queued(finished.queued_s)
        self._metrics.tokens(
            work,
            prompt=finished.prompt_tokens,
            cached=finished.cached_tokens,
            generated=finished.completion_tokens,
        )

    # -- after -----------------------------------------------------------------------------------

    async def _commit(
        self, plan: Plan, answering: Answering, finished: Finished | None, sent: _Sent
    ) -> None:
        """One transaction with the whole turn; then the keeper may look at it."""
        kept = answering.kept(finished)
        history = await self._placed(plan)
        if history is None:
            return
        nodes, digests = answered(
            history,
            text=kept.text,
            n_tokens=kept.n_tokens,
            token_ids=kept.token_ids,
            # Where it is not counted yet it will be when it is next used.
            tokenizer=plan.model.fingerprint if kept.n_tokens >= 0 else "",
            created_at=self._clock(),
        )
        if not nodes:
            return
        owner = history.owner
        try:
            await self._store.append(
                owner,
                nodes,
                conversation=history.conversation,
                client_id=plan.client_id,
                answered=sent.answered(nodes[-1].digest, finished) if finished else None,
            )
            # Of what was sent in the end: a prompt that was cut further may use more of them.
            if used := sent.plan.assembled.activates:
                await self._store.activate(owner, used)
        except StoreError as exc:
            self._degraded("write", exc)
            return
        system = history.system
        job = Job(owner, history.conversation, digests, system.text, tools=system.tools)
        if len(digests) <= FIRST_TURN_MESSAGES:
            self._running.remember(job)
        self._keeper.wake(job)

    async def _placed(self, plan: Plan) -> History | None:
        """Where the turn belongs. A store that could not be read may be readable by now; if it is
        not, nothing is kept: a window that has slid would begin a conversation of its own, and all
        later turns would go on in that one. The client sends the turn again with its next message.
        """
        history = plan.history
        if history.placed:
            return history
        try:
            return await self._recognised(plan.request, plan.model, history.owner, plan.client_id)
        except (StoreError, EngineError) as exc:
            self._degraded("read", exc)
            return None

    def _degraded(self, doing: str, exc: Exception) -> None:
        log.warning("memory cannot be used (%s): %s", doing, exc)
        self._metrics.memory_degraded()
