"""The keeper at work: what happens in which order, and what happens when something goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from memory import keeper as keeper_module
from memory.context import BLOCK_HEADER, Context, Room
from memory.conversations import Assembled, answered, context_for, recognise, room_for
from memory.keeper import ATTEMPTS_MOST, Host, Job, Keeper
from memory.policy import Policy
from memory.ports import Budget, Completion, ModelGone
from memory.records import EXTRACTIVE, MODEL, Node, Summary
from memory.scribe import Scribe, Task
from memory.store import Store, StoreUnavailable
from memory.transcript import ASSISTANT, USER, Message, Transcript, chain
from proxy.errors import ApiError
from proxy.inspecting.acts import NotDone, correct
from proxy.pages.chats import read_chat
from proxy.tuning.house import House, verbatim
from proxy.tuning.simulation import SimulatedEngine

pytestmark = pytest.mark.anyio

BUDGET = Budget(window_tokens=600, message_tokens=3, base_tokens=2)
POLICY = Policy(
    name="test",
    high=200,
    low=90,
    block=200,
    summaries=150,
    summary=40,
    answer=60,
    verbatim_turns=1,
)
SUMMARY = "The user wants roses by the wall and decided to water them every second morning."


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "RETRY_S", 0.0)


Hook = Callable[[Context], Awaitable[None]]


async def nothing(context: Context) -> None:
    pass


@dataclass
class Model:
    """Completer, Warmer and TokenCounter. Hooks run inside the calls and may wait or raise."""

    events: list[str]
    text: str = SUMMARY
    tokenizer: str = "words"
    on_complete: Hook = nothing
    on_warm: Hook = nothing
    asked: list[Context] = field(default_factory=list)
    warmed: list[Context] = field(default_factory=list)
    owners: set[str] = field(default_factory=set)
    freed: int = 0

    async def complete(
        self, owner: str, context: Context, *, conversation: str, max_tokens: int
    ) -> Completion:
        self.events.append("complete")
        self.asked.append(context)
        self.owners.add(owner)
        try:
            await self.on_complete(context)
        except asyncio.CancelledError:
            self.freed += 1
            raise
        return Completion(self.text, 0, 0, 0, "stop")

    async def warm(self, owner: str, context: Context, *, conversation: str) -> int:
        self.events.append("warm")
        self.owners.add(owner)
        await self.on_warm(context)
        self.warmed.append(context)
        return 0

    async def count(self, texts: Sequence[str]) -> list[int]:
        return [len(t.split()) for t in texts]


class Faulty:
    """The store, but for the methods named in `fails`, which raise as often as it says."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.fails: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        if self.fails.get(name, 0) > 0:
            self.fails[name] -= 1
            return self._fail
        return getattr(self._store, name)

    async def _fail(self, *args: object, **kwargs: object) -> None:
        raise StoreUnavailable("the disk is full")


