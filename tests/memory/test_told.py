"""A client's own summary names the chat that it was made from, and no other."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import branch, summary_of

from memory.extract import extractive
from memory.overlap import attach
from memory.records import Node
from memory.store import Store
from memory.told import CHARS_LEAST, LINE_CHARS_LEAST, tells_of
from memory.transcript import ASSISTANT, USER, Message

pytestmark = pytest.mark.anyio

NEW = Message(USER, "And what comes next?")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def store(tmp_path: Path, anyio_backend: str) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "store.db")
    yield opened
    await opened.close()


def chat(topic: str, turns: int, *, last: str = "Fine.") -> list[Node]:
    """Every answer but the last says what stands nowhere else; the last is short."""
    texts = []
    for n in range(turns):
        texts += [f"How did point {n} of the {topic} go in the end?"]
        texts += [f"Point {n} of the {topic} was settled by the keeper on day {n}."]
    return branch([*texts[:-1], last])


def told_of(nodes: Sequence[Node], *, max_chars: int = 600) -> str:
    """As chatfold answers who asks for a summary: sentences of what is stored."""
    source = [Message(n.role, n.text) for n in nodes]
    return extractive(source, max_tokens=max_chars, count=len)


def window(nodes: Sequence[Node]) -> list[Message]:
    return [Message(ASSISTANT, nodes[-1].text), NEW]


async def keep(store: Store, owner: str, nodes: list[Node]) -> str:
    return await store.append(owner, nodes, conversation=None)


async def found(store: Store, owner: str, nodes: Sequence[Node], told: str) -> bytes | None:
    """The message behind which this window of [last answer, new question] was put."""
    attachment = await attach(store, owner, window(nodes), known=0, hinted=None, told=told)
    return attachment.parent if attachment else None


# what is recognised


async def test_a_short_answer_beside_the_summary_is_put_where_it_was_given(store: Store) -> None:
    garden, kitchen = chat("garden", 6), chat("kitchen", 6)
    await keep(store, "ann", garden)
    await keep(store, "ann", kitchen)
    for nodes in (garden, kitchen):
        assert await found(store, "ann", nodes, "") is None
        assert await found(store, "ann", nodes, told_of(nodes[:-2])) == nodes[-2].digest


async def test_a_stored_summary_vouches_as_the_messages_do(store: Store) -> None:
    nodes = chat("garden", 6)
    conversation = await keep(store, "ann", nodes)
    block = (
        "Ann and the keeper went through the garden.\n"
        + "Exact: "
        + "; ".join(f"rose {n} stands at gate {n}" for n in range(6))
    )
    await store.add_summary("ann", summary_of(nodes[:6], conversation, text=block))
    told = f"{block}\n\n{told_of(nodes[6:-2])}"
    assert await found(store, "ann", nodes, told) == nodes[-2].digest


async def test_of_equal_answers_the_newest_that_stands_behind_the_summary_is_meant(
    store: Store,
) -> None:
    nodes = chat("garden", 8)
    again = branch(["Once more?", "Fine.", "And once more?", "Fine."], after=nodes[-1])
    path = [*nodes, *again]
    await keep(store, "ann", path)
    assert await found(store, "ann", path, told_of(nodes[:-2])) == path[-2].digest


# what is not enough


async def test_a_summary_of_another_chat_or_of_none_is_no_evidence(store: Store) -> None:
    garden, kitchen = chat("garden", 6), chat("kitchen", 6)
    await keep(store, "ann", garden)
    assert await found(store, "ann", garden, told_of(kitchen)) is None
    free = "They spoke about the garden at length, and about what the keeper did there. " * 3
    assert await found(store, "ann", garden, free) is None
    half = f"{told_of(garden[:4])}\n{told_of(kitchen)}"
    assert await found(store, "ann", garden, half) is None


async def test_another_owners_chat_is_never_meant(store: Store) -> None:
    garden = chat("garden", 6)
    await keep(store, "ann", garden)
    assert await found(store, "bob", garden, told_of(garden[:-2])) is None


async def test_what_was_said_behind_the_answer_or_on_another_branch_is_no_evidence(
    store: Store,
) -> None:
    trunk = chat("garden", 4)
    later = branch([n.text for n in chat("pond", 4)], after=trunk[-1])
    await keep(store, "ann", [*trunk, *later[:-1]])
    # The answer stands before what the summary tells.
    assert await found(store, "ann", trunk, told_of(later[:-1])) is None
    other = branch([n.text for n in chat("shed", 4)], after=trunk[-1])
    await keep(store, "ann", [*trunk, *other])
    assert await found(store, "ann", other, told_of(later[:-1])) is None
    assert await found(store, "ann", other, told_of(other[:-2])) == other[-2].digest


async def test_two_chats_that_both_could_be_meant_are_none(store: Store) -> None:
    garden = chat("garden", 6)
    copy = branch(["Please listen.", "I do.", *(n.text for n in garden)])
    await keep(store, "ann", garden)
    await keep(store, "ann", copy)
    assert await found(store, "ann", garden, told_of(garden[:-2])) is None


def test_lines_that_stand_there_are_counted_once_and_short_ones_not_at_all() -> None:
    line = "The hive behind the old mill is painted blue."
    assert not tells_of("\n".join([line] * 9), [line])
    assert not tells_of("\n".join(["Fine, thanks."] * 20), ["Fine, thanks."])
    lines = [f"Hive number {n} behind the old mill is painted blue." for n in range(4)]
    text = " ".join(lines)
    assert tells_of("\n".join(lines), [text])
    assert tells_of("User: " + "\nAssistant: ".join(lines), [text])
    assert not tells_of("\n".join([*lines, "And this was never said by anybody at all."]), [text])
    assert not tells_of("", [text])


# against a naive twin

SENTENCES = [f"Hive number {n} stands at the {n}th gate and is painted blue." for n in range(6)]
ANSWERS = ["Fine.", "Yes.", *SENTENCES[:2]]
chats = st.lists(
    st.tuples(
        st.sampled_from(["ann", "bob"]),
        st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=6),
        st.sampled_from(ANSWERS),
    ),
    min_size=1,
    max_size=5,
)


def naive(stored: Sequence[tuple[str, list[Node]]], answer: str, told: str) -> list[bytes]:
    """The places of ann's where this answer stands behind messages that hold the whole summary."""
    places = set()
    for owner, nodes in stored:
        for i, node in enumerate(nodes):
            if owner == "ann" and node.role == ASSISTANT and node.text == answer:
                before = [n.text for n in nodes[:i]]
                lines = {line.split(": ", 1)[-1] for line in told.splitlines()}
                lines = {line for line in lines if len(line) >= LINE_CHARS_LEAST}
                if sum(map(len, lines)) >= CHARS_LEAST and all(
                    any(line in text for text in before) for line in lines
                ):
                    places.add(nodes[i - 1].digest)
    return sorted(places)


@settings(max_examples=60, deadline=None)
@given(chats=chats, which=st.integers(0, 4), cut=st.integers(0, 4))
def test_it_is_the_one_chat_that_a_naive_search_finds_or_none(
    chats: list[tuple[str, list[str], str]], which: int, cut: int
) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = await Store.open(Path(folder) / "store.db")
            stored, names = [], {}
            for owner, said, answer in chats:
                texts = [text for one in said for text in (one, "Fine.")]
                nodes = branch([*texts, "What of it?", answer])
                names[nodes[0].digest, owner] = await keep(store, owner, nodes)
                stored.append((owner, nodes))
            nodes = stored[which % len(stored)][1]
            told = told_of(nodes[: max(1, len(nodes) - 2 - cut)])
            # Long answers are evidence by themselves: that is overlap's own matter.
            meant = naive(stored, nodes[-1].text, told)
            at = {
                names[path[0].digest, "ann"]
                for owner, path in stored
                for n in path
                if owner == "ann" and n.digest in meant
            }
            parent = await found(store, "ann", nodes, told)
            if len(at) == 1:
                assert parent in meant
            else:
                assert parent is None
            await store.close()

    asyncio.run(run())
