"""What can go wrong with the store.

StoreError                  the store could not do it; nothing was changed
├── StoreUnavailable        not now: locked past the bound, disk full, read-only, I/O error
├── StoreDamaged            the file is not a database, or is malformed
├── StoreNewer              the file was written by a newer chatfold; it is left untouched
├── StoreClosed             closed, or opened read-only and asked to write
└── NotStored (ValueError)  refers to a message or conversation that is not, or no longer, stored
"""

from __future__ import annotations

import sqlite3


class StoreError(Exception):
    """The store could not do what was asked."""


class StoreUnavailable(StoreError):
    """Not now: locked past the bound, disk full, read-only or an I/O error. Worth trying again."""


class StoreDamaged(StoreError):
    """The file is not a database, or is malformed. Trying again will not help."""


class StoreNewer(StoreError):
    """The file holds a schema that this code does not know yet."""


class StoreClosed(StoreError):
    """The store is closed, or was opened read-only."""


class NotStored(StoreError, ValueError):
    """A parent or conversation that is not stored for this owner. Nothing was written."""


NOT_NOW = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
    }
)
CONTENDED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})
DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
NEEDS_REOPENING = frozenset(
    {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}
)


def primary_code(error: BaseException) -> int | None:
    """The primary result code of a SQLite error (https://sqlite.org/rescode.html), else None."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def translated(error: sqlite3.Error | OSError) -> StoreError:
    """The error as the rest of the house knows it; decided by code, never by message text."""
    code = primary_code(error)
    if isinstance(error, OSError) or code in NOT_NOW:
        return StoreUnavailable(f"the store cannot be used now: {error}")
    if code in DAMAGED:
        return StoreDamaged(f"the store is damaged: {error}")
    return StoreError(f"the store failed: {error}")