@dataclass
class Desk:
    """A keeper at work beside chats that are led by hand."""

    store: Store
    faulty: Faulty
    model: Model
    events: list[str]
    keeper: Keeper
    fields: list[dict[str, object]]
    policy: Policy
    chats: dict[str, list[Message]] = field(default_factory=dict)

    @classmethod
    async def open(cls, path: Path, policy: Policy, model: Model | None = None) -> Desk:
        events: list[str] = [] if model is None else model.events
        model = model or Model(events)
        store = await Store.open(path)
        faulty, fields = Faulty(store), list[dict[str, object]]()

        def observe(event: str, /, **more: object) -> None:
            events.append(event)
            fields.append(more)

        keeper = Keeper(
            store=faulty,  # type: ignore[arg-type]
            completer=model,
            warmer=model,
            counter=model,
            policy=policy,
            host=lambda: Host(BUDGET, "tiny"),
            observe=observe,
        )
        keeper.start()
        return cls(store, faulty, model, events, keeper, fields, policy)

    async def close(self) -> None:
        await self.keeper.stop()
        await self.store.close()

    async def ask(
        self,
        text: str,
        *,
        owner: str = "ann",
        answer: str = "Yes.",
        room: Room | None = None,
        counted: bool = True,
    ) -> Assembled:
        """One whole turn: what would have been sent for it. The keeper is woken at its end. Not
        `counted` is an answer whose tokens nobody told.
        """
        messages = self.chats.setdefault(owner, [])
        messages.append(Message(USER, text))
        transcript = Transcript("", tuple(messages))
        history = await recognise(self.store, self.model, owner, transcript, system="Be kind.")
        room = room or room_for(BUDGET, self.policy.limits(600), max_tokens=None)
        sent = context_for(history, self.policy, room, tokenizer=self.model.tokenizer)
        nodes, digests = answered(
            history,
            text=answer,
            n_tokens=len(answer.split()) if counted else -1,
            token_ids=None,
            tokenizer=self.model.tokenizer if counted else "",
            created_at=1.0,
        )
        await self.store.append(owner, nodes, conversation=history.conversation)
        await self.store.activate(owner, sent.activates)
        messages.append(Message(ASSISTANT, answer))
        self.keeper.wake(Job(owner, history.conversation, digests, "Be kind."))
        return sent

    async def talk(self, turns: int, *, owner: str = "ann", pause: bool = True) -> None:
        for _ in range(turns):
            i = len(self.chats.get(owner, [])) // 2
            await self.ask(question(i), owner=owner, answer=ANSWERS[i % len(ANSWERS)])
            if pause:
                await self.idle()

    async def idle(self) -> None:
        await self.keeper.idle()

    async def summaries(self, owner: str = "ann") -> list[Summary]:
        found = await self.store.deepest(owner, chain(self.chats[owner]))
        return await self.store.summaries(owner, found[0]) if found else []

    async def past_the_mark(self) -> None:
        """Talks until the next answer but one brings the chat above the high mark."""
        await self.talk(FEW)
        assert await self.summaries() == []


def question(i: int) -> str:
    return (
        f"Now for part {i} of the garden: I want roses by the wall, so tell me what they need in "
        "summer, please, and how often I should water them when it is dry."
    )


ANSWERS = (
    "Roses by a wall need sun and deep water. I suggest every second morning in dry weeks.",
    "Then it is decided: water every second morning, and mulch the bed so that it stays moist.",
)
FEW = 3
"""Turns that stay below the high mark; one more passes it."""


@pytest.fixture
async def desk(tmp_path: Path, anyio_backend: str) -> AsyncIterator[Desk]:
    opened = await Desk.open(tmp_path / "store.db", POLICY)
    yield opened
    await opened.close()


@pytest.fixture
async def open_desk(tmp_path: Path, anyio_backend: str) -> AsyncIterator[Callable[..., Any]]:
    opened: list[Desk] = []

    async def open_(policy: Policy, model: Model | None = None) -> Desk:
        opened.append(await Desk.open(tmp_path / "store.db", policy, model))
        return opened[-1]

    yield open_
    for desk in opened:
        await desk.close()


# in which order


async def test_a_summary_is_written_stored_warmed_and_then_used(desk: Desk) -> None:
    await desk.past_the_mark()
    desk.events.clear()
    seen: list[list[float | None]] = []

    async def look(context: Context) -> None:
        seen.append([s.activated_at for s in await desk.summaries()])

    desk.model.on_warm = look
    await desk.talk(1)
    assert desk.events == [
        "complete",
        "summarised",
        "warm",
        "warmed",
        "activated",
        "warm",
        "warmed",
    ]
    assert seen[0] == [None], "stored and not in use when it is warmed"
    (summary,) = await desk.summaries()
    assert summary.activated_at is not None
    assert desk.model.warmed[-1].shape.summaries == 1


async def test_what_the_next_request_begins_with_is_what_was_warmed(desk: Desk) -> None:
    for _ in range(12):
        sent = await desk.ask(question(0), answer=ANSWERS[0])
        if desk.model.warmed:
            warm = desk.model.warmed[-1].messages
            assert sent.context.messages[: len(warm)] == warm
        await desk.idle()
    assert len(await desk.summaries()) > 2


