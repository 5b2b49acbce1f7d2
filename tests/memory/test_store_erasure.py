"""Forgetting, down to the bytes, and pruning."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from store_samples import branch, digests_of, raw_bytes, summary_of, talk

from memory.records import Node
from memory.store import Bounds, Store, StoreUnavailable, integrity

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


# forgetting


async def test_forgetting_leaves_no_bytes_in_the_file(store: Store) -> None:
    chance = random.Random(5)
    words: dict[str, list[str]] = {}
    for i in range(40):
        words[f"c{i}"] = [chance.randbytes(12).hex() for _ in range(28)]
    # Turns of all conversations mixed, so that pages are shared, as in life.
    last: dict[str, Node] = {}
    for turn in range(0, 28, 2):
        for name in chance.sample(sorted(words), len(words)):
            padding = " hello" * chance.randrange(60)
            texts = [word + padding for word in words[name][turn : turn + 2]]
            nodes = branch(texts, after=last.get(name))
            await store.append("ann", nodes, conversation=name)
            last[name] = nodes[-1]
    gone = sorted(words)[:12]
    for name in gone:
        assert await store.forget_conversation("ann", name) == 28
    raw = raw_bytes(store._path)
    assert [word for name in gone for word in words[name] if word.encode() in raw] == []
    kept = [word for name in words if name not in gone for word in words[name]]
    assert all(word.encode() in raw for word in kept)
    assert await store.forget_owner("ann") == 28 * 28
    raw = raw_bytes(store._path)
    assert [word for name in words for word in words[name] if word.encode() in raw] == []


async def test_forgetting_takes_summaries_japanese_and_the_owner_along(store: Store) -> None:
    nodes = talk("とても秘密の話", "分かりました", "swordfish42", "ok")
    conversation = await store.append("ann-key", nodes, conversation=None)
    await store.add_summary(
        "ann-key", summary_of(nodes, conversation, text="summary of swordfish42")
    )
    await store.append("bob", talk("q", "a"), conversation=None)
    secrets = [part.encode() for part in ("とても秘", "秘密の", "swordfish42", "ann-key")]
    assert all(part in raw_bytes(store._path) for part in secrets)
    assert await store.forget_owner("ann-key") == 4
    assert [part for part in secrets if part in raw_bytes(store._path)] == []
    status = await store.status()
    assert [status[key] for key in ("owners", "conversations", "summaries")] == [1, 1, 0]


async def test_forgetting_while_another_program_reads_says_so_and_can_be_finished(
    tmp_path: Path,
) -> None:
    path = tmp_path / "s.db"
    store = await Store.open(path, bounds=Bounds(busy_s=0.05))
    conversation = await store.append("ann", talk("swordfish42", "a"), conversation=None)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM messages").fetchone()
        with pytest.raises(StoreUnavailable):
            await store.forget_conversation("ann", conversation)
        assert (await store.status())["messages"] == 0
    assert await store.forget_conversation("ann", conversation) == 0
    assert b"swordfish42" not in raw_bytes(path)
    await store.close()


async def test_forgetting_takes_along_what_grew_from_it(store: Store) -> None:
    trunk = talk("q", "a")
    grown = talk("q2", "a2", after=trunk[-1])
    first = await store.append("ann", trunk, conversation=None)
    assert await store.append("ann", grown, conversation="second") == "second"
    await store.add_summary("ann", summary_of(grown, "second"))
    assert await store.forget_conversation("ann", first) == 4
    status = await store.status()
    assert [status[key] for key in ("conversations", "messages", "summaries")] == [0, 0, 0]


# pruning


async def ten_conversations(store: Store, *, text: str = "q") -> list[list[Node]]:
    grown = []
    for i in range(10):
        store._clock = lambda i=i: 100.0 * i  # type: ignore[misc]
        grown.append(talk(f"{text} {i}", "a"))
        await store.append("ann", grown[-1], conversation=f"c{i}")
    return grown


async def remaining(store: Store, conversations: list[list[Node]]) -> list[int]:
    kept = [await store.nodes("ann", digests_of(nodes)) for nodes in conversations]
    assert all(len(nodes) in (0, 2) for nodes in kept)
    return [i for i, nodes in enumerate(kept) if nodes]


async def test_pruning_by_age_and_number_takes_the_oldest_first(store: Store) -> None:
    grown = await ten_conversations(store)
    assert not await store.prune()
    assert await store.prune(max_age_s=600.0) == {"ann": 3}
    assert await remaining(store, grown) == [3, 4, 5, 6, 7, 8, 9]
    await store.append("ann", talk("more", "a", after=grown[3][-1]), conversation="c3")
    assert await store.prune(max_conversations=3) == {"ann": 4}
    assert await remaining(store, grown) == [3, 8, 9]
    store._clock = lambda: 2000.0
    await store.append("bob", talk("new", "a"), conversation="c10")
    assert await store.prune(max_conversations=3) == {"ann": 1}
    store._clock = lambda: 2001.0
    assert await store.prune(max_age_s=0.0) == {"ann": 2, "bob": 1}


async def test_pruning_to_a_size_takes_no_more_than_it_must(store: Store) -> None:
    grown = await ten_conversations(store, text=" ".join(map(str, range(8000))))
    full = (await store.status())["file_bytes"]
    await store.vacuum()
    size = (await store.status())["file_bytes"]
    assert size < full
    pruned = (await store.prune(max_age_s=None, max_conversations=None, max_bytes=size // 2))["ann"]
    assert 4 <= pruned <= 6
    assert await remaining(store, grown) == list(range(pruned, 10))
    await store.vacuum()
    assert (await store.status())["file_bytes"] <= size // 2
    assert await store.prune(max_bytes=0) == {"ann": 10 - pruned}
