"""What happens when something fails, is slow, or is damaged."""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
import stat
import threading
import time
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from sqlite_utils import Database
from store_samples import branch, digests_of, names, old_store, summary_of, talk

from memory import backup
from memory.database import immediate, open_for_writing, set_aside_if_damaged
from memory.store import (
    Bounds,
    NotStored,
    Store,
    StoreClosed,
    StoreDamaged,
    StoreError,
    StoreNewer,
    StoreUnavailable,
    integrity,
)
from memory.writer import Writer

pytestmark = pytest.mark.anyio
WAIT_S = 20.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def store(tmp_path: Path, anyio_backend: str) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "db" / "store.db", clock=lambda: 1000.0)
    yield opened
    await opened.close()
    assert integrity(tmp_path / "db" / "store.db") == []


class Held:
    """A write that holds its transaction open until it is let go."""

    def __init__(self, store: Store) -> None:
        self._started, self._go = threading.Event(), threading.Event()
        self._task = asyncio.ensure_future(store._write(self._hold))

    def _hold(self, db: Database) -> None:
        with immediate(db) as conn:
            conn.execute("INSERT INTO owners (key) VALUES ('held')")
            self._started.set()
            assert self._go.wait(WAIT_S)

    async def started(self) -> None:
        assert await asyncio.to_thread(self._started.wait, WAIT_S)

    async def let_go(self) -> None:
        self._go.set()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def done(self) -> bool:
        return self._task.done()


# all or nothing


async def test_a_fault_in_the_midst_of_an_append_leaves_nothing(store: Store) -> None:
    nodes = talk(*"abcdef")
    await store._write(
        lambda db: db.execute(
            "CREATE TEMP TRIGGER fault BEFORE INSERT ON messages WHEN new.depth = 4 "
            "BEGIN SELECT RAISE(ABORT, 'injected'); END"
        )
    )
    with pytest.raises(StoreError, match="injected"):
        await store.append("ann", nodes, conversation=None)
    counts = await store.status()
    assert [counts[key] for key in ("owners", "conversations", "messages")] == [0, 0, 0]
    await store._write(lambda db: db.execute("DROP TRIGGER fault"))
    await store.append("ann", nodes, conversation=None)
    assert await store.path("ann", nodes[-1].digest) == nodes


@pytest.mark.parametrize("gap", [0, 1, 2])
async def test_a_message_without_its_parent_is_refused_whole(store: Store, gap: int) -> None:
    nodes = talk(*"abcd")
    del nodes[gap]
    with pytest.raises(NotStored) as caught:
        await store.append("ann", nodes, conversation=None)
    assert isinstance(caught.value, ValueError)
    assert (await store.status())["messages"] == 0


async def test_a_wrong_depth_or_nothing_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="depth"):
        await store.append("ann", [replace(talk("q")[0], depth=3)], conversation=None)
    with pytest.raises(ValueError, match="nothing"):
        await store.append("ann", [], conversation=None)
    with pytest.raises(NotStored):
        await store.append("ann", [replace(talk("q")[0], parent=b"x")], conversation=None)
    assert (await store.status())["messages"] == 0
    assert not store.degraded


async def test_a_cancelled_append_is_still_carried_out(store: Store) -> None:
    nodes = talk("q", "a")
    held = Held(store)
    await held.started()
    task = asyncio.ensure_future(store.append("ann", nodes, conversation=None))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await held.let_go()
    await store.append("bob", nodes, conversation=None)  # behind it in the queue
    assert await store.nodes("ann", digests_of(nodes)) == nodes


async def test_closing_carries_out_what_waits_and_takes_no_more(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "s.db")
    nodes = talk("q", "a")
    tasks = [
        asyncio.ensure_future(store.append(f"o{i}", nodes, conversation=None)) for i in range(20)
    ]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.gather(*tasks)
    await store.close()
    with pytest.raises(StoreClosed):
        await store.append("ann", nodes, conversation=None)
    with pytest.raises(StoreClosed):
        await store.nodes("ann", digests_of(nodes))


# waiting