async def test_a_summary_is_not_used_before_it_is_warm(desk: Desk) -> None:
    await desk.past_the_mark()
    go = asyncio.Event()
    reached = asyncio.Event()

    async def wait(context: Context) -> None:
        reached.set()
        await go.wait()

    desk.model.on_warm = wait
    await desk.talk(1, pause=False)
    await reached.wait()
    assert [s.activated_at for s in await desk.summaries()] == [None]
    sent = await desk.ask(question(9))
    assert sent.context.shape.summaries == 0
    assert sent.context.shape.dropped_messages == 0
    assert sent.activates == ()
    go.set()
    await desk.idle()
    assert (await desk.ask(question(9))).context.shape.summaries == 1


async def test_a_summary_is_used_before_it_is_warm_when_nothing_else_fits(desk: Desk) -> None:
    await desk.past_the_mark()
    go, reached = asyncio.Event(), asyncio.Event()

    async def wait(context: Context) -> None:
        reached.set()
        await go.wait()

    desk.model.on_warm = wait
    await desk.talk(1, pause=False)
    await reached.wait()
    (summary,) = await desk.summaries()
    small = Room(prompt_tokens=220, message_tokens=3, base_tokens=2, step_tokens=100)
    sent = await desk.ask(question(9), room=small)
    assert sent.activates == (summary.id,)
    assert sent.context.shape.summaries == 1
    assert sent.context.shape.dropped_messages == 0
    assert (await desk.summaries())[0].activated_at is not None
    go.set()
    await desk.idle()


async def test_an_answer_that_comes_while_a_summary_is_warmed_is_warmed_with_it(
    desk: Desk,
) -> None:
    await desk.past_the_mark()
    latest = "And a last word about the pond."
    reached, go = asyncio.Event(), asyncio.Event()

    async def wait(context: Context) -> None:
        reached.set()
        await go.wait()

    desk.model.on_warm = wait
    await desk.talk(1, pause=False)
    await reached.wait()
    await desk.ask(latest, answer="Keep it shallow.")
    desk.events.clear()
    desk.model.warmed.clear()
    go.set()
    await desk.idle()
    assert desk.events[:4] == ["warmed", "warm", "warmed", "activated"]
    warm = desk.model.warmed[1]
    assert warm.shape.summaries == 1
    assert verbatim(warm)[-2:] == [(USER, latest), (ASSISTANT, "Keep it shallow.")]


async def test_summaries_are_used_in_the_order_of_the_chat(desk: Desk) -> None:
    await desk.talk(20)
    head = desk.model.warmed[-1].messages[0]
    active = sorted(
        (s for s in await desk.summaries() if BLOCK_HEADER + s.text in head.parts),
        key=lambda s: s.first_depth,
    )
    assert head.parts == ("Be kind.", *(BLOCK_HEADER + s.text for s in active))
    assert len(active) >= 2


# once


async def test_no_span_is_summarised_twice(desk: Desk) -> None:
    await desk.talk(12)
    spans = [(s.first_depth, s.last_depth) for s in await desk.summaries() if s.rank == 0]
    assert len(spans) == len(set(spans)) >= 3
    assert spans[0][0] == 0
    assert [a[1] + 1 for a in spans][:-1] == [b[0] for b in spans][1:]


async def test_being_woken_again_starts_nothing_twice(desk: Desk) -> None:
    await desk.past_the_mark()
    go, reached = asyncio.Event(), asyncio.Event()

    async def wait(context: Context) -> None:
        reached.set()
        await go.wait()

    desk.model.on_complete = wait
    await desk.talk(1, pause=False)
    await reached.wait()
    for _ in range(5):
        await desk.ask("ok")
    assert (desk.keeper.running, desk.keeper.pending) == (1, 1)
    go.set()
    await desk.idle()
    assert desk.events.count("complete") == 1
    assert (desk.keeper.running, desk.keeper.pending) == (0, 0)


async def test_two_chats_need_as_many_summaries_as_each_alone(
    tmp_path: Path, anyio_backend: str
) -> None:
    async def completions(name: str, owners: list[str]) -> int:
        desk = await Desk.open(tmp_path / f"{name}.db", POLICY)
        for _ in range(15):
            for owner in owners:
                await desk.talk(1, owner=owner)
        assert desk.model.owners == set(owners)
        await desk.close()
        return desk.events.count("complete")

    alone = await completions("ann", ["ann"]) + await completions("bob", ["bob"])
    assert await completions("both", ["ann", "bob"]) == alone > 4


