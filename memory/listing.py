"""Reads for who looks at what is stored, as plain functions on a connection. Each but `owners`
filters by owner.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any, NamedTuple

from memory import search
from memory.queries import OWNER, PARENTS, as_summary, batches, marks
from memory.queries import SUMMARY_FIELDS as FIELDS
from memory.records import Answered, Node, Summary
from memory.transcript import ROOT

BEGINS_CHARS = 200


class OwnerEntry(NamedTuple):
    """An owner's name, and how much there is of it."""

    key: str
    n_conversations: int
    updated_at: float


class Entry(NamedTuple):
    """One conversation in a list. `begins` is the beginning of its first message."""

    id: str
    created_at: float
    updated_at: float
    n_messages: int
    n_summaries: int
    begins: str


class Twig(NamedTuple):
    """A message without its text: enough to draw the tree."""

    digest: bytes
    parent: bytes
    depth: int
    role: str
    n_tokens: int
    created_at: float


def owners(conn: sqlite3.Connection) -> list[OwnerEntry]:
    """Everybody who has conversations, who spoke last first."""
    rows = conn.execute(
        "SELECT owners.key, count(*), max(updated_at) FROM conversations "
        "JOIN owners ON owners.id = conversations.owner GROUP BY owners.id ORDER BY 3 DESC"
    )
    return [OwnerEntry(*row) for row in rows]


_ENTRY = f"""SELECT id, created_at, updated_at,
    (SELECT count(*) FROM messages WHERE conversation = conversations.id),
    (SELECT count(*) FROM summaries WHERE conversation = conversations.id),
    coalesce((SELECT substr(text, 1, {BEGINS_CHARS}) FROM messages
        WHERE conversation = conversations.id ORDER BY depth, id LIMIT 1), '')
FROM conversations WHERE owner = {OWNER}"""


def conversations(
    conn: sqlite3.Connection, owner: str, *, limit: int, offset: int = 0
) -> list[Entry]:
    """Those that grew last first."""
    rows = conn.execute(
        f"{_ENTRY} ORDER BY updated_at DESC, rowid DESC LIMIT :limit OFFSET :offset",
        {"owner": owner, "limit": limit, "offset": offset},
    )
    return [Entry(*row) for row in rows]


def n_conversations(conn: sqlite3.Connection, owner: str) -> int:
    row = conn.execute(
        f"SELECT count(*) FROM conversations WHERE owner = {OWNER}", {"owner": owner}
    ).fetchone()
    return int(row[0])


def conversation(conn: sqlite3.Connection, owner: str, id_: str) -> Entry | None:
    row = conn.execute(f"{_ENTRY} AND id = :id", {"owner": owner, "id": id_}).fetchone()
    return None if row is None else Entry(*row)


def entries(conn: sqlite3.Connection, owner: str, ids: Sequence[str]) -> dict[str, Entry]:
    found = (conversation(conn, owner, id_) for id_ in dict.fromkeys(ids))
    return {entry.id: entry for entry in found if entry is not None}


def tree(conn: sqlite3.Connection, owner: str, conversation: str) -> list[Twig]:
    """All messages of the conversation, parents first."""
    rows = conn.execute(
        "SELECT messages.digest, parents.digest, messages.depth, messages.role, "
        f"messages.n_tokens, messages.created_at FROM messages {PARENTS} "
        f"WHERE messages.owner = {OWNER} AND messages.conversation = :conversation "
        "ORDER BY messages.depth, messages.id",
        {"owner": owner, "conversation": conversation},
    )
    return [Twig(digest, parent or ROOT, *rest) for digest, parent, *rest in rows]


def find_summaries(
    conn: sqlite3.Connection, owner: str, typed: str, *, limit: int
) -> list[Summary]:
    """Summaries that hold every word typed, in any case where the letters are ASCII; the newest
    first. Looks at each of the owner's: there are a hundred times fewer than messages."""
    terms = search.storable(typed[: search.MAX_QUERY_CHARS]).lower().split()[: search.MAX_TERMS]
    if not terms:
        return []
    holds = " AND ".join("instr(lower(text), ?)" for _ in terms)
    rows = conn.execute(
        f"SELECT {', '.join(FIELDS)} FROM summaries WHERE "
        f"owner = (SELECT id FROM owners WHERE key = ?) AND {holds} ORDER BY id DESC LIMIT ?",
        (owner, *terms, limit),
    )
    return [as_summary(row) for row in rows]


def answers(
    conn: sqlite3.Connection, owner: str, digests: Sequence[bytes]
) -> dict[bytes, Answered]:
    """What the answers among these messages cost, the last time that each was given."""
    found: dict[bytes, Answered] = {}
    for batch in batches(digests):
        rows = conn.execute(
            "SELECT messages.digest, prompt_tokens, cached_tokens, generated_tokens, queued_s, "
            "first_token_s, summaries, room, pinned, context_digest, answers.created_at "
            "FROM answers JOIN messages ON messages.id = answers.message "
            "WHERE messages.owner = (SELECT id FROM owners WHERE key = ?) "
            f"AND messages.digest IN ({marks(batch)}) ORDER BY answers.id",
            (owner, *batch),
        )
        found.update({row[0]: _answered(row) for row in rows})
    return found


def _answered(row: Sequence[Any]) -> Answered:
    digest, prompt, cached, generated, queued_s, first_token_s, blocks, room, *rest = row
    sizes, ids = tuple(json.loads(room)), tuple(json.loads(blocks))
    return Answered(digest, prompt, cached, generated, queued_s, first_token_s, ids, sizes, *rest)


class Found(NamedTuple):
    """What a search found: messages with their conversation, summaries, and the conversations."""

    messages: list[tuple[str, Node]]
    summaries: list[Summary]
    entries: dict[str, Entry]
