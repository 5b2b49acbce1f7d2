"""Full-text search, in scripts with and without spaces."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import in_memory, talk

from memory import queries
from memory.store import Store, integrity

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


# search


async def found(store: Store, query: str) -> list[str]:
    return [node.text for _, node in await store.search("ann", query)]


async def test_search_finds_words_and_ranks_the_better_match_first(store: Store) -> None:
    nodes = talk("the lighthouse is tall", "a red lighthouse café by the sea", "boats", "ok")
    conversation = await store.append("ann", nodes, conversation=None)
    assert await store.search("ann", "Red LIGHTHOUSE!") == [
        (conversation, nodes[1]),
        (conversation, nodes[0]),
    ]
    assert await found(store, "cafe") == [nodes[1].text]
    assert await found(store, "submarine") == []
    assert len(await store.search("ann", "lighthouse", limit=1)) == 1


async def test_search_finds_japanese_within_a_sentence(store: Store) -> None:
    nodes = talk(
        "昨日は京都でラーメンを食べました", "それは良かったですね", "大阪にも行きたい", "ok"
    )
    await store.append("ann", nodes, conversation=None)
    assert await found(store, "ラーメン") == [nodes[0].text]
    assert (await found(store, "京都のラーメンはどうでしたか"))[0] == nodes[0].text
    assert await found(store, "大阪") == [nodes[2].text]
    assert await found(store, "札幌") == []
    assert set(await found(store, "大阪 ok")) == {nodes[2].text, "ok"}


async def test_search_follows_a_text_that_was_rewritten_and_one_forgotten(store: Store) -> None:
    question, answer = talk("q", "灯台は赤い lighthouse")
    conversation = await store.append("ann", [question, answer], conversation=None)
    exact = replace(answer, text=" " + answer.text, token_ids=b"\1\0\0\0")
    await store.append("ann", [question, exact], conversation=None)
    for query in ("lighthouse", "灯台は", "灯台"):
        assert await found(store, query) == [exact.text]
    await store.forget_conversation("ann", conversation)
    for query in ("lighthouse", "灯台は", "灯台"):
        assert await found(store, query) == []


HOSTILE = [
    "",
    " ",
    '"',
    '"" OR ""',
    "AND",
    "a AND",
    "NOT x",
    "NEAR(a b, -1)",
    "text:x",
    "nosuchcolumn:x",
    "-x",
    "x*",
    "^x",
    "(((",
    "{a b}:c",
    "'; DROP TABLE messages; --",
    "\0",
    "a\0b",
    "\ud83d",
    "%",
    "京",
    "京\0都",
    "🎈",
    "𝕏",
    "\u0301",
    "a" * 100_000,
    "a-" * 50_000,
    "京都" * 50_000,
    " ".join(map(str, range(10_000))),
]


async def test_no_query_is_an_error(store: Store) -> None:
    await store.append("ann", talk("a b c x text", "京都 x"), conversation=None)
    for query in HOSTILE:
        await store.search("ann", query)
    assert set(await found(store, '"x" AND (')) == {"a b c x text", "京都 x"}


@settings(max_examples=150, deadline=None)
@given(query=st.text(st.characters()) | st.text('"*^():{}-+ANDORNT \0京', max_size=30))
def test_no_query_is_an_error_whatever_is_typed(query: str) -> None:
    with closing(in_memory().conn) as conn:
        queries.find(conn, "ann", query, limit=3)