async def test_a_restart_writes_nothing_again_and_sends_the_same_bytes(open_desk) -> None:  # type: ignore[no-untyped-def]
    first = await open_desk(POLICY)
    await first.talk(14)
    sent = await first.ask("What now?")
    await first.idle()
    await first.close()
    second = await open_desk(POLICY)
    second.chats = {"ann": first.chats["ann"][:-2]}
    assert (await second.ask("What now?")).context == sent.context
    await second.idle()
    assert second.events.count("complete") == 0


async def test_an_edit_writes_anew_only_what_it_changed(desk: Desk) -> None:
    await desk.talk(20)
    before = [s for s in await desk.summaries() if s.rank == 0]
    desk.chats["ann"] = desk.chats["ann"][:16]
    for i in range(8):
        await desk.ask(question(i).replace("wall", "gate"), answer=ANSWERS[0])
        await desk.idle()
    kept = [s for s in before if s.last_depth < 16]
    new = [s for s in await desk.summaries() if s.rank == 0 and s not in before]
    assert kept
    assert new
    assert min(s.first_depth for s in new) == kept[-1].last_depth + 1


# what goes wrong


async def gone(context: Context) -> None:
    raise ModelGone("restarting")


async def test_a_model_that_comes_back_is_asked_again(desk: Desk) -> None:
    await desk.past_the_mark()

    async def once(context: Context) -> None:
        desk.model.on_complete = nothing
        raise ModelGone("restarting")

    desk.model.on_complete = once
    await desk.talk(1)
    assert desk.events.count("complete") == 2
    assert [s.made_by for s in await desk.summaries()] == [MODEL]
    assert desk.events[-3:] == ["activated", "warm", "warmed"]


@pytest.mark.parametrize("hook", ["on_complete", "on_warm"])
async def test_a_model_that_stays_away_is_asked_a_few_times(desk: Desk, hook: str) -> None:
    await desk.past_the_mark()
    setattr(desk.model, hook, gone)
    desk.events.clear()
    await desk.talk(1)
    calls = "complete" if hook == "on_complete" else "warm"
    assert desk.events.count(calls) == ATTEMPTS_MOST
    assert "activated" not in desk.events
    assert (desk.keeper.running, desk.keeper.pending) == (0, 0)
    # The next answer begins it anew, with what is there.
    setattr(desk.model, hook, nothing)
    desk.events.clear()
    await desk.talk(1)
    assert desk.events.count("activated") == 1
    assert len(await desk.summaries()) == 1
    assert desk.events.count("complete") == (1 if hook == "on_complete" else 0)


async def test_a_retry_goes_on_with_the_newest_state(desk: Desk) -> None:
    """The answer that came just before the model went away is warmed with the summary too."""
    await desk.past_the_mark()
    reached, go = asyncio.Event(), asyncio.Event()

    async def leave_at_the_second(context: Context) -> None:
        if not reached.is_set():
            reached.set()
            await go.wait()
        else:
            desk.model.on_warm = nothing
            raise ModelGone("restarting")

    desk.model.on_warm = leave_at_the_second
    await desk.talk(1, pause=False)
    await reached.wait()
    await desk.ask("And a last word.", answer="Mulch.")
    desk.model.warmed.clear()
    go.set()
    await desk.idle()
    before, *after = desk.model.warmed
    assert verbatim(before)[-1] != (ASSISTANT, "Mulch.")
    assert after
    assert all(verbatim(c)[-1] == (ASSISTANT, "Mulch.") for c in after)
    assert after[-1].shape.summaries == 1


@pytest.mark.parametrize("method", ["covering", "nodes", "summaries", "add_summary", "activate"])
@pytest.mark.parametrize("times", [1, 100])
async def test_a_store_that_fails_in_the_background_leaves_the_chat_going(
    desk: Desk, method: str, times: int
) -> None:
    await desk.past_the_mark()
    desk.faulty.fails = {method: times}
    await desk.talk(1)
    assert desk.faulty.fails[method] == max(0, times - ATTEMPTS_MOST)
    desk.faulty.fails = {}
    sent = await desk.ask("Are you there?")
    await desk.idle()
    assert sent.context.shape.dropped_messages == 0
    assert [s.activated_at is not None for s in await desk.summaries()] == [True]