async def test_readers_do_not_wait_for_a_writer(store: Store) -> None:
    nodes = talk("q", "a")
    conversation = await store.append("ann", nodes, conversation=None)
    held = Held(store)
    await held.started()
    assert await store.deepest("ann", digests_of(nodes)) == (conversation, 1)
    assert await store.nodes("held", digests_of(nodes)) == []
    assert (await store.status())["owners"] == 1
    assert not held.done
    await held.let_go()
    assert (await store.status())["owners"] == 2


async def test_a_write_gives_up_waiting_and_the_next_one_heals(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "s.db", bounds=Bounds(write_s=0.05))
    held = Held(store)
    await held.started()
    with pytest.raises(StoreUnavailable, match="within"):
        await store.append("ann", talk("q", "a"), conversation=None)
    assert store.degraded
    await held.let_go()
    store._bounds = Bounds()
    await store.append("ann", talk("q", "a"), conversation=None)
    assert not store.degraded
    await store.close()


async def test_a_lock_held_by_another_program_is_unavailable_not_an_endless_wait(
    tmp_path: Path,
) -> None:
    store = await Store.open(tmp_path / "s.db", bounds=Bounds(busy_s=0.05))
    with closing(sqlite3.connect(tmp_path / "s.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked"):
            await store.append("ann", talk("q", "a"), conversation=None)
        assert (await store.status())["degraded"] is True
        other.execute("ROLLBACK")
    await store.append("ann", talk("q", "a"), conversation=None)
    assert (await store.status())["degraded"] is False
    await store.close()


async def test_an_endless_read_is_interrupted(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "s.db", bounds=Bounds(read_s=0.05))
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    store._bounds = Bounds()  # so that only the reading thread's own bound can end it
    with pytest.raises(StoreUnavailable, match="interrupted"):
        await store._read(lambda conn: conn.execute(endless).fetchone())
    assert await store.nodes("ann", []) == []
    await store.close()


async def test_too_many_writes_at_once_are_refused(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "s.db", bounds=Bounds(max_waiting_writes=1))
    held = Held(store)
    await held.started()
    waiting = asyncio.ensure_future(store.append("ann", talk("q", "a"), conversation=None))
    await asyncio.sleep(0)
    with pytest.raises(StoreUnavailable, match="waiting already"):
        await store.append("bob", talk("q", "a"), conversation=None)
    assert store.degraded
    await held.let_go()
    await waiting
    await store.close()


# the file


async def test_file_and_directory_are_private(store: Store) -> None:
    await store.append("ann", talk("q", "a"), conversation=None)
    files = list(store._path.parent.iterdir())
    assert store._path in files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(store._path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("header_survives", [False, True])
async def test_a_damaged_file_is_set_aside_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, header_survives: bool
) -> None:
    path, nodes = tmp_path / "s.db", talk("q", "a")
    await (await Store.open(path)).close()
    head = path.read_bytes()[: 100 if header_survives else 0]
    damaged = head + random.Random(1).randbytes(50_000)
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING, "chatfold.store"):
        store = await Store.open(path)
    assert await store.nodes("ann", digests_of(nodes)) == []
    await store.append("ann", nodes, conversation=None)
    await store.close()
    (aside,) = names(tmp_path, "s.db.damaged-????????T??????")
    assert (tmp_path / aside).read_bytes() == damaged
    assert aside in caplog.text
    assert integrity(path) == []


async def test_damage_found_later_is_its_own_error(tmp_path: Path) -> None:
    path, nodes = tmp_path / "s.db", branch(f"word {i} " * 200 for i in range(40))
    store = await Store.open(path)
    await store.append("ann", nodes, conversation=None)
    await store.close()
    content = path.read_bytes()
    whole = 4096 * (len(content) // 4096 * 3 // 4)
    path.write_bytes(content[:whole] + b"\xff" * (len(content) - whole))
    store = await Store.open(path)
    with pytest.raises(StoreDamaged):
        await store.nodes("ann", digests_of(nodes))
    assert store.degraded
    await store.close()
    assert integrity(path) != []


async def test_a_newer_schema_is_refused_and_left_untouched(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    await (await Store.open(path)).close()
    with closing(sqlite3.connect(path)) as conn:
        conn.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) "
            "VALUES ('chatfold', 'm9999_from_the_future', '')"
        )
        conn.commit()
    before = path.read_bytes()
    with pytest.raises(StoreNewer, match="m9999_from_the_future"):
        await Store.open(path)
    with pytest.raises(StoreNewer):
        await Store.open_read_only(path)
    assert path.read_bytes() == before
    assert names(tmp_path, "*damaged*") == []


