"""System prompts that change: the lasting part stays in front, the rest is told beside the newest
question, once for as long as it can be seen."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.context import Context
from memory.policy import Policy
from memory.records import Node
from memory.system import Split, common_lead, note_text, split_system
from memory.transcript import ASSISTANT, ROOT, USER, Message, extend
from proxy.tuning.house import House
from proxy.tuning.simulation import Call, SimulatedEngine, render


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def node(role: str = USER, *, front: str | None = None, note: str = "") -> Node:
    digest = extend(ROOT, Message(role, ""))
    return Node(digest, ROOT, 0, role, "", 0, "words", front=front, note=note)


def split(system: str, front: str, *notes: str, hidden: str = "") -> Split:
    """After a chat with this text in front, where the notes can be seen and `hidden` cannot."""
    visible = [node(front=front, note=n) for n in notes] or [node(front=front)]
    return split_system(system, [node(front=front, note=hidden), *visible], visible=visible)


# one prompt after another


def test_the_first_prompt_stands_in_front() -> None:
    assert split_system("Be kind.", [], visible=[]) == Split("Be kind.", "")
    assert split_system("Be kind.", [node(front=None)], visible=[]) == Split("Be kind.", "")


def test_an_unchanged_prompt_stays_as_it_is() -> None:
    assert split("Be kind. Today is Monday.", "Be kind. Today is Monday.") == Split(
        "Be kind. Today is Monday.", ""
    )


def test_a_date_at_the_end_is_told_and_the_lasting_part_stays() -> None:
    first, second = "Be kind. Today is Monday.", "Be kind. Today is Tuesday."
    assert split(second, first) == Split("Be kind.", "Today is Tuesday.")
    assert split("Be kind. Today is Wednesday.", "Be kind.", "Today is Tuesday.") == Split(
        "Be kind.", "Today is Wednesday."
    )


def test_what_is_added_behind_a_prompt_is_told() -> None:
    assert split("Be kind. The user likes tea.", "Be kind.") == Split(
        "Be kind.", "The user likes tea."
    )
    assert split("Be kind\nThe user likes tea.", "Be kind") == Split(
        "Be kind", "The user likes tea."
    )


def test_a_note_is_not_repeated_while_it_can_be_seen() -> None:
    same = "Be kind. Today is Tuesday."
    assert split(same, "Be kind.", "Today is Tuesday.") == Split("Be kind.", "")
    assert split(same, "Be kind.", "Today is Tuesday.", "") == Split("Be kind.", "")


def test_a_note_is_told_again_when_it_can_no_longer_be_seen() -> None:
    assert split("Be kind. Today is Tuesday.", "Be kind.", hidden="Today is Tuesday.") == Split(
        "Be kind.", "Today is Tuesday."
    )


def test_a_note_is_told_again_when_another_one_came_after_it() -> None:
    notes = ("Today is Tuesday.", "Today is Wednesday.")
    assert split("Be kind. Today is Tuesday.", "Be kind.", *notes) == Split(
        "Be kind.", "Today is Tuesday."
    )


def test_the_front_shrinks_when_more_of_it_changes() -> None:
    assert split("Be kind. Use no lists. Now.", "Be kind. Use lists.", "Then.") == Split(
        "Be kind.", "Use no lists. Now."
    )
    assert split("Something else altogether.", "Be kind.") == Split(
        "", "Something else altogether."
    )


def test_a_shorter_prompt_leaves_nothing_to_tell() -> None:
    assert split("Be kind.", "Be kind. Today is Monday.") == Split("Be kind.", "")
    assert split("", "Be kind.") == Split("", "")


@pytest.mark.parametrize(
    ("one", "other", "lead"),
    [
        ("Be kind. Today is Monday.", "Be kind. Today is Tuesday.", "Be kind."),
        ("Be kind.\nMonday", "Be kind.\nTuesday", "Be kind."),
        ("Be kind\n\n- Monday", "Be kind\n\n- Tuesday", "Be kind"),
        ("You are kind, and it is Monday.", "You are kind, and it is Tuesday.", ""),
        # Inside a number, an address or a file name no sentence ends.
        ("Be kind. Pi is 3.14.", "Be kind. Pi is 3.15.", "Be kind."),
        ("Go. See example.com.", "Go. See example.org.", "Go."),
        ("Version 1.2", "Version 1.3", ""),
        # A prompt that goes on inside a word or a number has not only been added to.
        ("Be kind. Messages: 1", "Be kind. Messages: 12", "Be kind."),
        ("Be kind. It is Mon", "Be kind. It is Monday", "Be kind."),
        ("Be kind", "Be kindly", ""),
        # Scripts without spaces.
        (
            "親切にしてください。今日は月曜日です。",
            "親切にしてください。今日は火曜日です。",
            "親切にしてください。",
        ),
        ("敬語で！今は9時です", "敬語で！今は10時です", "敬語で！"),
        ("今日は月曜日", "今日は火曜日", ""),
        ("same", "same", "same"),
        ("", "anything", ""),
    ],
)
def test_a_prompt_is_cut_behind_a_line_or_a_sentence(one: str, other: str, lead: str) -> None:
    assert common_lead(one, other) == common_lead(other, one) == lead


PROMPTS = st.lists(
    st.sampled_from(["Be kind.", " ", "\n", "3.14", "Now!", "今日。", "a", "b", "?", "."]),
    max_size=8,
).map("".join)


@given(PROMPTS, PROMPTS)
def test_nothing_of_a_prompt_is_lost_in_the_middle(front: str, system: str) -> None:
    parts = split(system, front)
    assert system.startswith(parts.front)
    assert parts.note == system[len(parts.front) :].strip()


@given(PROMPTS, PROMPTS)
def test_the_lead_is_common_to_both(one: str, other: str) -> None:
    lead = common_lead(one, other)
    assert one.startswith(lead)
    assert other.startswith(lead)
    assert lead == common_lead(other, one)


@given(PROMPTS, st.lists(PROMPTS, min_size=1, max_size=6))
def test_the_front_only_ever_shrinks(first: str, later: list[str]) -> None:
    front, seen = first, []
    for system in later:
        parts = split(system, front)
        seen.append(parts.front)
        assert first.startswith(parts.front)
        front = parts.front
    assert seen == sorted(seen, key=len, reverse=True)


def test_a_note_stands_in_brackets_before_the_question() -> None:
    assert note_text("Today is Tuesday.") == "[Today is Tuesday.]\n\n"
    assert note_text("") == ""


# whole chats

WINDOW = 600
POLICY = Policy(
    name="test",
    high=220,
    low=100,
    block=200,
    summaries=120,
    summary=40,
    answer=60,
    verbatim_turns=1,
    method="extractive",
)


@pytest.fixture
async def open_house(
    tmp_path: Path, anyio_backend: str
) -> AsyncIterator[Callable[[Policy], object]]:
    houses: list[House] = []

    async def opened(policy: Policy) -> House:
        serial = count()
        engine = SimulatedEngine(
            WINDOW, lambda context: f"Answer {next(serial)} is long enough.", lambda context: ""
        )
        houses.append(await House.open(tmp_path / "store.db", engine, policy))
        return houses[-1]

    yield opened
    for house in houses:
        await house.close()


async def lead(house: House, systems: list[str], *, pause: bool = True) -> list[Call]:
    """A chat of one turn for each system prompt; the calls that reached the engine."""
    messages: list[Message] = []
    for i, system in enumerate(systems):
        messages.append(Message(USER, f"Question {i} is about the thing number {i * 7}."))
        text, _ = await house.ask("ann", messages, system=system, max_tokens=40)
        if pause:
            await house.idle()
        messages.append(Message(ASSISTANT, text))
    return house.engine.chat_calls()


def text_of(context: Context) -> str:
    return "".join(m.text for m in context.messages)


def dates(n: int) -> list[str]:
    return [f"You are kind.\nUse no lists.\nToday is day {i} of the journey." for i in range(n)]


@pytest.mark.anyio
async def test_a_prompt_that_changes_with_every_turn_keeps_the_prefix(open_house) -> None:  # type: ignore[no-untyped-def]
    """What was sent before is the beginning of what is sent next, but for compactions, which are
    warmed; and for the second turn, which finds out what lasts."""
    house = await open_house(POLICY)
    calls = await lead(house, dates(40))
    assert all(c.context.messages[0].parts[0] == "You are kind.\nUse no lists." for c in calls[1:])
    prompts = [render(c.context, answer_header=False) for c in calls]
    # A compaction puts another question behind the summaries.
    oldest = [c.context.messages[1] for c in calls]
    kept = [i for i in range(2, len(calls)) if oldest[i] == oldest[i - 1]]
    assert all(prompts[i][: len(prompts[i - 1])] == prompts[i - 1] for i in kept)
    assert len(kept) < len(calls) - 5, "there were compactions"
    # The new question with its note, its markup and the header of the answer, and no more.
    assert max(c.evaluated for c in calls[2:]) <= 50


@pytest.mark.anyio
async def test_the_newest_note_can_always_be_seen(open_house) -> None:  # type: ignore[no-untyped-def]
    house = await open_house(POLICY)
    systems = [s for s in dates(9) for _ in range(5)]
    for call, system in zip(await lead(house, systems), systems, strict=True):
        assert system.rpartition("\n")[2] in text_of(call.context)


@pytest.mark.anyio
async def test_a_note_is_told_again_after_a_compaction_hid_it(open_house) -> None:  # type: ignore[no-untyped-def]
    house = await open_house(POLICY)
    one, other = dates(2)
    calls = await lead(house, [one] + [other] * 30)
    told = other.rpartition("\n")[2]
    assert all(text_of(c.context).count(told) == 1 for c in calls[1:])
    places = [next(m.parts[-1] for m in c.context.messages if told in m.text) for c in calls[1:]]
    assert len(set(places)) > 1


@pytest.mark.anyio
@pytest.mark.parametrize("pause", [True, False])
async def test_without_summaries_a_note_outlives_the_turn_it_was_told_in(  # type: ignore[no-untyped-def]
    open_house, pause: bool
) -> None:
    house = await open_house(replace(POLICY, compact=False))
    one, other = dates(2)
    calls = await lead(house, [one] + [other] * 40, pause=pause)
    assert calls[-1].context.shape.dropped_messages > 0
    for call in calls[1:]:
        assert other.rpartition("\n")[2] in text_of(call.context)


@pytest.mark.anyio
async def test_an_answer_given_anew_under_another_prompt_sees_it(open_house) -> None:  # type: ignore[no-untyped-def]
    house = await open_house(POLICY)
    monday, tuesday = "Be kind. Today is Monday.", "Be kind. Today is Tuesday."
    asked = [Message(USER, "What day is it?")]
    await house.ask("ann", asked, system=monday)
    await house.ask("ann", asked, system=tuesday)
    again = house.engine.chat_calls()[-1].context
    assert "Tuesday" in text_of(again)
    assert "Monday" not in text_of(again)


@pytest.mark.anyio
async def test_an_answer_given_anew_under_the_same_prompt_is_asked_for_the_same_way(  # type: ignore[no-untyped-def]
    open_house,
) -> None:
    house = await open_house(POLICY)
    one, other = dates(2)
    messages = [Message(USER, "First?")]
    text, _ = await house.ask("ann", messages, system=one)
    messages += [Message(ASSISTANT, text), Message(USER, "Second?")]
    await house.ask("ann", messages, system=other)
    await house.ask("ann", messages, system=other)
    first, again = house.engine.chat_calls()[-2:]
    assert again.context == first.context


@pytest.mark.anyio
async def test_a_policy_that_sends_the_prompt_as_it_comes_splits_nothing(open_house) -> None:  # type: ignore[no-untyped-def]
    house = await open_house(replace(POLICY, system="front"))
    systems = dates(12)
    for call, system in zip(await lead(house, systems), systems, strict=True):
        assert call.context.messages[0].parts[0] == system
        assert "[" not in text_of(call.context)


@pytest.mark.anyio
async def test_japanese_prompts_are_split_behind_a_sentence(open_house) -> None:  # type: ignore[no-untyped-def]
    house = await open_house(POLICY)
    systems = [f"敬語で答えてください。今日は{i}日です。" for i in range(4)]
    calls = await lead(house, systems)
    assert [c.context.messages[0].parts[0] for c in calls[1:]] == ["敬語で答えてください。"] * 3
    assert calls[-1].context.messages[-1].parts[0] == "[今日は3日です。]\n\n"
