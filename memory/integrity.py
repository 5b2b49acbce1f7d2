"""Laws that a store's file must keep, for `chatfold doctor` and the tests."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from memory.database import open_for_reading
from memory.store_errors import StoreDamaged, translated

BUSY_S = 5.0

# Each query yields one line for each breach of its law.
LAWS = (
    "SELECT 'message ' || m.id || ' has a parent that is not stored' FROM messages AS m "
    "WHERE m.parent IS NOT NULL AND NOT EXISTS (SELECT 1 FROM messages WHERE id = m.parent)",
    "SELECT 'message ' || m.id || ' is not one deeper than its parent' FROM messages AS m "
    "JOIN messages AS p ON p.id = m.parent WHERE m.depth <> p.depth + 1",
    "SELECT 'message ' || m.id || ' belongs to another owner than its parent' "
    "FROM messages AS m JOIN messages AS p ON p.id = m.parent WHERE m.owner <> p.owner",
    "SELECT 'message ' || m.id || ' belongs to another owner than its conversation' "
    "FROM messages AS m JOIN conversations AS c ON c.id = m.conversation WHERE m.owner <> c.owner",
    "SELECT 'message ' || m.id || ' is half a turn: a question without its answer' "
    "FROM messages AS m WHERE m.role = 'user' "
    "AND NOT EXISTS (SELECT 1 FROM messages WHERE parent = m.id)",
    "SELECT 'summary ' || s.id || ' belongs to another owner than its conversation' "
    "FROM summaries AS s JOIN conversations AS c ON c.id = s.conversation WHERE s.owner <> c.owner",
    "SELECT 'summary ' || s.id || ' covers messages that are not stored' FROM summaries AS s "
    "WHERE NOT EXISTS (SELECT 1 FROM messages WHERE owner = s.owner AND digest = s.first_digest) "
    "OR NOT EXISTS (SELECT 1 FROM messages WHERE owner = s.owner AND digest = s.last_digest)",
    "SELECT 'rewrite ' || r.id || ' belongs to another owner than its conversation' "
    "FROM rewrites AS r JOIN conversations AS c ON c.id = r.conversation WHERE r.owner <> c.owner",
    "SELECT 'candidate ' || c.id || ' belongs to another owner than its set' "
    "FROM candidates AS c JOIN rewrites AS r ON r.id = c.rewrite WHERE c.owner <> r.owner",
    "SELECT 'conversation ' || c.id || ' is not called by its first message' "
    "FROM conversations AS c WHERE begins <> coalesce((SELECT substr(text, 1, 80) FROM messages "
    "WHERE conversation = c.id ORDER BY depth, id LIMIT 1), '')",
    "SELECT 'message ' || m.id || ' is missing from the word index' FROM messages AS m "
    "WHERE m.id NOT IN (SELECT id FROM message_words_docsize)",
    "SELECT 'message ' || m.id || ' is missing from the trigram index' FROM messages AS m "
    "WHERE m.unspaced AND m.id NOT IN (SELECT id FROM message_trigrams_docsize)",
    "SELECT 'the word index still holds message ' || d.id FROM message_words_docsize AS d "
    "WHERE d.id NOT IN (SELECT id FROM messages)",
    "SELECT 'the trigram index still holds message ' || d.id FROM message_trigrams_docsize AS d "
    "WHERE d.id NOT IN (SELECT id FROM messages)",
)


def integrity(path: Path) -> list[str]:
    """What is wrong with the file, one sentence each; [] if nothing is. Reads all of it and
    changes nothing. Blocks; safe beside a running proxy. Raises StoreUnavailable."""
    try:
        with closing(open_for_reading(path, busy_s=BUSY_S).conn) as conn:
            return _damage(conn) or _breaches(conn)
    except sqlite3.Error as exc:
        return [_damaged_or_raise(exc)]


def _damage(conn: sqlite3.Connection) -> list[str]:
    found = [row[0] for row in conn.execute("PRAGMA integrity_check")]
    strays = [
        f"{table} {rowid} refers to {target} that are not stored"
        for table, rowid, target, _ in conn.execute("PRAGMA foreign_key_check")
    ]
    return [line for line in found if line != "ok"] + strays


def _breaches(conn: sqlite3.Connection) -> list[str]:
    return [row[0] for law in LAWS for row in conn.execute(law)]


def _damaged_or_raise(exc: sqlite3.Error) -> str:
    error = translated(exc)
    if isinstance(error, StoreDamaged):
        return str(error)
    raise error from exc