async def test_an_unforeseen_error_is_told_and_other_chats_go_on(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    async def break_for_ann(context: Context) -> None:
        if "of the garden" in context.messages[1].text:
            raise ZeroDivisionError

    await desk.past_the_mark()
    desk.model.on_complete = break_for_ann
    await desk.talk(1)
    assert "background_failed" in desk.events
    assert "ZeroDivisionError" in caplog.text
    for i in range(5):
        await desk.ask(question(i).replace("garden", "orchard"), owner="bob", answer=ANSWERS[0])
        await desk.idle()
    assert (await desk.summaries("bob"))[0].activated_at is not None


async def test_a_conversation_forgotten_while_it_is_summarised_leaves_nothing(
    desk: Desk,
) -> None:
    await desk.past_the_mark()

    async def forget(context: Context) -> None:
        found = await desk.store.deepest("ann", chain(desk.chats["ann"]))
        assert found is not None
        await desk.store.forget_conversation("ann", found[0])

    desk.model.on_complete = forget
    n_warmed = len(desk.model.warmed)
    await desk.talk(1)
    assert (await desk.store.status())["messages"] == 0
    assert (await desk.store.status())["summaries"] == 0
    assert desk.events.count("complete") == 1
    assert len(desk.model.warmed) == n_warmed, "a chat that is no more was warmed"


async def test_work_for_an_owner_is_given_up_let_alone_and_begun_anew(desk: Desk) -> None:
    await desk.past_the_mark()
    reached = asyncio.Event()

    async def wait(context: Context) -> None:
        reached.set()
        await asyncio.Event().wait()

    async def heard(context: Context) -> None:
        others.set()

    others = asyncio.Event()
    desk.model.on_complete = wait
    await desk.talk(1, pause=False)
    await reached.wait()
    async with desk.keeper.away_from("ann"):
        assert desk.model.freed == 1
        desk.model.on_complete, desk.model.on_warm = nothing, heard
        desk.events.clear()
        desk.model.owners.clear()
        await desk.talk(1, pause=False)
        await desk.talk(1, owner="bob", pause=False)
        await others.wait()
        assert "complete" not in desk.events
        assert desk.model.owners == {"bob"}
    await desk.idle()
    assert desk.events.count("complete") == 1
    assert [s.activated_at is not None for s in await desk.summaries()] == [True]


async def test_a_message_forgotten_while_it_is_summarised_is_in_no_summary(desk: Desk) -> None:
    await desk.past_the_mark()
    digests = chain(desk.chats["ann"])

    async def forget(context: Context) -> None:
        desk.model.on_complete = nothing
        await desk.store.forget_message("ann", digests[0])

    desk.model.on_complete = forget
    await desk.talk(1)
    assert await desk.summaries() == []
    await desk.talk(1)
    (summary,) = await desk.summaries()
    assert (summary.first_depth, summary.activated_at is not None) == (0, True)
    first, second = desk.model.asked
    assert any(question(0) in m.text for m in first.messages)
    assert not any(question(0) in m.text for m in second.messages)


@pytest.mark.parametrize("when", ["before its turns are read", "while it is written"])
async def test_a_message_forgotten_while_its_summaries_are_merged_is_in_none(  # type: ignore[no-untyped-def]
    open_desk, when: str
) -> None:
    desk = await open_desk(replace(POLICY, merge_from="summaries"))
    await desk.ask(f"The lilies stay. {question(0)}", answer=ANSWERS[0])
    root, read = chain(desk.chats["ann"])[0], desk.store.nodes
    forgotten = 0

    async def forget() -> None:
        nonlocal forgotten
        if not forgotten:
            first = (await desk.summaries())[0]
            assert (first.first_depth, first.rank) == (0, 0)
            assert "lilies" in first.text
            forgotten = await desk.store.forget_message("ann", root)

    async def nodes(owner: str, digests: Sequence[bytes]) -> list[Node]:
        summaries = await desk.summaries()
        if root in digests and summaries and summaries[0].activated_at is not None:
            await forget()
        return await read(owner, digests)

    async def complete(context: Context) -> None:
        desk.model.text = SUMMARY + ("lilies" in context.messages[1].text) * " The lilies stay."
        if len(context.messages) == 2:
            await forget()

    desk.model.on_complete = complete
    if when == "before its turns are read":
        desk.faulty.nodes = nodes
    await desk.talk(30)
    assert forgotten
    summaries = await desk.summaries()
    assert any(s.first_depth == 0 and s.rank > 0 for s in summaries)
    assert not any("lilies" in s.text for s in summaries)


async def test_a_correction_of_what_was_forgotten_meanwhile_is_refused(desk: Desk) -> None:
    await desk.talk(FEW + 1)
    (old,) = await desk.summaries()
    chat = await read_chat(desk.store, "ann", old.conversation)
    assert chat is not None
    await desk.store.forget_message("ann", chat.digests[0])
    with pytest.raises(NotDone):
        await correct(desk.store, desk.model, chat, old, old.text)
    assert await desk.summaries() == []


# stopping


async def test_stopping_while_the_model_writes_frees_it_and_keeps_nothing(open_desk) -> None:  # type: ignore[no-untyped-def]
    desk = await open_desk(POLICY)
    await desk.past_the_mark()
    reached = asyncio.Event()

    async def wait(context: Context) -> None:
        reached.set()
        await asyncio.Event().wait()

    desk.model.on_complete = wait
    await desk.talk(1, pause=False)
    await reached.wait()
    await desk.keeper.stop()
    assert desk.model.freed == 1
    assert await desk.summaries() == []
    assert desk.keeper.running == 0
    again = await open_desk(POLICY)
    again.chats = desk.chats
    await again.talk(1)
    assert again.events.count("complete") == 1
    assert [s.first_depth for s in await again.summaries()] == [0]


async def test_stopping_while_a_summary_is_warmed_keeps_it_for_later(open_desk) -> None:  # type: ignore[no-untyped-def]
    desk = await open_desk(POLICY)
    await desk.past_the_mark()
    reached = asyncio.Event()

    async def wait(context: Context) -> None:
        reached.set()
        await asyncio.Event().wait()

    desk.model.on_warm = wait
    await desk.talk(1, pause=False)
    await reached.wait()
    await desk.keeper.stop()
    assert [s.activated_at for s in await desk.summaries()] == [None]
    again = await open_desk(POLICY)
    again.chats = desk.chats
    await again.talk(1)
    assert again.events.count("complete") == 0
    assert [s.activated_at is not None for s in await again.summaries()] == [True]


async def test_stopping_before_anything_was_started_is_no_error(desk: Desk) -> None:
    await desk.keeper.stop()
    await desk.keeper.stop()


# what a summary says


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("", "empty"),
        ("I'm sorry, but I cannot summarize this conversation.", "refusal"),
        ("The user wants roses. " * 60, "too_long"),
        ("The user wants roses. " * 6, "repetition"),
        ('{"name": "summarize", "arguments": {"text": "roses"}}', "tool_call"),
        ("The user asked Margaret for 4711 roses by the wall.", "invented_number"),
    ],
)
async def test_a_text_that_fails_the_checks_gives_way_to_the_chats_own_sentences(
    desk: Desk, text: str, check: str
) -> None:
    desk.model.text = text
    await desk.talk(FEW + 1)
    (summary,) = await desk.summaries()
    assert summary.made_by == EXTRACTIVE
    assert check in summary.failed_checks
    assert "roses" in summary.text
    assert text == "" or text not in summary.text
    assert "Margaret" not in summary.text


