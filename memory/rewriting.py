"""Writes the summaries of a conversation again under another policy, for comparison.

The background of the background: it works only while the keeper rests, one block at a time, and a
block that is under way when a conversation wants the keeper is given up and begun anew. What is
written is stored block by block, so that an interrupted set can be gone on with.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, replace
from typing import Any

from memory.compaction import Merge, covered, next_rewrite, weights
from memory.conversations import History, counted, revisit
from memory.keeper import Host, Job, Keeper, Observer, ended, span_of, verbatim_room
from memory.policy import Limits, Policy, parse_policy
from memory.ports import Completer, ModelGone, TokenCounter
from memory.records import Rewrite, Summary
from memory.scribe import Scribe, Task
from memory.store import NotStored, Store, StoreError

log = logging.getLogger("chatfold.rewriting")

RUNS_MOST = 8
"""Sets that wait or are being written, of all owners together; each owner has one."""
STEPS_MOST = 1000
RESTARTS_MOST = 3
"""So often one block gives way to the keeper; then the keeper waits for it once, or a busy machine
would never finish it."""
ATTEMPTS_MOST = 3
RETRY_S = 2.0


class RewriterBusy(ValueError):
    """Too many sets wait already, or this owner has one under way."""


def policy_json(policy: Policy) -> str:
    """Every knob, to read and to go on with."""
    knobs = asdict(policy)
    knobs.pop("name")
    return json.dumps(knobs, ensure_ascii=False)


def stored_policy(rewrite: Rewrite) -> Policy:
    """Raises ValueError where the knobs are those of another version."""
    knobs = json.loads(rewrite.policy)
    return parse_policy(knobs | {"name": rewrite.policy_name}, source="The stored policy")


def planned(
    job: Job, policy: Policy, active: tuple[Summary, ...], *, newest: int, now: float
) -> Rewrite:
    """A set for the messages that the `newest` of the active summaries stand for. Raises ValueError
    where there is nothing to write again."""
    if not policy.compact:
        raise ValueError(f"the policy {policy.name!r} makes no summaries")
    chosen = active[-newest:] if newest > 0 else ()
    if not chosen:
        raise ValueError("no summary is in use here")
    return Rewrite(
        id=0,
        conversation=job.conversation,
        first_depth=chosen[0].first_depth,
        last_depth=chosen[-1].last_depth,
        last_digest=chosen[-1].last_digest,
        policy_name=policy.name,
        policy=policy_json(policy),
        before=tuple(s.id for s in chosen),
        created_at=now,
    )


@dataclass(slots=True, eq=False)
class Run:
    """A set on its way. `done` of its `of` messages have their block; `trouble` says why it
    stopped. `job` tells where its conversation stood when it was begun."""

    job: Job
    rewrite: int
    policy: Policy
    first_depth: int
    last_depth: int
    began_at: float
    blocks: int = 0
    done: int = 0
    interruptions: int = 0
    attempts: int = 0
    trouble: str = ""
    span: tuple[int, int] | None = None
    """Depths of the first and the last message of the block that was begun last."""
    at_work: bool = False
    """Whether a block is being written now; else it waits for the keeper or for other sets."""

    @property
    def key(self) -> tuple[str, int]:
        return self.job.owner, self.rewrite

    @property
    def of(self) -> int:
        return self.last_depth + 1 - self.first_depth


class Rewriter:
    """Owns one task. Its methods are for the event loop."""

    def __init__(
        self,
        *,
        store: Store,
        keeper: Keeper,
        completer: Completer,
        counter: TokenCounter,
        host: Callable[[], Host],
        observe: Observer,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._keeper = keeper
        self._completer = completer
        self._counter = counter
        self._host = host
        self._observe = observe
        self._clock = clock
        self._runs: dict[tuple[str, int], Run] = {}
        self._troubles: dict[tuple[str, int], str] = {}
        self._work_at_hand: tuple[Run, asyncio.Task[None]] | None = None
        self._news = asyncio.Event()
        self._rests = asyncio.Event()
        self._rests.set()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Rewriter runs={len(self._runs)}>"

    def start(self) -> None:
        self._task = asyncio.create_task(self._work(), name="rewriter")

    async def stop(self) -> None:
        """Ends the block at hand; the blocks before it are stored."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def begin(self, job: Job, rewrite: Rewrite, policy: Policy) -> Run:
        """Raises RewriterBusy. A set that was interrupted goes on where it stopped."""
        self.require_room(job.owner)
        first, last = rewrite.first_depth, rewrite.last_depth
        run = Run(job, rewrite.id, policy, first, last, began_at=self._clock())
        self._runs[run.key] = run
        self._troubles.pop(run.key, None)
        self._rests.clear()
        self._news.set()
        return run

    def require_room(self, owner: str) -> None:
        """Raises RewriterBusy."""
        if any(run.job.owner == owner for run in self._runs.values()):
            raise RewriterBusy("summaries are being written again already; wait or stop that")
        if len(self._runs) >= RUNS_MOST:
            raise RewriterBusy("too many others have summaries written again; try later")

    def run(self, owner: str, rewrite: int) -> Run | None:
        """As long as it waits or is being written."""
        return self._runs.get((owner, rewrite))

    def run_of(self, owner: str) -> Run | None:
        return next((r for r in self._runs.values() if r.job.owner == owner), None)

    def trouble(self, owner: str, rewrite: int) -> str:
        """Why a set that is not under way stopped, "" where nothing is known of it."""
        return self._troubles.get((owner, rewrite), "")

    def cancel(self, owner: str, rewrite: int | None = None) -> None:
        """The model is free at once. Without a number all of the owner's."""
        for key in [k for k in self._runs if k[0] == owner and rewrite in (None, k[1])]:
            run = self._runs.pop(key)
            if self._work_at_hand and self._work_at_hand[0] is run:
                self._work_at_hand[1].cancel()
        if not (self._runs or self._work_at_hand):
            self._rests.set()

    async def idle(self) -> None:
        """Waits until no set is under way. The caller bounds the wait."""
        await self._rests.wait()

    # -- the worker ------------------------------------------------------------------------------

    async def _work(self) -> None:
        try:
            while True:
                await self._news.wait()
                if not self._runs:
                    self._news.clear()
                    continue
                await self._attend(next(iter(self._runs.values())))
        finally:
            if self._work_at_hand:
                await ended(self._work_at_hand[1])

    async def _attend(self, run: Run) -> None:
        task = asyncio.create_task(self._attempt(run), name="rewrite")
        self._work_at_hand = run, task
        await asyncio.wait([task])
        self._work_at_hand = None
        if run.attempts and not run.trouble and run.key in self._runs:
            return  # to be tried again
        if run.trouble:
            self._troubles[run.key] = run.trouble
            self._observe("rewrite_failed", conversation=run.job.conversation)
        self._runs.pop(run.key, None)
        await self._warm_again(run)
        if not self._runs:
            self._rests.set()

    async def _attempt(self, run: Run) -> None:
        try:
            await self._carry_out(run)
            run.attempts = 0
        except (ModelGone, StoreError, ValueError) as exc:
            log.warning("writing the summaries of %s again: %s", run.job.conversation, exc)
            run.attempts += 1
            if isinstance(exc, NotStored | ValueError) or run.attempts >= ATTEMPTS_MOST:
                run.trouble = str(exc)
            else:
                await asyncio.sleep(RETRY_S)
        except Exception as exc:
            # As the keeper: the worker outlives whatever one conversation does to it.
            log.exception("writing the summaries of %s again failed", run.job.conversation)
            run.trouble = repr(exc)

    async def _carry_out(self, run: Run) -> None:
        for _ in range(STEPS_MOST):
            if not await self._while_quiet(run, lambda: self._step(run)):
                await self._store.finish_rewrite(run.job.owner, run.rewrite)
                self._observe("rewritten", conversation=run.job.conversation, blocks=run.blocks)
                return
            run.interruptions = 0
        raise ValueError("these are too many messages to write again at once")

    async def _while_quiet(self, run: Run, work: Callable[[], Coroutine[Any, Any, bool]]) -> bool:
        """What the work gives. It is begun anew where the keeper is wanted meanwhile."""
        while True:
            run.at_work = False
            await self._keeper.idle()
            run.at_work = True
            step = asyncio.create_task(work(), name="rewrite-step")
            wanted = asyncio.create_task(self._keeper.busy(), name="rewrite-gives-way")
            try:
                patient = run.interruptions >= RESTARTS_MOST
                await asyncio.wait(
                    [step] if patient else [step, wanted], return_when=asyncio.FIRST_COMPLETED
                )
                if step.done():
                    return step.result()
                run.interruptions += 1
            finally:
                await ended(step)
                await ended(wanted)

    async def _warm_again(self, run: Run) -> None:
        """Long prompts may have driven the chat's own from memory. Where it has gone on meanwhile,
        the keeper has seen to that already."""
        with contextlib.suppress(StoreError):
            entry = await self._store.conversation(run.job.owner, run.job.conversation)
            if entry and entry.updated_at <= run.began_at:
                self._keeper.wake(run.job)

    # -- one block -------------------------------------------------------------------------------

    async def _step(self, run: Run) -> bool:
        """Writes the next block; False when there is none. Raises NotStored where the set is
        gone."""
        owner, job = run.job.owner, run.job
        rewrite = await self._store.rewrite(owner, job.conversation, run.rewrite)
        if rewrite is None:
            raise NotStored("these summaries were forgotten")
        history = await self._history(run, rewrite)
        blocks = rewrite.blocks
        run.blocks, run.done = len(blocks), covered(history.active) - run.first_depth
        step = next_rewrite(
            blocks=blocks,
            weights=weights(blocks, rewrite.candidates),
            nodes=history.nodes,
            message_tokens=self._host().budget.message_tokens,
            limits=self._limits(run, history, n_before=len(history.active) - len(blocks)),
        )
        if step is None:
            return False
        merged = blocks[step.index : step.index + 2] if isinstance(step, Merge) else ()
        if isinstance(step, Merge):
            step = replace(step, index=step.index + len(history.active) - len(blocks))
        nodes = await span_of(self._store, self._counter, history, step)
        run.span = nodes[0].depth, nodes[-1].depth
        self._observe(
            "rewriting",
            owner=owner,
            conversation=job.conversation,
            first=nodes[0].depth,
            last=nodes[-1].depth,
        )
        scribe = Scribe(self._completer, self._counter, run.policy, self._host().budget)
        candidate = await scribe.summary(
            history, Task(nodes, merged), model=self._host().model, clock=self._clock
        )
        await self._store.add_candidate(owner, run.rewrite, candidate)
        return True

    async def _history(self, run: Run, rewrite: Rewrite) -> History:
        """The path up to the end of the set, with the set's own blocks in use behind those that
        stand before it. Raises ValueError where these do not reach it any more."""
        job = run.job
        history = await revisit(
            self._store,
            self._counter,
            job.owner,
            job.conversation,
            job.digests[: rewrite.last_depth + 1],
            system=job.system,
            tools=job.tools,
        )
        before = tuple(s for s in history.active if s.last_depth < rewrite.first_depth)
        if covered(before) != rewrite.first_depth:
            raise ValueError("the summaries before these have changed meanwhile")
        active = (*before, *rewrite.blocks)
        behind = history.digests[covered(active) :]
        nodes, _ = await counted(self._counter, await self._store.nodes(job.owner, behind))
        return replace(history, active=active, written=active, nodes=nodes, n_stored=len(nodes))

    def _limits(self, run: Run, history: History, *, n_before: int) -> Limits:
        """The policy's, less what the summaries before the set take of their budget, and with
        blocks that can be asked for with a prompt that fits."""
        budget = self._host().budget
        limits = run.policy.limits(budget.window_tokens)
        taken = sum(s.n_tokens for s in history.active[:n_before])
        room = verbatim_room(history, budget, limits)
        return replace(
            limits,
            summaries_tokens=max(2 * limits.summary_tokens, limits.summaries_tokens - taken),
            block_tokens=max(1, min(limits.block_tokens, room)),
        )
