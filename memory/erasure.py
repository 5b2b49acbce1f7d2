"""Forgetting and pruning: taking conversations out of the file, down to the bytes."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence

from sqlite_utils import Database

from memory import rewrites
from memory.database import immediate
from memory.records import FORGOTTEN
from memory.store_errors import StoreUnavailable

INDEXES = ("message_words", "message_trigrams")


def forget_conversation(db: Database, owner: str, conversation: str) -> int:
    """The number of messages deleted. Raises StoreUnavailable while their bytes may remain."""
    with immediate(db) as conn:
        mine = conn.execute(
            "SELECT id FROM conversations WHERE id = ? "
            "AND owner = (SELECT id FROM owners WHERE key = ?)",
            (conversation, owner),
        )
        deleted = _delete(conn, [row[0] for row in mine])
    wipe(db)
    return deleted


def forget_message(db: Database, owner: str, digest: bytes) -> int:
    """1, or 0 where it is not stored. The row stays, as a place in the tree: its text goes, every
    number made from it, and every summary over it. What is left is the chain digest, by which the
    message is known again, and kept from the model, when a client sends it."""
    with immediate(db) as conn:
        row = conn.execute(
            "SELECT id, depth FROM messages WHERE digest = ? "
            "AND owner = (SELECT id FROM owners WHERE key = ?)",
            (digest, owner),
        ).fetchone()
        if row is None:
            return 0
        _blank(conn, *row)
        _optimize(conn)
    wipe(db)
    return 1


def _blank(conn: sqlite3.Connection, id_: int, depth: int) -> None:
    conn.execute(
        "UPDATE messages SET text = ?, note = '', n_tokens = -1, tokenizer = '', token_ids = NULL, "
        # The digest of one message alone could be guessed from a list of likely texts.
        "message_digest = randomblob(20), unspaced = 0 WHERE id = ?",
        (FORGOTTEN, id_),
    )
    homes = conn.execute(
        """
        WITH RECURSIVE branch(id) AS (
            SELECT ?
            UNION
            SELECT messages.id FROM branch JOIN messages ON messages.parent = branch.id
        )
        SELECT DISTINCT conversation FROM messages WHERE id IN branch""",
        (id_,),
    ).fetchall()
    over = "first_depth <= ? AND last_depth >= ? AND conversation = ?"
    for (home,) in homes:
        conn.execute(f"DELETE FROM summaries WHERE {over}", (depth, depth, home))
        rewrites.delete_where(conn, over, (depth, depth, home))


def forget_owner(db: Database, owner: str) -> int:
    """As forget_conversation, for all that is the owner's and the owner's key itself."""
    with immediate(db) as conn:
        deleted = _delete(conn, _conversations(conn, "owners.key = ?", owner))
        conn.execute("DELETE FROM owners WHERE key = ?", (owner,))
    wipe(db)
    return deleted


def wipe(db: Database) -> None:
    """Rewrites the file from what is still in it and empties its log.

    secure_delete alone is not enough: when SQLite moves rows between pages it leaves copies in
    the unused part of a page (5 of 1,128 deleted messages could still be read in a test file).
    """
    db.conn.execute("PRAGMA temp_store=FILE")  # the copy may be larger than memory
    try:
        db.conn.execute("VACUUM")
    finally:
        db.conn.execute("PRAGMA temp_store=MEMORY")
    if not truncate_log(db):
        raise StoreUnavailable(
            "deleted, but another program is reading the file and its write-ahead log still holds "
            "the old bytes; do it again when that program is done"
        )


def truncate_log(db: Database) -> bool:
    """Empties the write-ahead log; False if a reader kept it for the whole busy timeout."""
    (busy, _frames, _moved) = db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not busy


def prune(
    db: Database,
    *,
    now: float,
    max_age_s: float | None,
    max_conversations: int | None,
    max_bytes: int | None,
) -> Counter[str]:
    """How many conversations of each owner were deleted, those first that have not grown for
    longest.
    """
    pruned: Counter[str] = Counter()
    if max_age_s is not None:
        pruned += _prune_where(db, "updated_at < ?", now - max_age_s)
    if max_conversations is not None:
        keep = "SELECT id FROM conversations ORDER BY updated_at DESC, rowid DESC LIMIT ?"
        pruned += _prune_where(db, f"conversations.id NOT IN ({keep})", max_conversations)
    if max_bytes is not None:
        pruned += _prune_to(db, max_bytes)
    if pruned:
        truncate_log(db)
    return pruned


def _prune_where(db: Database, condition: str, value: float) -> Counter[str]:
    with immediate(db) as conn:
        return _prune(conn, _conversations(conn, condition, value))


def _prune_to(db: Database, max_bytes: int) -> Counter[str]:
    """Deletes by an estimate, measures, and goes on until it fits or nothing is left."""
    pruned: Counter[str] = Counter()
    while True:
        with immediate(db) as conn:
            now = _prune(conn, _excess(conn, used_bytes(conn), max_bytes))
        if not now:
            return pruned
        pruned += now


def _prune(conn: sqlite3.Connection, doomed: Sequence[str]) -> Counter[str]:
    whose = (
        "SELECT key FROM owners JOIN conversations ON conversations.owner = owners.id "
        "WHERE conversations.id = ?"
    )
    pruned = Counter(conn.execute(whose, (id_,)).fetchone()[0] for id_ in doomed)
    _delete(conn, doomed)
    return pruned


def _excess(conn: sqlite3.Connection, used: int, max_bytes: int) -> list[str]:
    """The oldest conversations, as many as hold the excess if bytes lie as characters do."""
    if used <= max_bytes:
        return []
    rows = conn.execute(
        "SELECT conversation, sum(length(text)) + 1 FROM messages "
        "JOIN conversations ON conversations.id = messages.conversation "
        "GROUP BY conversation ORDER BY updated_at, conversations.rowid"
    ).fetchall()
    total = sum(size for _, size in rows)
    doomed: list[str] = []
    freed = 0.0
    for conversation, size in rows:
        if freed >= used - max_bytes:
            break
        doomed.append(conversation)
        freed += used * size / total
    return doomed


def used_bytes(conn: sqlite3.Connection) -> int:
    """The file's pages that hold something; vacuum gives the others back."""
    pragmas = ("page_count", "freelist_count", "page_size")
    pages, free, size = (conn.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas)
    return int((pages - free) * size)


