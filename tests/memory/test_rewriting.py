"""Summaries written again under another policy, behind a keeper that comes first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from test_keeper import BUDGET, POLICY, SUMMARY, Desk

from memory import rewriting
from memory.context import Context
from memory.keeper import Host, Job
from memory.policy import Policy
from memory.ports import ModelGone
from memory.records import Rewrite, Summary
from memory.rewrites import SETS_MOST, Overtaken, TooManyRewrites
from memory.rewriting import (
    RESTARTS_MOST,
    Rewriter,
    RewriterBusy,
    Run,
    planned,
    stored_policy,
)
from memory.store import NotStored
from memory.transcript import chain

pytestmark = pytest.mark.anyio

SHORT = replace(POLICY, name="short", block=60, summary=24)
WAIT_S = 60.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewriting, "RETRY_S", 0.0)


class Bench:
    """A desk, and a rewriter beside its keeper."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.rewriter = Rewriter(
            store=desk.faulty,  # type: ignore[arg-type]
            keeper=desk.keeper,
            completer=desk.model,
            counter=desk.model,
            host=lambda: Host(BUDGET, "tiny"),
            observe=lambda event, /, **more: desk.events.append(event),
        )
        self.rewriter.start()

    async def begin(self, policy: Policy = SHORT, *, newest: int = 99) -> tuple[Rewrite, Run]:
        job, active = await self.job()
        plan = planned(job, policy, active, newest=newest, now=5.0)
        stored = await self.desk.store.begin_rewrite("ann", plan)
        return stored, self.rewriter.begin(job, stored, policy)

    async def job(self) -> tuple[Job, tuple[Summary, ...]]:
        digests = chain(self.desk.chats["ann"])
        found = await self.desk.store.deepest("ann", digests)
        assert found
        active, _ = await self.desk.store.covering("ann", found[0], digests)
        return Job("ann", found[0], digests, "Be kind."), active

    async def idle(self) -> None:
        async with asyncio.timeout(WAIT_S):
            await self.rewriter.idle()
            await self.desk.idle()

    async def read(self, rewrite: Rewrite) -> Rewrite:
        found = await self.desk.store.rewrite("ann", rewrite.conversation, rewrite.id)
        assert found
        return found


@pytest.fixture
async def bench(tmp_path: Path, anyio_backend: str) -> AsyncIterator[Bench]:
    desk = await Desk.open(tmp_path / "s.db", POLICY)
    found = Bench(desk)
    await desk.talk(14)
    yield found
    await found.rewriter.stop()
    await desk.close()


async def test_the_same_messages_get_blocks_as_the_other_policy_would_have_made_them(
    bench: Bench,
) -> None:
    _, before = await bench.job()
    rewrite, _ = await bench.begin()
    await bench.idle()
    made = await bench.read(rewrite)
    assert made.finished_at is not None and made.used_at is None
    assert stored_policy(made) == SHORT
    spans = [(s.first_depth, s.last_depth) for s in made.blocks]
    assert spans[0][0] == before[0].first_depth and spans[-1][1] == before[-1].last_depth
    assert all(a[1] + 1 == b[0] for a, b in pairwise(spans))
    assert len(made.candidates) > len(before)
    tokens = sum(s.n_tokens for s in made.blocks)
    assert tokens <= SHORT.limits(600).summaries_tokens
    # Nothing that a context is made of has changed.
    assert (await bench.job())[1] == before
    assert all(s.policy_digest == SHORT.digest for s in made.candidates)


async def test_only_the_newest_are_written_again_where_so_many_are_asked_for(bench: Bench) -> None:
    _, before = await bench.job()
    rewrite, _ = await bench.begin(newest=1)
    await bench.idle()
    made = await bench.read(rewrite)
    assert made.before == (before[-1].id,)
    assert made.blocks[0].first_depth == before[-1].first_depth
    assert made.blocks[-1].last_depth == before[-1].last_depth


async def test_taken_into_use_they_stand_in_every_context_and_the_old_ones_stay(
    bench: Bench,
) -> None:
    desk = bench.desk
    rewrite, _ = await bench.begin()
    await bench.idle()
    made = await bench.read(rewrite)
    old = {s.id: s for s in await desk.summaries()}
    await desk.store.use_rewrite("ann", made.conversation, made.id)
    job, active = await bench.job()
    assert {s.id for s in active} <= set(old)  # not before they are warm
    desk.events.clear()
    desk.keeper.wake(job)
    await desk.idle()
    assert desk.events.index("warm") < desk.events.index("activated")
    _, active = await bench.job()
    spans = [(s.first_depth, s.last_depth, s.text) for s in active]
    assert spans[: len(made.blocks)] == [(s.first_depth, s.last_depth, s.text) for s in made.blocks]
    known = {s.id: s for s in await desk.summaries()}
    assert {i: known[i] for i in old} == old
    # All of the set was in use, or never will be.
    assert all(s.activated_at for s in known.values())
    # The chat goes on, and what is merged from them stands before the old ones too.
    await desk.talk(20)
    _, later = await bench.job()
    assert later[0].generation == 1
    with pytest.raises(NotStored):
        await desk.store.use_rewrite("ann", made.conversation, made.id)


