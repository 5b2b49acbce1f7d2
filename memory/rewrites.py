"""Summaries written again, to be compared: kept apart from those that contexts are made of.

Plain functions on a connection, as in queries and changes. Each filters by owner.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from sqlite_utils import Database

from memory import changes, queries, search
from memory.database import immediate
from memory.queries import OWNER, SUMMARY_FIELDS, as_summary, summary_row
from memory.records import Rewrite, Summary
from memory.store_errors import NotStored

SETS_MOST = 6
"""Sets of one conversation that are kept: each has the length of its summaries."""

_FIELDS = tuple(f for f in Rewrite.__dataclass_fields__ if f != "candidates")
_OWN = ("conversation", "activated_at", "generation")
"""Columns of a summary that a candidate has from its set, or not at all."""
CANDIDATE_FIELDS = tuple(f for f in SUMMARY_FIELDS if f not in _OWN)


class TooManyRewrites(ValueError):
    """The conversation has as many sets as are kept: one must be discarded first."""


class Overtaken(ValueError):
    """The summaries there have changed since: these would stand behind nothing, or not at all."""


def rewrites(
    conn: sqlite3.Connection, owner: str, conversation: str, id_: int | None = None
) -> list[Rewrite]:
    """The newest first, each with its candidates."""
    rows = conn.execute(
        f"SELECT {', '.join(_FIELDS)} FROM rewrites WHERE owner = {OWNER} "
        "AND conversation = :conversation AND (:id IS NULL OR id = :id) ORDER BY id DESC",
        {"owner": owner, "conversation": conversation, "id": id_},
    )
    found = [_as_rewrite(row) for row in rows]
    return [replace(one, candidates=_candidates(conn, owner, one)) for one in found]


def _as_rewrite(row: Sequence[Any]) -> Rewrite:
    fields = dict(zip(_FIELDS, row, strict=True))
    return Rewrite(**fields | {"before": tuple(json.loads(fields["before"]))})


def _candidates(conn: sqlite3.Connection, owner: str, one: Rewrite) -> tuple[Summary, ...]:
    # The columns of a summary in their order, those that a candidate lacks by their values.
    values = {"conversation": ":conversation", "activated_at": "NULL", "generation": "0"}
    columns = ", ".join(values.get(field, field) for field in SUMMARY_FIELDS)
    rows = conn.execute(
        f"SELECT {columns} FROM candidates WHERE owner = {OWNER} AND rewrite = :id ORDER BY id",
        {"owner": owner, "id": one.id, "conversation": one.conversation},
    )
    return tuple(as_summary(row) for row in rows)


def begin(db: Database, owner: str, rewrite: Rewrite) -> Rewrite:
    """Raises NotStored and TooManyRewrites."""
    with immediate(db) as conn:
        owner_id = changes.owner_row(conn, owner)
        changes.require_conversation(conn, owner_id, rewrite.conversation)
        if len(rewrites(conn, owner, rewrite.conversation)) >= SETS_MOST:
            raise TooManyRewrites(f"a conversation has at most {SETS_MOST} sets to compare")
        row = {name: getattr(rewrite, name) for name in _FIELDS if name != "id"}
        row |= {"owner": owner_id, "before": json.dumps(rewrite.before)}
        row = {k: search.storable(v) if isinstance(v, str) else v for k, v in row.items()}
        return replace(rewrite, id=changes.insert_row(conn, "rewrites", row))


def add_candidate(db: Database, owner: str, rewrite: int, candidate: Summary) -> int:
    """Its id. Raises NotStored where the set is gone, or finished."""
    with immediate(db) as conn:
        open_ = f"SELECT 1 FROM rewrites WHERE id = :id AND owner = {OWNER} AND finished_at IS NULL"
        if conn.execute(open_, {"id": rewrite, "owner": owner}).fetchone() is None:
            raise NotStored(f"no unfinished rewrite {rewrite}")
        row = {k: v for k, v in summary_row(candidate).items() if k not in _OWN}
        row |= {"owner": changes.owner_row(conn, owner), "rewrite": rewrite}
        return changes.insert_row(conn, "candidates", row)


def finish(db: Database, owner: str, rewrite: int, *, now: float) -> None:
    with immediate(db) as conn:
        conn.execute(
            "UPDATE rewrites SET finished_at = :now WHERE finished_at IS NULL "
            f"AND id = :id AND owner = {OWNER}",
            {"now": now, "id": rewrite, "owner": owner},
        )


def use(db: Database, owner: str, conversation: str, id_: int, *, now: float) -> None:
    """Copies the candidates among the summaries, as a new generation that waits to be warm.

    Raises NotStored where there is no such finished set, or it is in use already; Overtaken.
    """
    with immediate(db) as conn:
        found = rewrites(conn, owner, conversation, id_)
        if not found or found[0].finished_at is None or found[0].used_at is not None:
            raise NotStored(f"no rewrite {id_} that could be used")
        _copy(conn, owner, found[0])
        conn.execute("UPDATE rewrites SET used_at = ? WHERE id = ?", (now, id_))


def undo(db: Database, owner: str, conversation: str, id_: int) -> None:
    """Copies what stood there before, as `use` does with the candidates. The originals stay as
    they are: a branch that left within the set's messages goes on with them.

    Raises NotStored where no such set is in use, or a part of what stood there was forgotten;
    Overtaken, also where a later set is in use for some of the same messages.
    """
    with immediate(db) as conn:
        found = rewrites(conn, owner, conversation, id_)
        if not found or found[0].used_at is None:
            raise NotStored(f"no rewrite {id_} that is in use")
        one = found[0]
        if any(_later(other, one) for other in rewrites(conn, owner, conversation)):
            raise Overtaken("a set that was taken into use later stands there")
        before = queries.summaries_by_id(conn, owner, one.before)
        if len(before) < len(one.before):
            raise NotStored("what stood there before was forgotten")
        ids = _place(conn, owner, one, [before[each] for each in one.before])
        _require_chosen(conn, owner, one, ids.values())
        conn.execute("UPDATE rewrites SET used_at = NULL WHERE id = ?", (one.id,))


def _later(other: Rewrite, one: Rewrite) -> bool:
    overlap = other.first_depth <= one.last_depth and one.first_depth <= other.last_depth
    used = (other.used_at or 0.0, other.id)
    return overlap and other.used_at is not None and used > (one.used_at or 0.0, one.id)


def _copy(conn: sqlite3.Connection, owner: str, rewrite: Rewrite) -> None:
    ids = _place(conn, owner, rewrite, rewrite.candidates)
    _require_chosen(conn, owner, rewrite, [ids[c.id] for c in rewrite.blocks])


def _place(
    conn: sqlite3.Connection, owner: str, rewrite: Rewrite, made: Sequence[Summary]
) -> dict[int, int]:
    """Each one's new id. They are a new generation of the conversation, waiting to be warm; of
    parents that are not among them the ids stay."""
    owner_id = changes.owner_row(conn, owner)
    (generation,) = conn.execute(
        "SELECT coalesce(max(generation), 0) + 1 FROM summaries WHERE conversation = ?",
        (rewrite.conversation,),
    ).fetchone()
    ids: dict[int, int] = {}
    for s in made:  # parents before what they went into
        parents = tuple(ids.get(p, p) for p in s.parents)
        new = replace(s, parents=parents, generation=generation, activated_at=None)
        ids[s.id] = changes.insert_row(conn, "summaries", summary_row(new) | {"owner": owner_id})
    return ids


def _require_chosen(
    conn: sqlite3.Connection, owner: str, rewrite: Rewrite, ids: Iterable[int]
) -> None:
    """Raises Overtaken unless these stand for the set's messages as soon as they are warm."""
    path = queries.lineage(conn, owner, rewrite.last_digest)
    _, written = queries.covering(conn, owner, rewrite.conversation, path)
    if not set(ids) <= {s.id for s in written}:
        raise Overtaken("the summaries before these have changed since they were written")


def discard(db: Database, owner: str, conversation: str, id_: int) -> bool:
    """Whether there was such a set. What was taken into use of it stays."""
    with immediate(db) as conn:
        mine = f"id = :id AND conversation = :conversation AND owner = {OWNER}"
        values = {"id": id_, "conversation": conversation, "owner": owner}
        conn.execute(
            f"DELETE FROM candidates WHERE rewrite IN (SELECT id FROM rewrites WHERE {mine})",
            values,
        )
        return conn.execute(f"DELETE FROM rewrites WHERE {mine}", values).rowcount > 0


def delete_where(conn: sqlite3.Connection, condition: str, values: Sequence[object]) -> None:
    """The sets for which the condition on their columns holds, of whoever they are: for erasure."""
    conn.execute(
        f"DELETE FROM candidates WHERE rewrite IN (SELECT id FROM rewrites WHERE {condition})",
        values,
    )
    conn.execute(f"DELETE FROM rewrites WHERE {condition}", values)
