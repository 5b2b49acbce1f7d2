"""The store's reads, as plain functions on a connection. Each one filters by owner."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import zip_longest
from typing import Any

from memory import search
from memory.compaction import cover_from, covered
from memory.records import Node, Pin, Span, Standing, Summary
from memory.transcript import ROOT

BATCH = 500
"""Bound variables in one statement; SQLite may be built to take no more than 999."""

OWNER = "(SELECT id FROM owners WHERE key = :owner)"

NODE = """messages.digest, parents.digest, messages.depth, messages.role, messages.text,
    messages.n_tokens, messages.tokenizer, messages.token_ids, messages.created_at,
    (SELECT text FROM system_prompts WHERE id = messages.front), messages.note"""
PARENTS = "LEFT JOIN messages AS parents ON parents.id = messages.parent"

SUMMARY_FIELDS = tuple(Summary.__dataclass_fields__)
_JSON_FIELDS = ("parents", "failed_checks")


def deepest(
    conn: sqlite3.Connection, owner: str, digests: Sequence[bytes]
) -> tuple[str, int] | None:
    """Gallops back from the end, then bisects: 2 to 3 probes where the history is known, about
    2 log2(n) at worst. Good because a stored message's ancestors are stored too.

        stored stored stored | missing missing missing
                         low   high
    """
    low, high, found = _last_known_stride(conn, owner, digests)
    while high - low > 1:
        middle = (low + high) // 2
        hit = _conversation_of(conn, owner, digests[middle])
        low, high, found = (low, middle, found) if hit is None else (middle, high, hit)
    return None if found is None else (found, low)


def _last_known_stride(
    conn: sqlite3.Connection, owner: str, digests: Sequence[bytes]
) -> tuple[int, int, str | None]:
    """(low, high, conversation of low); low is -1 if the first probe with a hit would lie there."""
    low, high, step = len(digests) - 1, len(digests), 1
    while low >= 0:
        found = _conversation_of(conn, owner, digests[low])
        if found is not None:
            return low, high, found
        low, high, step = low - step, low, step * 2
    return -1, high, None


def _conversation_of(conn: sqlite3.Connection, owner: str, digest: bytes) -> str | None:
    row = conn.execute(
        f"SELECT conversation FROM messages WHERE owner = {OWNER} AND digest = :digest",
        {"owner": owner, "digest": digest},
    ).fetchone()
    return None if row is None else str(row[0])


def nodes(conn: sqlite3.Connection, owner: str, digests: Sequence[bytes]) -> list[Node]:
    """Those of the digests that are stored, in order of depth."""
    found = [
        node
        for batch in batches(digests)
        for node in _nodes_where(conn, f"messages.digest IN ({marks(batch)})", owner, batch)
    ]
    return sorted(found, key=lambda node: node.depth)


def _nodes_where(
    conn: sqlite3.Connection, condition: str, owner: str, values: Sequence[Any]
) -> list[Node]:
    rows = conn.execute(
        f"SELECT {NODE} FROM messages {PARENTS} "
        f"WHERE messages.owner = (SELECT id FROM owners WHERE key = ?) AND {condition}",
        (owner, *values),
    )
    return [as_node(row) for row in rows]


def path(conn: sqlite3.Connection, owner: str, digest: bytes, *, after_depth: int) -> list[Node]:
    """The messages up to and including `digest` that lie deeper than `after_depth`."""
    rows = conn.execute(
        f"""
        WITH RECURSIVE branch(id, parent) AS (
            SELECT id, parent FROM messages
            WHERE owner = {OWNER} AND digest = :digest AND depth > :after_depth
            UNION ALL
            SELECT messages.id, messages.parent FROM branch
            JOIN messages ON messages.id = branch.parent
            WHERE messages.depth > :after_depth
        )
        SELECT {NODE} FROM branch JOIN messages ON messages.id = branch.id {PARENTS}
        ORDER BY messages.depth""",
        {"owner": owner, "digest": digest, "after_depth": after_depth},
    )
    return [as_node(row) for row in rows]


def lineage(conn: sqlite3.Connection, owner: str, digest: bytes) -> tuple[bytes, ...]:
    """The chain that ends with `digest`, from the root; () if it is not stored."""
    rows = conn.execute(
        f"""
        WITH RECURSIVE branch(digest, parent, depth) AS (
            SELECT digest, parent, depth FROM messages WHERE owner = {OWNER} AND digest = :digest
            UNION ALL
            SELECT messages.digest, messages.parent, messages.depth FROM branch
            JOIN messages ON messages.id = branch.parent
        )
        SELECT digest FROM branch ORDER BY depth""",
        {"owner": owner, "digest": digest},
    )
    return tuple(row[0] for row in rows)


def conversation_by_client_id(conn: sqlite3.Connection, owner: str, client_id: str) -> str | None:
    row = conn.execute(
        f"SELECT conversation FROM client_ids WHERE owner = {OWNER} AND client_id = :client_id",
        {"owner": owner, "client_id": client_id},
    ).fetchone()
    return None if row is None else str(row[0])


def summaries(conn: sqlite3.Connection, owner: str, conversation: str) -> list[Summary]:
    rows = conn.execute(
        f"SELECT {', '.join(SUMMARY_FIELDS)} FROM summaries "
        f"WHERE owner = {OWNER} AND conversation = :conversation ORDER BY first_depth, id",
        {"owner": owner, "conversation": conversation},
    )
    return [as_summary(row) for row in rows]


def covering(
    conn: sqlite3.Connection, owner: str, conversation: str, digests: Sequence[bytes]
) -> tuple[tuple[Summary, ...], tuple[Summary, ...]]:
    """(active, written): see Store.covering.

    A long chat has thousands of summaries, one for every dozen messages and the merged ones, of
    which a handful stands for it: only those that begin where another ends are looked at, by the
    index, and only the chosen ones are read whole.
    """

    @cache
    def beginning_at(depth: int) -> list[Span]:
        rows = conn.execute(
            f"SELECT {', '.join(Span._fields)} FROM summaries WHERE owner = {OWNER} "
            "AND conversation = :conversation AND first_depth = :depth",
            {"owner": owner, "conversation": conversation, "depth": depth},
        )
        return [Span(*row) for row in rows]

    def active_at(depth: int) -> list[Span]:
        return [s for s in beginning_at(depth) if s.activated_at is not None]

    active, written = cover_from(active_at, digests), cover_from(beginning_at, digests)
    found = summaries_by_id(conn, owner, {s.id for s in (*active, *written)})
    return tuple(found[s.id] for s in active), tuple(found[s.id] for s in written)


def standing(conn: sqlite3.Connection, owner: str, digests: Sequence[bytes]) -> Standing | None:
    """All that a chat's next request asks of the store, in one visit: each costs a request as much
    as its way to another thread and back."""
    found = deepest(conn, owner, digests)
    if found is None:
        return None
    conversation, known = found[0], found[1] + 1
    active, written = covering(conn, owner, conversation, digests)
    # From one to the one before it: what was said together lies together in the file, while the
    # digests lie all over their index, whose pages every write of another connection makes unread.
    behind = path(conn, owner, digests[known - 1], after_depth=covered(active) - 1)
    pinned = pins(conn, owner, conversation)
    return Standing(conversation, known, active, written, tuple(behind), tuple(pinned))


def pins(conn: sqlite3.Connection, owner: str, conversation: str) -> list[Pin]:
    """The oldest first."""
    rows = conn.execute(
        f"SELECT id, text, created_at FROM pins WHERE owner = {OWNER} "
        "AND conversation = :conversation ORDER BY id",
        {"owner": owner, "conversation": conversation},
    )
    return [Pin(*row) for row in rows]


def summaries_by_id(conn: sqlite3.Connection, owner: str, ids: Iterable[int]) -> dict[int, Summary]:
    found = {}
    for batch in batches(list(ids)):
        rows = conn.execute(
            f"SELECT {', '.join(SUMMARY_FIELDS)} FROM summaries "
            f"WHERE owner = (SELECT id FROM owners WHERE key = ?) AND id IN ({marks(batch)})",
            (owner, *batch),
        )
        found.update({s.id: s for s in map(as_summary, rows)})
    return found


def summary(conn: sqlite3.Connection, owner: str, id_: int) -> Summary:
    row = conn.execute(
        f"SELECT {', '.join(SUMMARY_FIELDS)} FROM summaries WHERE owner = {OWNER} AND id = :id",
        {"owner": owner, "id": id_},
    ).fetchone()
    return as_summary(row)


def longest(conn: sqlite3.Connection, *, limit: int) -> list[tuple[str, str, bytes, int]]:
    """(owner, conversation, digest of its newest message, messages on the path to it)."""
    rows = conn.execute(
        "SELECT owners.key, messages.conversation, messages.digest, messages.depth + 1 "
        "FROM messages JOIN owners ON owners.id = messages.owner WHERE messages.id IN "
        "(SELECT max(id) FROM messages GROUP BY conversation) "
        "ORDER BY messages.depth DESC, messages.id DESC LIMIT :limit",
        {"limit": limit},
    )
    return [tuple(row) for row in rows]


def by_message_digest(
    conn: sqlite3.Connection, owner: str, message_digest: bytes, *, limit: int
) -> list[tuple[str, Node]]:
    rows = conn.execute(
        f"SELECT messages.conversation, {NODE} FROM messages {PARENTS} "
        f"WHERE messages.owner = {OWNER} AND messages.message_digest = :digest "
        "ORDER BY messages.id DESC LIMIT :limit",
        {"owner": owner, "digest": message_digest, "limit": limit},
    )
    return [(row[0], as_node(row[1:])) for row in rows]


def find(
    conn: sqlite3.Connection, owner: str, typed: str, *, limit: int, unfinished: bool = False
) -> list[tuple[str, Node]]:
    """The best of the word index and the best of the trigram index in turns, then the newest
    messages that hold a fragment too short for either."""
    query = search.parse(typed, unfinished=unfinished)
    ranked = zip_longest(
        _matches(conn, "message_words", owner, query.words, limit),
        _matches(conn, "message_trigrams", owner, query.trigrams, limit),
    )
    ids = [id_ for pair in ranked for id_ in pair if id_ is not None]
    ids += _containing(conn, owner, query.fragments, limit)
    chosen = list(dict.fromkeys(ids))[:limit]
    return _with_ids(conn, chosen)


def _matches(
    conn: sqlite3.Connection, index: str, owner: str, expression: str, limit: int
) -> list[int]:
    if not expression:
        return []
    rows = conn.execute(
        f"SELECT messages.id FROM {index} JOIN messages ON messages.id = {index}.rowid "
        f"WHERE {index} MATCH :expression AND messages.owner = {OWNER} "
        f"ORDER BY {index}.rank, messages.id DESC LIMIT :limit",
        {"expression": expression, "owner": owner, "limit": limit},
    )
    return [row[0] for row in rows]


def _containing(
    conn: sqlite3.Connection, owner: str, fragments: Sequence[str], limit: int
) -> list[int]:
    found: list[int] = []
    for fragment in fragments:
        rows = conn.execute(
            f"SELECT id FROM messages WHERE owner = {OWNER} AND unspaced "
            "AND instr(text, :fragment) ORDER BY id DESC LIMIT :limit",
            {"owner": owner, "fragment": fragment, "limit": limit},
        )
        found += [row[0] for row in rows]
    return found


def _with_ids(conn: sqlite3.Connection, ids: Sequence[int]) -> list[tuple[str, Node]]:
    found = {}
    for batch in batches(ids):
        rows = conn.execute(
            f"SELECT messages.id, messages.conversation, {NODE} FROM messages {PARENTS} "
            f"WHERE messages.id IN ({marks(batch)})",
            batch,
        )
        found.update({row[0]: (row[1], as_node(row[2:])) for row in rows})
    return [found[id_] for id_ in ids]


def counts(conn: sqlite3.Connection) -> dict[str, int]:
    tables = ("owners", "conversations", "messages", "summaries")
    return {name: conn.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables}


def as_node(row: Sequence[Any]) -> Node:
    digest, parent, *rest = row
    return Node(digest, ROOT if parent is None else parent, *rest)


def as_summary(row: Sequence[Any]) -> Summary:
    fields = dict(zip(SUMMARY_FIELDS, row, strict=True))
    fields.update({name: tuple(json.loads(fields[name])) for name in _JSON_FIELDS})
    return Summary(**fields)


def summary_row(summary: Summary) -> dict[str, Any]:
    """The summary's columns without its id."""
    row = {name: getattr(summary, name) for name in SUMMARY_FIELDS if name != "id"}
    row.update({name: json.dumps(row[name]) for name in _JSON_FIELDS})
    return {name: search.storable(v) if isinstance(v, str) else v for name, v in row.items()}


def batches(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), BATCH):
        yield values[start : start + BATCH]


def marks(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))