async def test_taken_back_the_old_ones_stand_there_again_once_they_are_warm(bench: Bench) -> None:
    desk = bench.desk
    _, before = await bench.job()
    rewrite, _ = await bench.begin()
    await bench.idle()
    with pytest.raises(NotStored):
        await desk.store.undo_rewrite("ann", rewrite.conversation, rewrite.id)
    await desk.store.use_rewrite("ann", rewrite.conversation, rewrite.id)
    desk.keeper.wake((await bench.job())[0])
    await desk.idle()
    known = {s.id: s for s in await desk.summaries()}
    with pytest.raises(NotStored):
        await desk.store.undo_rewrite("bert", rewrite.conversation, rewrite.id)
    await desk.store.undo_rewrite("ann", rewrite.conversation, rewrite.id)
    job, active = await bench.job()
    assert [s.generation for s in active[: len(before)]] != [0] * len(before)  # not warm yet
    desk.keeper.wake(job)
    await desk.idle()
    _, active = await bench.job()
    assert [(s.text, s.parents) for s in active] == [(s.text, s.parents) for s in before]
    assert {s.id: s for s in await desk.summaries() if s.id in known} == known
    assert (await bench.read(rewrite)).used_at is None
    # The chat goes on from them.
    await desk.talk(20)
    _, later = await bench.job()
    assert later[0].generation == 2


async def test_an_earlier_set_is_not_taken_back_below_a_later_one(bench: Bench) -> None:
    desk = bench.desk
    first, _ = await bench.begin()
    await bench.idle()
    await desk.store.use_rewrite("ann", first.conversation, first.id)
    desk.keeper.wake((await bench.job())[0])
    await desk.idle()
    second, _ = await bench.begin(newest=1)
    await bench.idle()
    await desk.store.use_rewrite("ann", second.conversation, second.id)
    with pytest.raises(Overtaken):
        await desk.store.undo_rewrite("ann", first.conversation, first.id)
    await desk.store.undo_rewrite("ann", second.conversation, second.id)
    await desk.store.undo_rewrite("ann", first.conversation, first.id)


async def test_a_block_under_way_gives_way_to_the_keeper_and_is_begun_anew(bench: Bench) -> None:
    desk, writing, held = bench.desk, asyncio.Event(), asyncio.Event()

    async def slow(context: Context) -> None:
        writing.set()
        await held.wait()

    desk.model.on_complete = slow
    rewrite, run = await bench.begin()
    await asyncio.wait_for(writing.wait(), WAIT_S)
    assert run.at_work
    desk.model.events.clear()
    desk.model.on_complete = _nothing
    await desk.ask("And the roses?")
    async with asyncio.timeout(WAIT_S):
        await desk.idle()
    assert desk.model.freed == 1 and "warm" in desk.model.events
    held.set()
    await bench.idle()
    assert (await bench.read(rewrite)).finished_at is not None


async def test_after_some_interruptions_the_block_is_written_to_its_end(bench: Bench) -> None:
    desk, writing, held = bench.desk, asyncio.Event(), asyncio.Event()

    async def slow(context: Context) -> None:
        writing.set()
        await held.wait()

    desk.model.on_complete = slow
    job, _ = await bench.job()
    rewrite, run = await bench.begin()
    for _ in range(RESTARTS_MOST):
        await asyncio.wait_for(writing.wait(), WAIT_S)
        writing.clear()
        desk.keeper.wake(job)
    await asyncio.wait_for(writing.wait(), WAIT_S)
    assert run.interruptions == RESTARTS_MOST
    desk.keeper.wake(job)
    await desk.idle()
    assert not held.is_set() and desk.model.freed == RESTARTS_MOST
    held.set()
    await bench.idle()
    assert (await bench.read(rewrite)).finished_at is not None


