"""Pages of a conversation of 2,000 turns: they read and send little more than those of a short one.

What is counted here does not depend on the machine: statements, rows with their texts, bytes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import long_history
import pytest
from served import Served, served

from memory.records import Node

PATHS = ["", "/turns", "/turns?depth=1", "/summaries", "/summaries?page=2", "/branches", "/context"]
BYTES_MOST = 300_000


@dataclass
class Reads:
    """What one page read from the store."""

    statements: list[str] = field(default_factory=list)
    messages: int = 0
    """With their texts: rows of digests alone are cheap."""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("lengths") / "data", window_tokens=900) as running:
        long_history.put(running, 100, name="short")
        long_history.put(running, 2000, name="long")
        yield running


@pytest.fixture
def reads(house: Served, monkeypatch: pytest.MonkeyPatch) -> Reads:
    store, found = house.app.state.store, Reads()
    read = store._read

    async def counted(work: Callable[[sqlite3.Connection], Any]) -> Any:
        def watched(conn: sqlite3.Connection) -> Any:
            conn.set_trace_callback(found.statements.append)
            try:
                return work(conn)
            finally:
                conn.set_trace_callback(None)

        rows = await read(watched)
        if isinstance(rows, list):
            found.messages += sum(isinstance(row, Node) for row in rows)
        return rows

    monkeypatch.setattr(store, "_read", counted)
    return found


@pytest.mark.parametrize("path", PATHS)
def test_a_page_of_a_long_chat_reads_and_sends_as_little_as_one_of_a_short_chat(
    house: Served, reads: Reads, path: str
) -> None:
    def cost(name: str) -> tuple[int, int, int]:
        reads.statements.clear()
        reads.messages = 0
        response = house.page(f"/inspect/c/{name}{path}")
        assert response.status_code == 200
        return len(reads.statements), reads.messages, len(response.content)

    short, long = cost("short"), cost("long")
    assert 3 <= short[0] <= 30
    # A few more, where many digests are looked up in portions.
    assert long[0] <= short[0] + 10, (short, long)
    assert long[1] <= max(50, 2 * short[1]), (short, long)
    assert long[2] < BYTES_MOST, (short, long)


def test_a_page_holds_its_turns_wherever_it_is_opened(house: Served) -> None:
    base = "/inspect/c/long"
    assert "Message 3999 of" in house.page(f"{base}/turns").text
    assert "Message 1 of" in house.page(f"{base}/turns?depth=1").text
    assert "Message 0 of" in house.page(f"{base}/turns?page=80").text
