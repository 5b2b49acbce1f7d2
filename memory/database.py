"""Opening the file: private, write-ahead logged, migrated; set aside where it is damaged."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from sqlite_utils import Database

from memory import migrations
from memory.store_errors import CONTENDED, DAMAGED, primary_code

log = logging.getLogger("chatfold.store")
T = TypeVar("T")

RETRY_S = 0.02
WAL_LIMIT_BYTES = 16 * 1024 * 1024


@contextmanager
def immediate(db: Database) -> Iterator[sqlite3.Connection]:
    """One transaction that holds the write lock from its first statement on; all or nothing.

    Not sqlite-utils' atomic(): that begins a deferred transaction, which SQLite must refuse when
    another process writes between its first read and its first write.
    """
    db.conn.execute("BEGIN IMMEDIATE")
    try:
        yield db.conn
        db.conn.execute("COMMIT")
    except BaseException:
        if db.conn.in_transaction:  # a full disk may have rolled it back already
            db.conn.execute("ROLLBACK")
        raise


def open_for_writing(path: Path, *, open_s: float, busy_s: float) -> Database:
    """The one connection that writes: creates and migrates the file as needed.

    Blocks up to `open_s` while other processes do the same; then raises their sqlite3 error.
    A damaged file is moved aside, never deleted, and an empty one takes its place.
    """
    deadline = time.monotonic() + open_s
    create_private(path)
    try:
        return _until(deadline, lambda: _open_once(path, busy_s))
    except sqlite3.DatabaseError as exc:
        if primary_code(exc) not in DAMAGED:
            raise
        set_aside_if_damaged(path, deadline)
    create_private(path)
    return _until(deadline, lambda: _open_once(path, busy_s))


def open_alone(path: Path, *, busy_s: float) -> Database:
    """A connection that writes and lets no other program in until it is closed. Makes and migrates
    nothing. Raises sqlite3.Error where somebody else has the file open, and StoreError."""
    conn = _connect(path, "rw", busy_s)
    try:
        # Before all else: the lock is taken when the write-ahead log is first looked at.
        conn.execute("PRAGMA locking_mode=EXCLUSIVE")
        db = Database(conn, execute_plugins=False)
        with immediate(db):
            migrations.require_current(db)
        _configure(conn)
        return db
    except BaseException:
        conn.close()
        raise


def open_for_reading(path: Path, *, busy_s: float) -> Database:
    """A connection that cannot write. Raises sqlite3.Error."""
    conn = _connect(path, "ro", busy_s)
    try:
        return Database(conn, execute_plugins=False)
    except BaseException:
        conn.close()
        raise


def _connect(path: Path, mode: str, busy_s: float) -> sqlite3.Connection:
    """To a file that is there already."""
    # autocommit (isolation_level None): Python must not begin transactions of its own.
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=busy_s,
        isolation_level=None,
        check_same_thread=False,
    )


def create_private(path: Path) -> None:
    """Creates an empty file (0600) in its directory (0700) where they are missing."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # O_EXCL: closing a descriptor of a file that SQLite has open in this process would drop its
    # POSIX locks (https://sqlite.org/howtocorrupt.html, 2.2).
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def set_aside_if_damaged(path: Path, deadline: float) -> None:
    """Renames NAME, NAME-wal and NAME-shm to NAME.damaged-TIME; at most one process does it.

    `deadline` is on the monotonic clock. Without the lock and the second look, a slower process
    would set aside the new file that a faster one has just made.
    """
    with _directory_lock(path.parent, deadline):
        if not _is_damaged(path):
            return
        aside = _free_name(f"{path}.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
        for suffix in ("-wal", "-shm", ""):  # the log first: it must not meet the new file
            with suppress(FileNotFoundError):
                os.rename(f"{path}{suffix}", f"{aside}{suffix}")
        log.warning(
            "the store %s is damaged: it was set aside as %s, and an empty one takes its place",
            path,
            aside,
        )


def _open_once(path: Path, busy_s: float) -> Database:
    conn = sqlite3.connect(path, timeout=busy_s, isolation_level=None, check_same_thread=False)
    try:
        db = Database(conn, execute_plugins=False)
        # First of all, so that a newer file stays untouched.
        ready = migrations.is_current(db)
        _configure(conn)
        if not ready:
            with immediate(db):
                migrations.migrate(db)
        return db
    except BaseException:
        conn.close()
        raise


def _configure(conn: sqlite3.Connection) -> None:
    # WAL before the migrations: it cannot be switched on inside a transaction.
    (mode,) = conn.execute("PRAGMA journal_mode=WAL").fetchone()
    if mode != "wal":
        log.warning("no write-ahead log here (journal mode %s): readers may wait for writers", mode)
    conn.execute("PRAGMA synchronous=FULL")  # a commit survives the loss of power
    conn.execute("PRAGMA foreign_keys=ON")
    conn.execute("PRAGMA secure_delete=ON")
    conn.execute("PRAGMA temp_store=MEMORY")  # no chat text in temporary files
    conn.execute(f"PRAGMA journal_size_limit={WAL_LIMIT_BYTES}")


def _until(deadline: float, attempt: Callable[[], T]) -> T:
    # SQLite does not call its busy handler where waiting could deadlock, as when the journal mode
    # changes, so that some of several first starts are refused at once: they try again here.
    while True:
        try:
            return attempt()
        except sqlite3.OperationalError as exc:
            if primary_code(exc) not in CONTENDED or time.monotonic() > deadline:
                raise
        time.sleep(RETRY_S)


def _is_damaged(path: Path) -> bool:
    if not path.exists():
        return False
    conn = sqlite3.connect(path, isolation_level=None)
    try:
        conn.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return False
    except sqlite3.DatabaseError as exc:
        return primary_code(exc) in DAMAGED
    finally:
        conn.close()


def _free_name(name: str) -> str:
    # Twice within one second: a rename must not replace what was set aside before.
    candidates = (name, *(f"{name}.{n}" for n in range(1, 1000)))
    return next(candidate for candidate in candidates if not os.path.exists(candidate))


@contextmanager
def _directory_lock(directory: Path, deadline: float) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows: one process at a time is all we can ask for
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(RETRY_S)
        yield
    finally:
        os.close(descriptor)