async def test_stopped_it_frees_the_model_and_goes_on_from_what_is_written(bench: Bench) -> None:
    desk, writing = bench.desk, asyncio.Event()

    async def hangs_at_the_third(context: Context) -> None:
        if len(desk.model.asked) - n_before == 3:
            writing.set()
            await asyncio.Event().wait()

    n_before = len(desk.model.asked)
    desk.model.on_complete = hangs_at_the_third
    rewrite, _ = await bench.begin()
    await asyncio.wait_for(writing.wait(), WAIT_S)
    bench.rewriter.cancel("bob", rewrite.id)
    assert bench.rewriter.run("ann", rewrite.id)
    bench.rewriter.cancel("ann", rewrite.id)
    await bench.idle()
    assert desk.model.freed == 1 and bench.rewriter.run("ann", rewrite.id) is None
    half = await bench.read(rewrite)
    assert len(half.candidates) == 2 and half.finished_at is None
    with pytest.raises(NotStored):
        await desk.store.use_rewrite("ann", half.conversation, half.id)
    desk.model.on_complete = _nothing
    job, _ = await bench.job()
    bench.rewriter.begin(job, half, stored_policy(half))
    await bench.idle()
    whole = await bench.read(rewrite)
    assert whole.candidates[:2] == half.candidates and whole.finished_at is not None


async def test_a_model_that_is_gone_is_tried_again_and_then_said(bench: Bench) -> None:
    async def gone(context: Context) -> None:
        raise ModelGone("it crashed")

    bench.desk.model.on_complete = gone
    rewrite, _ = await bench.begin()
    await bench.idle()
    assert bench.rewriter.trouble("ann", rewrite.id) == "it crashed"
    assert (await bench.read(rewrite)).candidates == ()
    bench.desk.model.on_complete = _nothing
    bench.desk.faulty.fails["add_candidate"] = 1
    job, _ = await bench.job()
    bench.rewriter.begin(job, rewrite, SHORT)
    await bench.idle()
    assert (await bench.read(rewrite)).finished_at is not None
    assert bench.rewriter.trouble("ann", rewrite.id) == ""


async def test_what_is_forgotten_meanwhile_is_not_written_to_its_end(bench: Bench) -> None:
    desk, writing, held = bench.desk, asyncio.Event(), asyncio.Event()

    async def slow(context: Context) -> None:
        writing.set()
        await held.wait()

    desk.model.on_complete = slow
    rewrite, _ = await bench.begin()
    await asyncio.wait_for(writing.wait(), WAIT_S)
    await desk.store.forget_conversation("ann", rewrite.conversation)
    held.set()
    await bench.idle()
    assert await desk.store.rewrites("ann", rewrite.conversation) == []
    assert bench.rewriter.trouble("ann", rewrite.id)


async def test_sets_are_bounded_and_one_owner_has_one_under_way(bench: Bench) -> None:
    bench.desk.model.on_complete = lambda context: asyncio.Event().wait()  # type: ignore[assignment]
    rewrite, _ = await bench.begin()
    job, active = await bench.job()
    with pytest.raises(RewriterBusy):
        bench.rewriter.begin(job, rewrite, SHORT)
    plan = planned(job, SHORT, active, newest=1, now=5.0)
    for _ in range(SETS_MOST - 1):
        await bench.desk.store.begin_rewrite("ann", plan)
    with pytest.raises(TooManyRewrites):
        await bench.desk.store.begin_rewrite("ann", plan)
    bench.rewriter.cancel("ann")
    assert not await bench.desk.store.discard_rewrite("bob", rewrite.conversation, rewrite.id)
    assert await bench.desk.store.discard_rewrite("ann", rewrite.conversation, rewrite.id)
    await bench.desk.store.begin_rewrite("ann", plan)


async def test_a_set_whose_place_is_taken_cannot_be_used(bench: Bench) -> None:
    """What stands before it was merged with a part of what it stands for."""
    desk = bench.desk
    rewrite, _ = await bench.begin(newest=1)
    await bench.idle()
    _, active = await bench.job()
    wide = replace(
        active[-1],
        id=0,
        first_depth=0,
        first_digest=active[0].first_digest,
        text=SUMMARY,
        rank=2,
    )
    stored = await desk.store.add_summary("ann", wide)
    await desk.store.activate("ann", [stored.id])
    with pytest.raises(Overtaken):
        await desk.store.use_rewrite("ann", rewrite.conversation, rewrite.id)
    assert (await bench.read(rewrite)).used_at is None
    assert all(s.generation == 0 for s in await desk.summaries())


def test_nothing_is_planned_where_nothing_is_in_use_or_made() -> None:
    job = Job("ann", "c", (), "")
    with pytest.raises(ValueError, match="no summary"):
        planned(job, POLICY, (), newest=3, now=1.0)
    with pytest.raises(ValueError, match="makes no summaries"):
        planned(job, replace(POLICY, compact=False), (), newest=3, now=1.0)


async def _nothing(context: Context) -> None:
    pass
