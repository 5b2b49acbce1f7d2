"""What is kept, and for whom."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from math import log2
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlite_utils import Database
from store_samples import (
    add,
    branch,
    digests_of,
    in_memory,
    node_after,
    old_store,
    raw_bytes,
    summary_of,
    talk,
)

from memory import queries
from memory.erasure import FORGOTTEN
from memory.store import NotStored, Store, integrity
from memory.transcript import USER, Message, message_digest

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def store(tmp_path: Path, anyio_backend: str) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "db" / "store.db", clock=lambda: 1000.0)
    yield opened
    await opened.close()
    assert integrity(tmp_path / "db" / "store.db") == []


# what is kept


async def test_messages_come_back_as_they_went_in(store: Store) -> None:
    nodes = talk("hello", "  hi there\n", "nul \0 and 🎈", "", "fin")
    nodes[1] = replace(nodes[1], token_ids=b"\1\0\0\0\2\0\0\0")
    nodes.append(node_after(nodes[-1], "assistant", "bye"))
    conversation = await store.append("ann", nodes, conversation=None)
    assert await store.nodes("ann", digests_of(nodes)) == nodes
    assert await store.path("ann", nodes[-1].digest) == nodes
    assert await store.deepest("ann", digests_of(nodes)) == (conversation, len(nodes) - 1)


async def test_it_is_all_there_after_reopening(tmp_path: Path) -> None:
    nodes = talk("q", "a")
    first = await Store.open(tmp_path / "s.db")
    conversation = await first.append("ann", nodes, conversation=None)
    summary = await first.add_summary("ann", summary_of(nodes, conversation))
    await first.close()
    second = await Store.open(tmp_path / "s.db")
    assert await second.path("ann", nodes[-1].digest) == nodes
    assert await second.summaries("ann", conversation) == [summary]
    await second.close()


async def test_path_stops_at_the_depth_asked_for(store: Store) -> None:
    nodes = talk(*"abcdef")
    await store.append("ann", nodes, conversation=None)
    assert await store.path("ann", nodes[4].digest, after_depth=1) == nodes[2:5]
    assert await store.path("ann", nodes[4].digest, after_depth=4) == []
    assert await store.path("ann", b"unknown") == []


async def test_nodes_leaves_out_what_is_not_stored(store: Store) -> None:
    nodes, other = talk(*"abcd"), talk("x", "y")
    await store.append("ann", nodes, conversation=None)
    assert await store.nodes("ann", digests_of(other + nodes[::-1])) == nodes


async def test_branches_share_their_trunk_and_their_conversation(store: Store) -> None:
    trunk = talk("q1", "a1")
    left, right = talk("q2", "a2", after=trunk[-1]), talk("q2 edited", "a2", after=trunk[-1])
    conversation = await store.append("ann", trunk + left, conversation=None)
    assert await store.append("ann", trunk + right, conversation=None) == conversation
    assert await store.path("ann", right[-1].digest) == trunk + right
    assert (await store.status())["messages"] == 6


async def test_a_new_root_may_join_a_conversation_that_is_there(store: Store) -> None:
    conversation = await store.append("ann", talk("q", "a"), conversation=None)
    window = talk("later q", "later a")
    assert await store.append("ann", window, conversation=conversation) == conversation
    assert await store.deepest("ann", digests_of(window)) == (conversation, 1)


async def test_appending_again_changes_nothing(store: Store) -> None:
    nodes = talk(*"abcd")
    conversation = await store.append("ann", nodes, conversation=None)
    before = await store.status()
    assert await store.append("ann", nodes, conversation=None) == conversation
    assert await store.append("ann", nodes, conversation="elsewhere") == conversation
    after = await store.status()
    assert {**after, "file_bytes": 0} == {**before, "file_bytes": 0}


async def test_nodes_may_come_in_any_order(store: Store) -> None:
    nodes = talk(*"abcd")
    await store.append("ann", nodes[::-1], conversation=None)
    assert await store.path("ann", nodes[-1].digest) == nodes


async def test_thousands_of_messages_pass_sqlites_limit_on_variables(store: Store) -> None:
    nodes = branch(str(i) for i in range(2500))
    nodes.append(node_after(nodes[-1], "assistant", "end"))
    conversation = await store.append("ann", nodes, conversation=None)
    assert await store.nodes("ann", digests_of(nodes)) == nodes
    assert await store.forget_conversation("ann", conversation) == len(nodes)


async def test_token_ids_that_come_later_are_taken_with_their_text(store: Store) -> None:
    question, answer = talk("q", "trimmed")
    exact = replace(answer, text="trimmed \n", token_ids=b"\7\0\0\0", n_tokens=1, tokenizer="m")
    await store.append("ann", [question, answer], conversation=None)
    await store.append("ann", [question, exact], conversation=None)
    again = replace(exact, token_ids=b"\10\0\0\0")
    await store.append("ann", [question, again], conversation=None)
    (stored,) = await store.nodes("ann", [answer.digest])
    assert stored == exact


async def test_token_ids_of_another_text_are_not_taken(store: Store) -> None:
    question, answer = talk("q", "a")
    impostor = replace(answer, text="b", token_ids=b"\7\0\0\0")
    await store.append("ann", [question, answer], conversation=None)
    await store.append("ann", [question, impostor], conversation=None)
    assert await store.nodes("ann", [answer.digest]) == [answer]


async def test_lone_surrogates_are_stored_as_replacement_characters(store: Store) -> None:
    nodes = talk("half \ud83d", "a")
    await store.append("ann", nodes, conversation=None)
    (stored,) = await store.nodes("ann", [nodes[0].digest])
    assert stored == replace(nodes[0], text="half \ufffd")
    found = await store.by_message_digest("ann", message_digest(Message(USER, "half \ud83d")))
    assert [node.digest for _, node in found] == [nodes[0].digest]


async def test_an_owner_that_cannot_be_stored_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        await store.append("ann\ud83d", talk("q", "a"), conversation=None)
    assert (await store.status())["owners"] == 0


async def test_a_message_without_a_time_gets_the_clocks(store: Store) -> None:
    nodes = [replace(node, created_at=0.0) for node in talk("q", "a")]
    await store.append("ann", nodes, conversation=None)
    assert [node.created_at for node in await store.nodes("ann", digests_of(nodes))] == [1000.0] * 2


async def test_equal_messages_are_found_newest_first(store: Store) -> None:
    old, new = talk("hello", "hi"), talk("hm", "yes", "hello", "again")
    first = await store.append("ann", old, conversation=None)
    second = await store.append("ann", new, conversation=None)
    digest = message_digest(Message(USER, "hello"))
    assert await store.by_message_digest("ann", digest) == [(second, new[2]), (first, old[0])]
    assert await store.by_message_digest("ann", digest, limit=1) == [(second, new[2])]


async def test_summaries_come_back_in_order_and_are_activated_once(store: Store) -> None:
    nodes = talk(*"abcd")
    conversation = await store.append("ann", nodes, conversation=None)
    later = await store.add_summary("ann", summary_of(nodes[2:], conversation))
    first = await store.add_summary("ann", summary_of(nodes[:2], conversation))
    assert later == replace(summary_of(nodes[2:], conversation), id=later.id)
    await store.activate("ann", [first.id])
    store._clock = lambda: 2000.0
    await store.activate("ann", [first.id, 999])
    assert await store.summaries("ann", conversation) == [
        replace(first, activated_at=1000.0),
        later,
    ]


async def test_the_overviews_can_be_read(store: Store) -> None:
    nodes = talk("how far is the moon", "far")
    conversation = await store.append("ann", nodes, conversation=None)
    await store.add_summary("ann", summary_of(nodes, conversation))
    with closing(sqlite3.connect(store._path)) as conn:
        (row,) = conn.execute("SELECT owner, messages, begins_with FROM conversation_overview")
        (span,) = conn.execute("SELECT span FROM summary_overview").fetchone()
    assert row == ("key ann", 2, "how far is the moon")
    assert span == "0-1"


async def test_a_conversation_is_called_by_its_first_message_alone(tmp_path: Path) -> None:
    path, nodes = tmp_path / "store.db", talk("the ferry leaves at nine", "yes", "and back?", "no")
    old_store(path, "ann", nodes)

    def called() -> list[str]:
        with closing(sqlite3.connect(path)) as conn:
            return [begins for (begins,) in conn.execute("SELECT begins FROM conversations")]

    store = await Store.open(path)
    try:
        assert called() == ["the ferry leaves at nine"]
        await store.append("ann", talk("x" * 100, "y"), conversation="other")
        assert called() == ["the ferry leaves at nine", "x" * 80]
        await store.forget_message("ann", nodes[1].digest)
        assert called()[0] == "the ferry leaves at nine"
        await store.forget_message("ann", nodes[0].digest)
        assert called()[0] == FORGOTTEN
        assert integrity(path) == []
        await store.forget_conversation("ann", "old")
        assert called() == ["x" * 80]
    finally:
        await store.close()
    assert b"ferry" not in raw_bytes(path)


async def test_no_summary_is_kept_of_what_was_forgotten_meanwhile(store: Store) -> None:
    nodes = talk("my key is 48213", "noted", "thanks", "yes")
    conversation = await store.append("ann", nodes, conversation=None)
    new = summary_of(nodes, conversation)
    old = await store.add_summary("ann", summary_of(nodes[:2], conversation), read=nodes[:2])
    await store.forget_message("ann", nodes[0].digest)
    with pytest.raises(NotStored):
        await store.add_summary("ann", new, read=nodes)
    with pytest.raises(NotStored):
        await store.add_summary("ann", new, read=nodes[2:], shown=[old.id])
    assert await store.summaries("ann", conversation) == []
    later = await store.nodes("ann", digests_of(nodes))
    kept = await store.add_summary("ann", new, read=later)
    assert await store.add_summary("ann", new, read=later, shown=[kept.id])


# for whom


async def test_nothing_of_one_owner_is_seen_or_touched_by_another(store: Store) -> None:
    nodes = talk("secret lighthouse", "東京タワーの秘密")
    conversation = await store.append("ann", nodes, conversation=None)
    summary = await store.add_summary("ann", summary_of(nodes, conversation))
    digest = message_digest(Message(USER, "secret lighthouse"))
    assert await store.deepest("bob", digests_of(nodes)) is None
    assert await store.nodes("bob", digests_of(nodes)) == []
    assert await store.path("bob", nodes[-1].digest) == []
    assert await store.summaries("bob", conversation) == []
    assert await store.by_message_digest("bob", digest) == []
    assert await store.search("bob", "secret 東京タワー 秘密") == []
    assert await store.forget_conversation("bob", conversation) == 0
    assert await store.forget_owner("bob") == 0
    await store.activate("bob", [summary.id])
    assert await store.summaries("ann", conversation) == [summary]
    assert await store.path("ann", nodes[-1].digest) == nodes


async def test_another_owners_conversation_cannot_be_written_to(store: Store) -> None:
    conversation = await store.append("ann", talk("q", "a"), conversation=None)
    with pytest.raises(NotStored):
        await store.append("bob", talk("mine", "yours"), conversation=conversation)
    with pytest.raises(NotStored):
        await store.add_summary("bob", summary_of(talk("q", "a"), conversation))
    assert (await store.status())["owners"] == 1


async def test_equal_histories_of_two_owners_are_kept_apart(store: Store) -> None:
    nodes = talk("q", "a")
    anns = await store.append("ann", nodes, conversation=None)
    bobs = await store.append("bob", nodes, conversation=None)
    assert anns != bobs
    await store.forget_owner("ann")
    assert await store.deepest("ann", digests_of(nodes)) is None
    assert await store.deepest("bob", digests_of(nodes)) == (bobs, 1)


# finding the deepest

texts = st.lists(st.sampled_from("ab"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(stored=st.lists(st.tuples(st.sampled_from(["ann", "bob"]), texts), max_size=5), asked=texts)
def test_deepest_agrees_with_looking_at_each(stored: list[Any], asked: list[str]) -> None:
    known: dict[bytes, str] = {}
    with closing(in_memory().conn) as conn:
        db = Database(conn, execute_plugins=False)
        for owner, words in stored:
            nodes = branch(words)
            conversation = add(db, owner, nodes)
            if owner == "ann":
                known |= dict.fromkeys(digests_of(nodes), conversation)
        chain = digests_of(branch(asked))
        hits = [(known[digest], i) for i, digest in enumerate(chain) if digest in known]
        assert queries.deepest(conn, "ann", chain) == (hits[-1] if hits else None)


@pytest.mark.parametrize("known", [0, 1, 2, 1023, 1024, 1999, 2997, 2999, 3000])
def test_deepest_takes_few_probes(known: int) -> None:
    nodes = branch(str(i) for i in range(3000))
    with closing(in_memory().conn) as conn:
        if known:
            add(Database(conn, execute_plugins=False), "ann", nodes[:known])
        probes: list[str] = []
        conn.set_trace_callback(probes.append)
        found = queries.deepest(conn, "ann", digests_of(nodes))
    assert (found[1] if found else -1) == known - 1
    assert len(probes) <= (4 if known > 2990 else 2 * log2(3000) + 2)
