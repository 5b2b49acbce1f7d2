"""The store's writes, as plain functions on the writer's connection. Each is all or nothing."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from sqlite_utils import Database

from memory import queries, search
from memory.database import immediate
from memory.queries import batches, marks
from memory.records import FORGOTTEN, Answered, Node, Pin, Summary
from memory.store_errors import NotStored
from memory.transcript import ROOT, Message, canonical, message_digest

PINS_MOST = 20
"""Each stands in every prompt of its conversation."""


class _Stored(NamedTuple):
    id: int
    conversation: str
    depth: int
    exact: bool  # its token ids are known


def append(
    db: Database,
    owner: str,
    nodes: Sequence[Node],
    *,
    conversation: str | None,
    new_id: Callable[[], str],
    now: float,
    client_id: str | None = None,
    answered: Answered | None = None,
) -> str:
    """Returns the conversation in which the last node lies. See Store.append."""
    if not nodes:
        raise ValueError("nothing to append")
    with immediate(db) as conn:
        owner_id = owner_row(conn, owner)
        known = _known(conn, owner_id, {d for node in nodes for d in (node.digest, node.parent)})
        fresh = conversation or new_id()
        touched: set[str] = set()
        for node in sorted(nodes, key=lambda node: node.depth):
            if node.digest in known:
                _complete(conn, known[node.digest], node)
                continue
            parent = _parent(known, node)
            home = parent.conversation if parent and conversation is None else fresh
            if home not in touched:
                _touch(conn, owner_id, home, now)
                touched.add(home)
            id_ = _insert(conn, owner_id, home, parent, node, now)
            known[node.digest] = _Stored(id_, home, node.depth, node.token_ids is not None)
        home = known[nodes[-1].digest].conversation
        if client_id is not None:
            _name(conn, owner_id, client_id, home)
        if answered is not None:
            _note(conn, owner_id, known[answered.message].id, answered, now)
        return home


def owner_row(conn: sqlite3.Connection, key: str) -> int:
    conn.execute("INSERT INTO owners (key) VALUES (?) ON CONFLICT DO NOTHING", (key,))
    return int(conn.execute("SELECT id FROM owners WHERE key = ?", (key,)).fetchone()[0])


def _known(
    conn: sqlite3.Connection, owner_id: int, digests: Iterable[bytes]
) -> dict[bytes, _Stored]:
    known: dict[bytes, _Stored] = {}
    for batch in batches(list(digests)):
        rows = conn.execute(
            "SELECT digest, id, conversation, depth, token_ids IS NOT NULL FROM messages "
            f"WHERE owner = ? AND digest IN ({marks(batch)})",
            (owner_id, *batch),
        )
        known.update({row[0]: _Stored(row[1], row[2], row[3], bool(row[4])) for row in rows})
    return known


def _parent(known: dict[bytes, _Stored], node: Node) -> _Stored | None:
    parent = None if node.parent == ROOT else known.get(node.parent)
    if parent is None and node.parent != ROOT:
        raise NotStored(f"the message before {node.digest.hex()} is not stored")
    if node.depth != (parent.depth + 1 if parent else 0):
        raise ValueError(f"{node.digest.hex()} has depth {node.depth}, not its parent's plus one")
    return parent


def _touch(conn: sqlite3.Connection, owner_id: int, conversation: str, now: float) -> None:
    """Creates the conversation or notes that it grew. Raises NotStored if it is another owner's."""
    conn.execute(
        "INSERT INTO conversations (id, owner, created_at, updated_at) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (id) DO UPDATE SET updated_at = max(updated_at, excluded.updated_at)",
        (conversation, owner_id, now, now),
    )
    require_conversation(conn, owner_id, conversation)


def require_conversation(conn: sqlite3.Connection, owner_id: int, conversation: str) -> None:
    mine = "SELECT 1 FROM conversations WHERE id = ? AND owner = ?"
    if conn.execute(mine, (conversation, owner_id)).fetchone() is None:
        raise NotStored(f"no conversation {conversation!r}")


def _name(conn: sqlite3.Connection, owner_id: int, client_id: str, conversation: str) -> None:
    conn.execute(
        "INSERT INTO client_ids (owner, client_id, conversation) VALUES (?, ?, ?) "
        "ON CONFLICT DO UPDATE SET conversation = excluded.conversation",
        (owner_id, search.storable(client_id), conversation),
    )


def _note(
    conn: sqlite3.Connection, owner_id: int, message: int, answered: Answered, now: float
) -> None:
    row: dict[str, object] = {
        "owner": owner_id,
        "message": message,
        "prompt_tokens": answered.prompt_tokens,
        "cached_tokens": answered.cached_tokens,
        "generated_tokens": answered.generated_tokens,
        "queued_s": answered.queued_s,
        "first_token_s": answered.first_token_s,
        "summaries": json.dumps(answered.summaries),
        "room": json.dumps(answered.room),
        "pinned": answered.pinned,
        "context_digest": answered.context_digest,
        "created_at": now,
    }
    insert_row(conn, "answers", row)


def _front(conn: sqlite3.Connection, owner_id: int, text: str | None) -> int | None:
    if text is None:
        return None
    row = (owner_id, search.storable(text))
    conn.execute(
        "INSERT INTO system_prompts (owner, text) VALUES (?, ?) ON CONFLICT DO NOTHING", row
    )
    query = "SELECT id FROM system_prompts WHERE owner = ? AND text = ?"
    return int(conn.execute(query, row).fetchone()[0])