async def test_a_good_text_is_kept_as_it_is(desk: Desk) -> None:
    await desk.talk(FEW + 1)
    (summary,) = await desk.summaries()
    assert summary.made_by == MODEL
    assert summary.failed_checks == ()
    assert summary.text.startswith(SUMMARY)
    assert summary.model == "tiny"
    assert summary.policy_digest == POLICY.digest
    assert summary.n_tokens == len((BLOCK_HEADER + summary.text).split())


@pytest.mark.parametrize("method", ["model", "extractive"])
async def test_exact_facts_and_standing_orders_are_in_the_block(open_desk, method: str) -> None:  # type: ignore[no-untyped-def]
    desk = await open_desk(replace(POLICY, method=method, summary=60))
    await desk.ask("Call me Kenji. Always answer in French, please.", answer="Very well, Kenji.")
    await desk.ask("The fence costs 4,811.50 euros and https://example.org/f?id=7 sells it.")
    await desk.talk(FEW)
    first = (await desk.summaries())[0]
    assert first.last_depth >= 3
    for fact in ("Kenji", "Always answer in French", "4,811.50", "https://example.org/f?id=7"):
        assert fact in first.text


async def test_a_policy_without_summaries_never_asks_for_one(open_desk) -> None:  # type: ignore[no-untyped-def]
    desk = await open_desk(replace(POLICY, compact=False))
    await desk.talk(25)
    assert "complete" not in desk.events
    assert await desk.summaries() == []
    assert desk.model.warmed[-1].shape.dropped_messages > 0