def _conversations(conn: sqlite3.Connection, condition: str, value: float | str) -> list[str]:
    rows = conn.execute(
        "SELECT conversations.id FROM conversations "
        f"JOIN owners ON owners.id = conversations.owner WHERE {condition}",
        (value,),
    )
    return [row[0] for row in rows]


def _delete(conn: sqlite3.Connection, conversations: Sequence[str]) -> int:
    """Returns the number of messages deleted, and takes their words out of the indexes."""
    deleted = sum(_delete_one(conn, conversation) for conversation in conversations)
    if deleted:
        _optimize(conn)
    return deleted


def _optimize(conn: sqlite3.Connection) -> None:
    for index in INDEXES:  # until merged, an index only marks what is deleted in it
        conn.execute(f"INSERT INTO {index}({index}) VALUES ('optimize')")


def _delete_one(conn: sqlite3.Connection, conversation: str) -> int:
    """Also what other conversations grew from it: a message without its ancestors is of no use."""
    conn.execute("CREATE TEMP TABLE IF NOT EXISTS doomed (id INTEGER PRIMARY KEY, home TEXT)")
    conn.execute("DELETE FROM temp.doomed")
    conn.execute(
        """
        WITH RECURSIVE branch(id) AS (
            SELECT id FROM messages WHERE conversation = ?
            UNION
            SELECT messages.id FROM branch JOIN messages ON messages.parent = branch.id
        )
        INSERT INTO temp.doomed SELECT id, conversation FROM messages WHERE id IN branch""",
        (conversation,),
    )
    homes = "SELECT home FROM temp.doomed UNION SELECT ?"
    conn.execute(f"DELETE FROM summaries WHERE conversation IN ({homes})", (conversation,))
    rewrites.delete_where(conn, f"conversation IN ({homes})", (conversation,))
    conn.execute("DELETE FROM answers WHERE message IN (SELECT id FROM temp.doomed)")
    deleted = conn.execute("DELETE FROM messages WHERE id IN (SELECT id FROM temp.doomed)").rowcount
    conn.execute(f"DELETE FROM client_ids WHERE conversation IN ({homes})", (conversation,))
    conn.execute(
        "DELETE FROM system_prompts "
        "WHERE NOT EXISTS (SELECT 1 FROM messages WHERE front = system_prompts.id)"
    )
    conn.execute(
        f"DELETE FROM pins WHERE conversation IN ({homes}) "
        "AND NOT EXISTS (SELECT 1 FROM messages WHERE conversation = pins.conversation)",
        (conversation,),
    )
    conn.execute(
        f"DELETE FROM conversations WHERE id IN ({homes}) "
        "AND NOT EXISTS (SELECT 1 FROM messages WHERE conversation = conversations.id)",
        (conversation,),
    )
    return deleted
