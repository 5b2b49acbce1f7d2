"""The background worker: summarise, store, warm, activate. It never stands before a user's request.

One task works through the conversations that had an answer since it last looked, the one that
waited longest first. Each round it takes the newest state of a conversation, does one step of
compaction, and goes on until nothing is left to do; then it warms what the next request will
begin with.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from memory.compaction import Merge, Step, Summarize, next_step, weights
from memory.context import NOTE_TOKENS, Context, DoesNotFit, assemble
from memory.conversations import History, context_for, counted, revisit, room_for
from memory.policy import Limits, Policy
from memory.ports import Budget, Completer, ModelGone, TokenCounter, Warmer
from memory.records import Node
from memory.scribe import Redraft, Scribe, Task, as_written
from memory.store import Store, StoreError

log = logging.getLogger("chatfold.keeper")

STEPS_MOST = 64
"""Compaction steps for one conversation at a stretch: others get their turn after that."""
QUESTION_SHARE = 16
"""One part in so many of the window is left for the next question when a system prompt is long."""
ATTEMPTS_MOST = 3
RETRY_S = 2.0


class Observer(Protocol):
    """Told what the keeper does, in the order it happens."""

    def __call__(self, event: str, /, **fields: object) -> None: ...


@dataclass(frozen=True, slots=True)
class Host:
    """What the keeper needs to know of the model at hand."""

    budget: Budget
    model: str


@dataclass(frozen=True, slots=True)
class Job:
    """A conversation that had an answer: look after the path that ends there."""

    owner: str
    conversation: str
    digests: tuple[bytes, ...]
    system: str
    attempts: int = 0
    tools: str = ""
    """What the last request allowed the model to call: it stands in front of every context."""

    @property
    def key(self) -> tuple[str, str]:
        return self.owner, self.conversation


class Keeper:
    """Owns one task. `wake` is cheap and may be called from the event loop at any time."""

    def __init__(
        self,
        *,
        store: Store,
        completer: Completer,
        warmer: Warmer,
        counter: TokenCounter,
        policy: Policy,
        host: Callable[[], Host],
        observe: Observer,
        clock: Callable[[], float] = time.time,
        redraft: Redraft = as_written,
    ) -> None:
        self._store = store
        self._completer = completer
        self._warmer = warmer
        self._counter = counter
        self._policy = policy
        self._host = host
        self._observe = observe
        self._clock = clock
        self._redraft = redraft
        self._jobs: OrderedDict[tuple[str, str], Job] = OrderedDict()
        self._current: Job | None = None
        self._attempt_at_hand: asyncio.Task[None] | None = None
        self._kept_from: Counter[str] = Counter()
        """Owners whose chats are let alone, and by how many."""
        self.span: tuple[int, int] | None = None
        """Depths of the first and the last message that a summary is being written of."""
        self._news = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._busy = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Keeper running={self.running} pending={self.pending}>"

    @property
    def running(self) -> int:
        return int(self._current is not None)

    @property
    def pending(self) -> int:
        return len(self._jobs)

    def start(self) -> None:
        self._task = asyncio.create_task(self._work(), name="keeper")

    async def stop(self) -> None:
        """Ends the work at hand. Nothing half done is kept; the next answer begins it anew."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def wake(self, job: Job) -> None:
        """The newest state of a conversation takes the place of an older one that still waits."""
        self._jobs[job.key] = job
        self._news.set()
        self._quiet.clear()
        self._busy.set()

    @contextlib.asynccontextmanager
    async def away_from(self, owner: str) -> AsyncIterator[None]:
        """Inside, nothing is done for this owner: what was at hand has been given up. Behind it, it
        is begun anew from what the store holds then."""
        self._kept_from[owner] += 1
        try:
            if self._current and self._current.owner == owner and self._attempt_at_hand:
                await ended(self._attempt_at_hand)
            yield
        finally:
            self._kept_from[owner] -= 1
            self._kept_from += Counter()  # drops those that are at nothing
            self._news.set()

    async def idle(self) -> None:
        """Waits until nothing runs and nothing waits. The caller bounds the wait."""
        await self._quiet.wait()

    async def busy(self) -> None:
        """Waits until something runs or waits. The caller bounds the wait."""
        await self._busy.wait()

    # -- the worker ------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            await self._news.wait()
            key = next((k for k in self._jobs if k[0] not in self._kept_from), None)
            if key is None:
                self._news.clear()
                continue
            await self._attend(self._jobs.pop(key))
            if not self._jobs:
                self._busy.clear()
                self._quiet.set()

    async def _attend(self, job: Job) -> None:
        self._current = job
        self._attempt_at_hand = task = asyncio.create_task(self._attempt(job), name="keeper-job")
        try:
            await asyncio.wait([task])
            if task.cancelled():
                self._jobs.setdefault(self._current.key, self._current)
        finally:
            await ended(task)
            self._current = self._attempt_at_hand = None

    async def _attempt(self, job: Job) -> None:
        try:
            if self._policy.idle_s:
                await asyncio.sleep(self._policy.idle_s)
            await self._tend(job)
        except (ModelGone, StoreError) as exc:
            log.warning("background work for %s stopped: %s", job.conversation, exc)
            await self._again(self._current or job)
        except Exception:
            # The worker outlives whatever one conversation does to it.
            log.exception("background work for %s failed", job.conversation)
            self._observe("background_failed", conversation=job.conversation)

    async def _again(self, job: Job) -> None:
        await asyncio.sleep(RETRY_S)
        if job.attempts + 1 < ATTEMPTS_MOST and job.key not in self._jobs:
            self.wake(replace(job, attempts=job.attempts + 1))

    async def _tend(self, job: Job) -> None:
        for _ in range(STEPS_MOST):
            job = self._newest(job)
            history = await self._revisit(job)
            if not (history.nodes or history.active):
                return  # It was forgotten meanwhile.
            if history.written != history.active:
                await self._activate(job, history)
                continue
            step = await self._next_step(history)
            if step is None:
                await self._warm(job, history)
                return
            await self._carry_out(job, history, step)
        if job.key not in self._jobs:
            self.wake(job)

    def _is_backlog(self, history: History) -> bool:
        """Whether more is uncovered than the window holds: a long history that came all at once, or
        a chat that never paused.

        Then the model is not asked and nothing is warmed between the steps: it would work for
        minutes on contexts that no request can use yet.
        """
        return sum(n.n_tokens for n in history.nodes) > self._host().budget.window_tokens

    def _newest(self, job: Job) -> Job:
        self._current = self._jobs.pop(job.key, job)
        return self._current

    async def _revisit(self, job: Job) -> History:
        return await revisit(
            self._store,
            self._counter,
            job.owner,
            job.conversation,
            job.digests,
            system=job.system,
            tools=job.tools,
        )

    async def _next_step(self, history: History) -> Step | None:
        if not self._policy.compact:
            return None
        known = await self._store.summaries(history.owner, history.conversation)
        return next_step(
            blocks=history.active,
            weights=weights(history.active, known),
            nodes=history.nodes,
            message_tokens=self._host().budget.message_tokens,
            limits=self._limits.within(verbatim_room(history, self._host().budget, self._limits)),
        )

    @property
    def _scribe(self) -> Scribe:
        return Scribe(self._completer, self._counter, self._policy, self._host().budget)

    @property
    def _limits(self) -> Limits:
        return self._policy.limits(self._host().budget.window_tokens)

    # -- warm and activate -----------------------------------------------------------------------

    async def _warm(self, job: Job, history: History) -> None:
        room = room_for(self._host().budget, self._limits, max_tokens=None)
        try:
            assembled = context_for(history, self._policy, room, tokenizer=self._counter.tokenizer)
        except DoesNotFit:
            return  # Under a policy that refuses, so will the next request be.
        await self._evaluate(job, assembled.context)

    async def _evaluate(self, job: Job, context: Context) -> None:
        evaluated = await self._warmer.warm(job.owner, context, conversation=job.conversation)
        self._observe("warmed", conversation=job.conversation, evaluated=evaluated)

    async def _activate(self, job: Job, history: History) -> None:
        """Warms the context with the new blocks, then uses them. Turns that came meanwhile are
        warmed with them first, so that the next request finds all of it."""
        if not self._is_backlog(history):
            await self._warm_written(job, history)
            if job.key in self._jobs:
                return
        fresh = [b.id for b in history.written if b.activated_at is None]
        await self._store.activate(job.owner, fresh)
        self._observe("activated", conversation=job.conversation, summaries=fresh)

    async def _warm_written(self, job: Job, history: History) -> None:
        room = room_for(self._host().budget, self._limits, max_tokens=None)
        context = assemble(
            system=history.system,
            blocks=history.written,
            nodes=history.behind(history.written),
            room=room,
            tokenizer=self._counter.tokenizer,
        )
        await self._evaluate(job, context)

    # -- writing summaries -----------------------------------------------------------------------

    async def _carry_out(self, job: Job, history: History, step: Step) -> None:
        merged = history.active[step.index : step.index + 2] if isinstance(step, Merge) else ()
        at_once = self._is_backlog(history)
        task = Task(await span_of(self._store, self._counter, history, step), merged, at_once)
        self.span = task.nodes[0].depth, task.nodes[-1].depth
        try:
            written = await self._scribe.summary(
                history,
                task,
                model=self._host().model,
                clock=self._clock,
                redraft=self._redraft,
            )
        finally:
            self.span = None
        # Who forgets a message meanwhile must not find it in a summary again.
        summary = await self._store.add_summary(
            job.owner, written, read=task.nodes, shown=[s.id for s in history.active]
        )
        self._observe(
            "summarised",
            conversation=job.conversation,
            summary=summary.id,
            made_by=summary.made_by,
            rank=summary.rank,
            failed_checks=list(summary.failed_checks),
        )


async def ended(task: asyncio.Task[Any]) -> None:
    """The task, cancelled where it still runs, is over."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()):
        log.debug("a task that had to end: %r", error)


async def span_of(
    store: Store, counter: TokenCounter, history: History, step: Step
) -> tuple[Node, ...]:
    """The turns behind the new block, from the store where the context no longer holds them."""
    if isinstance(step, Summarize):
        return history.nodes[: step.n_nodes]
    left, right = history.active[step.index : step.index + 2]
    span = history.digests[left.first_depth : right.last_depth + 1]
    nodes, _ = await counted(counter, await store.nodes(history.owner, span))
    return nodes


def verbatim_room(history: History, budget: Budget, limits: Limits) -> int:
    """What the system prompt, the summaries and one more of them leave for verbatim turns."""
    room = room_for(budget, limits, max_tokens=None)
    system = history.system
    head = system.n_tokens + system.pinned_tokens + system.tools_tokens
    head += sum(b.n_tokens for b in history.active)
    markup = room.base_tokens + room.message_tokens + NOTE_TOKENS
    spare = limits.summary_tokens + budget.window_tokens // QUESTION_SHARE
    return room.prompt_tokens - head - markup - spare