async def test_an_extractive_policy_never_asks_the_model(open_desk) -> None:  # type: ignore[no-untyped-def]
    desk = await open_desk(replace(POLICY, method="extractive"))
    await desk.talk(20)
    assert "complete" not in desk.events
    assert {s.made_by for s in await desk.summaries()} == {EXTRACTIVE}
    assert max(s.rank for s in await desk.summaries()) > 0


async def test_a_summary_is_asked_for_behind_the_chats_own_context(desk: Desk) -> None:
    """Whose tokens are in the KV cache: only the instruction is new."""
    await desk.talk(FEW)
    warm = desk.model.warmed[-1].messages
    await desk.talk(1)
    *head, instruction = desk.model.asked[0].messages
    assert tuple(head) == warm[: len(head)]
    assert head[-1].role == ASSISTANT
    assert instruction.role == USER


async def test_a_summary_can_be_asked_for_with_a_prompt_of_its_own(open_desk) -> None:  # type: ignore[no-untyped-def]
    desk = await open_desk(replace(POLICY, ask_on="fresh"))
    await desk.talk(FEW + 1)
    system, user = desk.model.asked[0].messages
    assert "Be kind." not in system.text
    assert f"User: {question(0)}" in user.text


@pytest.mark.parametrize("merge_from", ["originals", "summaries"])
async def test_merged_summaries_are_written_from_what_the_policy_says(  # type: ignore[no-untyped-def]
    open_desk, merge_from: str
) -> None:
    desk = await open_desk(replace(POLICY, merge_from=merge_from))
    await desk.talk(30)
    merged = [s for s in await desk.summaries() if s.rank > 0]
    assert merged
    own_prompts = [c.messages[-1].text for c in desk.model.asked if len(c.messages) == 2]
    assert len(own_prompts) == len(merged)
    if merge_from == "originals":
        assert f"User: {question(0)}" in own_prompts[0]
    else:
        assert f"[1] {SUMMARY}" in own_prompts[0]
        assert question(0) not in own_prompts[0]
    for s in merged:
        assert len(s.parents) == 2


async def test_originals_that_do_not_fit_are_merged_from_their_summaries(desk: Desk) -> None:
    await desk.talk(60)
    prompts = [c.messages[-1].text for c in desk.model.asked if len(c.messages) == 2]
    assert any("[1] " in p for p in prompts)
    assert max(s.rank for s in await desk.summaries()) >= 2


async def test_answers_that_nobody_counted_are_counted_before_they_are_merged(desk: Desk) -> None:
    for i in range(40):
        await desk.ask(question(i), answer=2 * ANSWERS[i % 2], counted=False)
        await desk.idle()
    prompts = [c for c in desk.model.asked if len(c.messages) == 2]
    assert any("[1] " not in c.messages[-1].text for c in prompts)
    for prompt in prompts:
        n_tokens = sum(await desk.model.count([m.text for m in prompt.messages]))
        assert n_tokens < BUDGET.window_tokens