async def test_an_older_schema_is_upgraded_with_what_it_holds(tmp_path: Path) -> None:
    path, nodes = tmp_path / "s.db", talk("where is the lighthouse", "京都駅の近くです")
    old_store(path, "ann", nodes)
    with pytest.raises(StoreError, match="m0002_search"):
        await Store.open_read_only(path)
    store = await Store.open(path)
    assert [node for _, node in await store.search("ann", "lighthouse")] == nodes[:1]
    assert [node for _, node in await store.search("ann", "京都駅")] == nodes[1:]
    await store.close()
    assert integrity(path) == []


async def test_a_tool_reads_beside_the_proxy_and_cannot_write(store: Store) -> None:
    nodes = talk("q", "a")
    await store.append("ann", nodes, conversation=None)
    tool = await Store.open_read_only(store._path)
    assert await tool.path("ann", nodes[-1].digest) == nodes
    with pytest.raises(StoreClosed, match="read-only"):
        await tool.append("ann", talk("x", "y"), conversation=None)
    with pytest.raises(StoreError, match="readonly"):
        await tool._read(lambda conn: conn.execute("DELETE FROM messages"))
    await tool.close()


async def test_a_tool_does_not_make_a_file_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        await Store.open_read_only(tmp_path / "none.db")
    assert names(tmp_path) == []


async def test_a_full_disk_is_unavailable_and_heals(store: Store) -> None:
    small, large = talk("q", "a"), talk("x" * 400_000, "y")
    conversation = await store.append("ann", small, conversation=None)

    def limit(db: Database, *, spare_pages: int) -> None:
        (pages,) = db.conn.execute("PRAGMA page_count").fetchone()
        db.conn.execute(f"PRAGMA max_page_count = {pages + spare_pages}").fetchone()

    await store._write(lambda db: limit(db, spare_pages=20))
    with pytest.raises(StoreUnavailable, match="full"):
        await store.append("ann", large, conversation=None)
    assert store.degraded
    assert await store.deepest("ann", digests_of(small)) == (conversation, 1)
    assert await store.nodes("ann", digests_of(large)) == []
    await store.append("ann", talk("short", "too"), conversation=None)
    assert not store.degraded
    await store._write(lambda db: limit(db, spare_pages=1_000_000))
    await store.append("ann", large, conversation=None)
    assert await store.nodes("ann", digests_of(large)) == large


async def test_integrity_names_each_broken_law(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    store = await Store.open(path)
    nodes = talk(*"abcdef")
    conversation = await store.append("ann", nodes, conversation=None)
    await store.add_summary("ann", summary_of(talk("never", "stored"), conversation))
    await store.close()
    assert [line.split(" ", 2)[2] for line in integrity(path)] == [
        "covers messages that are not stored"
    ]
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("DELETE FROM messages WHERE depth IN (3, 5)")
        conn.execute("UPDATE messages SET depth = 9 WHERE depth = 1")
        conn.execute("DELETE FROM message_words_docsize WHERE id = 1")
        conn.commit()
    found = "\n".join(integrity(path))
    assert "messages 5 refers to messages that are not stored" in found
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("UPDATE messages SET parent = NULL, depth = 0 WHERE id = 5")
        conn.commit()
    found = "\n".join(integrity(path))
    assert "message 2 is not one deeper than its parent" in found
    assert "message 5 is half a turn" in found
    assert "message 1 is missing from the word index" in found


async def test_a_backup_taken_while_writing_is_whole(store: Store, tmp_path: Path) -> None:
    nodes = branch(f"text {i} " * 50 for i in range(400))
    await store.append("ann", nodes, conversation=None)
    stop = asyncio.Event()

    async def keep_writing() -> int:
        i = 0
        while not stop.is_set():
            await store.append("bob", talk(f"q{i}", f"a{i}"), conversation=None)
            i += 1
        return i

    writing = asyncio.ensure_future(keep_writing())
    target = tmp_path / "copy.db"
    target.write_text("an older copy")
    await store.backup(target)
    stop.set()
    assert await writing > 0
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert integrity(target) == []
    copy = await Store.open_read_only(target)
    assert await copy.nodes("ann", digests_of(nodes)) == nodes
    await copy.close()
    assert names(tmp_path, "*unfinished*") == []


PRAGMAS = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "secure_delete": 1}