def _insert(
    conn: sqlite3.Connection,
    owner_id: int,
    conversation: str,
    parent: _Stored | None,
    node: Node,
    now: float,
) -> int:
    row = {
        "owner": owner_id,
        "conversation": conversation,
        "parent": parent.id if parent else None,
        "depth": node.depth,
        "role": node.role,
        "text": search.storable(node.text),
        "n_tokens": node.n_tokens,
        "tokenizer": node.tokenizer,
        "token_ids": node.token_ids,
        "digest": node.digest,
        "message_digest": message_digest(Message(node.role, node.text)),
        "unspaced": search.is_unspaced(node.text),
        "created_at": node.created_at or now,
        "front": _front(conn, owner_id, node.front),
        "note": search.storable(node.note),
    }
    return insert_row(conn, "messages", row)


def insert_row(conn: sqlite3.Connection, table: str, row: dict[str, object]) -> int:
    names = ", ".join(row)
    values = ", ".join(f":{name}" for name in row)
    id_ = conn.execute(f"INSERT INTO {table} ({names}) VALUES ({values})", row).lastrowid
    assert id_ is not None
    return id_


def _complete(conn: sqlite3.Connection, stored: _Stored, node: Node) -> None:
    """Token ids that come later than the text: taken, with the text that they spell."""
    if stored.exact or node.token_ids is None:
        return
    role, text = conn.execute(
        "SELECT role, text FROM messages WHERE id = ?", (stored.id,)
    ).fetchone()
    mine = Message(node.role, search.storable(node.text))
    # A hash found it, a comparison decides.
    if (role, canonical(Message(role, text))) != (mine.role, canonical(mine)):
        return
    conn.execute(
        "UPDATE messages SET text = ?, n_tokens = ?, tokenizer = ?, token_ids = ? WHERE id = ?",
        (mine.text, node.n_tokens, node.tokenizer, node.token_ids, stored.id),
    )


def add_summary(
    db: Database,
    owner: str,
    summary: Summary,
    *,
    read: Sequence[Node] = (),
    shown: Sequence[int] = (),
) -> Summary:
    """See Store.add_summary."""
    with immediate(db) as conn:
        owner_id = owner_row(conn, owner)
        require_conversation(conn, owner_id, summary.conversation)
        _require_remembered(conn, owner_id, read, shown)
        id_ = insert_row(conn, "summaries", queries.summary_row(summary) | {"owner": owner_id})
        return queries.summary(conn, owner, id_)


def _require_remembered(
    conn: sqlite3.Connection, owner_id: int, read: Sequence[Node], shown: Sequence[int]
) -> None:
    """Raises NotStored where a text that these still had is gone. Forgetting a message takes the
    summaries over it along, so it may be gone from either."""
    for batch in batches([n.digest for n in read if n.text != FORGOTTEN]):
        kept = "SELECT count(*) FROM messages WHERE owner = ? AND text != ? AND digest IN"
        values = (owner_id, FORGOTTEN, *batch)
        if conn.execute(f"{kept} ({marks(batch)})", values).fetchone()[0] < len(batch):
            raise NotStored("a message was forgotten while its summary was written")
    for batch in batches(shown):
        kept = "SELECT count(*) FROM summaries WHERE owner = ? AND id IN"
        if conn.execute(f"{kept} ({marks(batch)})", (owner_id, *batch)).fetchone()[0] < len(batch):
            raise NotStored("a summary was forgotten while another was made of it")


def pin(db: Database, owner: str, conversation: str, text: str, *, now: float) -> Pin:
    with immediate(db) as conn:
        owner_id = owner_row(conn, owner)
        require_conversation(conn, owner_id, conversation)
        if len(queries.pins(conn, owner, conversation)) >= PINS_MOST:
            raise ValueError(f"a conversation has at most {PINS_MOST} pinned facts")
        row: dict[str, object] = {
            "owner": owner_id,
            "conversation": conversation,
            "text": search.storable(text),
            "created_at": now,
        }
        return Pin(insert_row(conn, "pins", row), search.storable(text), now)


def unpin(db: Database, owner: str, conversation: str, id_: int) -> bool:
    with immediate(db) as conn:
        done = conn.execute(
            "DELETE FROM pins WHERE id = ? AND conversation = ? "
            "AND owner = (SELECT id FROM owners WHERE key = ?)",
            (id_, conversation, owner),
        )
        return done.rowcount > 0


def activate(db: Database, owner: str, ids: Sequence[int], *, now: float) -> None:
    """With what they were merged from: that was in use before, or never will be."""
    with immediate(db) as conn:
        for batch in batches(ids):
            conn.execute(
                f"""
                WITH RECURSIVE these(id) AS (
                    SELECT id FROM summaries WHERE id IN ({marks(batch)})
                    UNION
                    SELECT json_each.value FROM these
                    JOIN summaries ON summaries.id = these.id, json_each(summaries.parents)
                )
                UPDATE summaries SET activated_at = ? WHERE activated_at IS NULL
                AND owner = (SELECT id FROM owners WHERE key = ?) AND id IN these""",
                (*batch, now, owner),
            )