async def test_another_policy_keeps_the_summaries_that_are_there(open_desk) -> None:  # type: ignore[no-untyped-def]
    first = await open_desk(POLICY)
    await first.talk(8)
    old = [s for s in await first.summaries() if s.activated_at is not None]
    await first.close()
    other = replace(POLICY, method="extractive", summaries=400)
    second = await open_desk(other)
    second.chats = first.chats
    await second.talk(6)
    assert "complete" not in second.events
    now = await second.summaries()
    assert now[: len(old)] == old
    assert {s.policy_digest for s in now[len(old) :]} == {other.digest}
    head = second.model.warmed[-1].messages[0].parts
    assert head[1 : 1 + len(old)] == tuple(BLOCK_HEADER + s.text for s in old)


async def test_notes_of_the_system_prompt_do_not_shorten_a_summary(desk: Desk) -> None:
    """They are counted with their messages and are no part of what is summarised."""
    await desk.talk(FEW)
    nodes = tuple(await desk.store.nodes("ann", chain(desk.chats["ann"])))
    noted = tuple(
        replace(n, note="file " * 200, n_tokens=n.n_tokens + 200) if n.role == USER else n
        for n in nodes
    )
    scribe = Scribe(desk.model, desk.model, replace(POLICY, method="extractive"), BUDGET)
    history = await recognise(desk.store, desk.model, "ann", Transcript("", ()), system="")
    plain, other = [await scribe.write(history, Task(span)) for span in (nodes, noted)]
    assert len(other.text) > 0.8 * len(plain.text)


# nothing is left out


async def test_a_long_chat_seen_for_the_first_time_is_summarised_whole(desk: Desk) -> None:
    """However many steps that takes: the user may not write again before tomorrow."""
    desk.chats["ann"] = [
        Message(ASSISTANT if i % 2 else USER, ANSWERS[0] if i % 2 else question(i // 2))
        for i in range(240)
    ]
    await desk.ask("Where are we?")
    await desk.idle()
    last = desk.model.warmed[-1].shape
    assert last.dropped_messages == 0
    assert last.verbatim_tokens <= 200
    assert (desk.keeper.running, desk.keeper.pending) == (0, 0)


@pytest.mark.parametrize("system_words", [0, 60, 150, 250])
async def test_with_pauses_every_turn_is_sent_or_summarised(  # type: ignore[no-untyped-def]
    tmp_path: Path, anyio_backend: str, system_words: int
) -> None:
    """However much of the window the system prompt takes for itself."""
    engine = SimulatedEngine(600, lambda c: ANSWERS[0], lambda c: "")
    policy = replace(POLICY, high=0.5, low=0.25, method="extractive")
    house = await House.open(tmp_path / "store.db", engine, policy)
    messages: list[Message] = []
    system = " ".join(["kind"] * (system_words // 2))
    dropped = []
    for i in range(40):
        messages.append(Message(USER, f"Question {i} is about the thing number {i}."))
        text, plan = await house.ask("ann", messages, system=system)
        messages.append(Message(ASSISTANT, text))
        dropped.append(plan.context.shape.dropped_messages)
        await house.idle()
    await house.close()
    assert set(dropped) == {0}
    assert plan.context.shape.summaries > 0


async def test_a_chat_that_its_policy_refuses_is_no_failure_of_the_keeper(  # type: ignore[no-untyped-def]
    tmp_path: Path, anyio_backend: str
) -> None:
    """There is nothing to warm: the next request will be refused too."""
    engine = SimulatedEngine(200, lambda c: ANSWERS[0] * 4, lambda c: "")
    policy = replace(POLICY, compact=False, overflow="refuse")
    house = await House.open(tmp_path / "store.db", engine, policy)
    messages: list[Message] = []
    with pytest.raises(ApiError, match="longer than the model's window"):
        for i in range(40):
            messages.append(Message(USER, f"Question {i} is about the thing number {i}."))
            text, _ = await house.ask("ann", messages)
            messages.append(Message(ASSISTANT, text))
            await house.idle()
    await house.idle()
    await house.close()
    assert len(messages) > 2
    assert "background_failed" not in [event for event, _ in house.events]