async def test_a_commit_waits_for_the_disk(store: Store) -> None:
    """Loss of power cannot be tested here; the settings that SQLite documents for it can."""
    settings = await store._write(
        lambda db: [db.execute(f"PRAGMA {name}").fetchone()[0] for name in PRAGMAS]
    )
    assert dict(zip(PRAGMAS, settings, strict=True)) == PRAGMAS


def test_the_write_lock_is_held_before_the_first_statement(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with (
        closing(open_for_writing(path, open_s=WAIT_S, busy_s=0).conn) as mine,
        closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other,
        immediate(Database(mine, execute_plugins=False)),
        pytest.raises(sqlite3.OperationalError, match="locked"),
    ):
        other.execute("BEGIN IMMEDIATE")


def test_a_sound_file_is_never_set_aside(tmp_path: Path) -> None:
    """As when a faster process has replaced the damaged file already."""
    open_for_writing(tmp_path / "s.db", open_s=WAIT_S, busy_s=0).conn.close()
    set_aside_if_damaged(tmp_path / "s.db", deadline=time.monotonic() + WAIT_S)
    assert names(tmp_path) == ["s.db"]


def test_after_an_io_error_the_writer_opens_the_file_anew() -> None:
    opened: list[Database] = []

    def open_database() -> Database:
        conn = sqlite3.connect(":memory:", check_same_thread=False)
        opened.append(Database(conn, execute_plugins=False))
        return opened[-1]

    def fail(db: Database, code: int) -> None:
        error = sqlite3.OperationalError("injected")
        error.sqlite_errorcode = code
        raise error

    writer = Writer(open_database, max_waiting=10)
    for code, connections in ((sqlite3.SQLITE_FULL, 1), (sqlite3.SQLITE_IOERR | 1 << 8, 2)):
        with pytest.raises(sqlite3.OperationalError, match="injected"):
            writer.submit(partial(fail, code=code)).result(WAIT_S)
        assert writer.submit(lambda db: db is opened[-1]).result(WAIT_S)
        assert len(opened) == connections
    assert writer.close(close_s=WAIT_S)


class WriteAtEachLook(threading.Event):
    """A stop signal that is never given; each look at it lets another connection write."""

    def __init__(self, other: sqlite3.Connection) -> None:
        super().__init__()
        self.looks, self._other = 0, other

    def is_set(self) -> bool:
        self.looks += 1
        self._other.execute("INSERT INTO owners (key) VALUES (?)", (f"later {self.looks}",))
        return self.looks > 500  # a copy that starts again at each write would not end


def test_a_backup_is_of_the_moment_it_began_however_much_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "PAGES_AT_ONCE", 5)
    with closing(open_for_writing(tmp_path / "s.db", open_s=WAIT_S, busy_s=0).conn) as conn:
        conn.execute("INSERT INTO owners (key) VALUES ('before')")
        stop = WriteAtEachLook(conn)
        backup.copy(tmp_path / "s.db", tmp_path / "copy.db", stop=stop)
        assert stop.looks > 3
    with closing(sqlite3.connect(tmp_path / "copy.db")) as copied:
        assert copied.execute("SELECT key FROM owners").fetchall() == [("before",)]


def test_a_backup_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    open_for_writing(tmp_path / "s.db", open_s=WAIT_S, busy_s=0).conn.close()
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedError):
        backup.copy(tmp_path / "s.db", tmp_path / "copy.db", stop=stop)
    assert names(tmp_path, "copy*") == []
