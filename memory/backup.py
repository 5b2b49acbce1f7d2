"""A consistent copy of a database that is in use."""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path

from memory.database import create_private, open_for_reading

PAGES_AT_ONCE = 1000
BUSY_S = 5.0


def copy(source: Path, target: Path, *, stop: threading.Event) -> None:
    """Writes beside `target`, then renames. Gives up soon after `stop` is set: SQLITE_INTERRUPT
    cannot be had here, so InterruptedError, an OSError. Raises sqlite3.Error, OSError."""
    unfinished = target.with_name(f"{target.name}.unfinished-{os.getpid()}")
    create_private(unfinished)
    try:
        _copy_pages(source, unfinished, stop)
        os.replace(unfinished, target)
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()


def _copy_pages(source: Path, target: Path, stop: threading.Event) -> None:
    def look_up(_status: int, _remaining: int, _total: int) -> None:
        if stop.is_set():
            raise InterruptedError("the backup was given up")

    with (
        closing(open_for_reading(source, busy_s=BUSY_S).conn) as theirs,
        closing(sqlite3.connect(target, isolation_level=None)) as ours,
    ):
        # The open transaction pins one state of the source; without it, each write by another
        # connection would start the copy again.
        theirs.execute("BEGIN")
        theirs.execute("SELECT count(*) FROM sqlite_master").fetchone()
        theirs.backup(ours, pages=PAGES_AT_ONCE, progress=look_up, sleep=0)
        ours.execute("PRAGMA journal_mode=DELETE")  # the copy is one file
