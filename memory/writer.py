"""One thread writes; a few threads read. No thread waits for a caller, no caller for ever."""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from sqlite_utils import Database

from memory.store_errors import NEEDS_REOPENING, StoreClosed, StoreUnavailable, primary_code

log = logging.getLogger("chatfold.store")
T = TypeVar("T")
Job = tuple["Future[Any]", Callable[[Database], Any]]

STEPS_BETWEEN_CHECKS = 20_000
"""Virtual machine instructions of SQLite between two looks at the clock: about a millisecond."""


class Writer:
    """The one connection that writes, on a thread of its own, jobs in the order of their arrival.

    A job that has been taken on is carried out even if nobody waits for it any more. After an I/O
    error the connection is opened anew for the next job, so that the store heals by itself.
    """

    def __init__(self, open_database: Callable[[], Database], *, max_waiting: int) -> None:
        self._open = open_database
        self._db: Database | None = None
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._max_waiting = max_waiting
        self._closing = False
        self._lock = threading.Lock()  # orders submit() and close(): no job behind the end
        self._thread = threading.Thread(target=self._run, name="chatfold-writer", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Writer waiting={self._jobs.qsize()}/{self._max_waiting} closing={self._closing}>"

    def submit(self, work: Callable[[Database], T]) -> Future[T]:
        """Never blocks. Raises StoreUnavailable if too many jobs wait, StoreClosed after close."""
        future: Future[T] = Future()
        with self._lock:
            if self._closing:
                raise StoreClosed("the store is closed")
            if self._jobs.qsize() >= self._max_waiting:
                raise StoreUnavailable(f"{self._max_waiting} writes are waiting already")
            self._jobs.put((future, work))
        return future

    def close(self, *, close_s: float) -> bool:
        """Takes on no more, does what waits, closes. Blocks; False if that takes longer."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._jobs.put(None)
        self._thread.join(close_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._perform(*job)
            del job  # or its result would live until the next one comes
        self._disconnect()

    def _perform(self, future: Future[Any], work: Callable[[Database], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = work(self._connected())
        except BaseException as exc:  # the worker's edge: a job's failure is its caller's to see
            if primary_code(exc) in NEEDS_REOPENING:
                self._disconnect()
            future.set_exception(exc)
        else:
            future.set_result(result)

    def _connected(self) -> Database:
        if self._db is None:
            self._db = self._open()
        return self._db

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        if db is None:
            return
        try:
            db.conn.close()
        except sqlite3.Error as exc:
            log.warning("the store did not close cleanly: %s", exc)


class Readers:
    """Read-only connections, one for each thread; a read sees one state of the store throughout.

    A read that takes longer than `read_s` is interrupted: SQLITE_INTERRUPT.
    """

    def __init__(
        self, open_database: Callable[[], Database], *, threads: int, read_s: float
    ) -> None:
        self._open = open_database
        self._read_s = read_s
        self._mine = threading.local()
        self._all: set[sqlite3.Connection] = set()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="chatfold-reader")
        self._closed = False
        self._lock = threading.Lock()  # orders submit() and close()

    def submit(self, work: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """Never blocks. Cancelling the future before its turn comes keeps it from running."""
        with self._lock:
            if self._closed:
                raise StoreClosed("the store is closed")
            return self._pool.submit(self._perform, work)

    def close(self) -> None:
        """Takes on no more, then blocks until those taken on have ended, `read_s` at most each."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True)
        for conn in self._all:
            conn.close()
        self._all.clear()

    def _perform(self, work: Callable[[sqlite3.Connection], T]) -> T:
        conn = self._connection()
        deadline = time.monotonic() + self._read_s
        conn.set_progress_handler(lambda: time.monotonic() > deadline, STEPS_BETWEEN_CHECKS)
        try:
            conn.execute("BEGIN")
            try:
                return work(conn)
            finally:
                if conn.in_transaction:
                    conn.execute("ROLLBACK")
        except sqlite3.Error:
            self._forget(conn)
            raise

    def _connection(self) -> sqlite3.Connection:
        conn: sqlite3.Connection | None = getattr(self._mine, "conn", None)
        if conn is None:
            conn = self._mine.conn = self._open().conn
            self._all.add(conn)
        return conn

    def _forget(self, conn: sqlite3.Connection) -> None:
        self._mine.conn = None
        self._all.discard(conn)
        conn.close()
