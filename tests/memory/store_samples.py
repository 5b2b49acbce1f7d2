"""Small conversations for the store's tests."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

from sqlite_utils import Database

from memory import changes
from memory.database import immediate
from memory.migrations import MIGRATIONS, migrate
from memory.records import MODEL, Node, Summary
from memory.search import is_unspaced
from memory.transcript import ASSISTANT, ROOT, USER, Message, extend, message_digest

TOKENIZER = "test"


def node_after(parent: Node | None, role: str, text: str, token_ids: bytes | None = None) -> Node:
    before, depth = (ROOT, 0) if parent is None else (parent.digest, parent.depth + 1)
    digest = extend(before, Message(role, text))
    return Node(digest, before, depth, role, text, len(text.split()), TOKENIZER, token_ids, 12.5)


def talk(*texts: str, after: Node | None = None) -> list[Node]:
    """Messages in turn from the user and the assistant."""
    return branch(texts, after=after)


def branch(texts: Iterable[str], *, after: Node | None = None) -> list[Node]:
    nodes: list[Node] = []
    for i, text in enumerate(texts):
        after = node_after(after, ASSISTANT if i % 2 else USER, text)
        nodes.append(after)
    return nodes


def summary_of(nodes: list[Node], conversation: str, *, text: str = "They met.") -> Summary:
    return Summary(
        id=0,
        conversation=conversation,
        first_depth=nodes[0].depth,
        last_depth=nodes[-1].depth,
        first_digest=nodes[0].digest,
        last_digest=nodes[-1].digest,
        rank=1,
        parents=(3, 4),
        text=text,
        n_tokens=2,
        tokenizer=TOKENIZER,
        made_by=MODEL,
        model="tiny",
        policy_digest="p",
        prompt_version="1",
        failed_checks=("too_long",),
        duration_s=0.25,
        created_at=13.0,
    )


def digests_of(nodes: list[Node]) -> list[bytes]:
    return [node.digest for node in nodes]


def raw_bytes(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.parent.glob(path.name + "*"))


def in_memory() -> Database:
    conn = sqlite3.connect(":memory:", isolation_level=None)
    db = Database(conn, execute_plugins=False)
    with immediate(db):
        migrate(db)
    return db


def add(db: Database, owner: str, nodes: list[Node]) -> str:
    new_id = iter(f"{owner}-{nodes[-1].digest.hex()}" for _ in range(1)).__next__
    return changes.append(db, owner, nodes, conversation=None, new_id=new_id, now=1.0)


def old_store(path: Path, owner: str, nodes: list[Node]) -> None:
    """A file as the first schema left it: no indexes to search."""
    conn = sqlite3.connect(path, isolation_level=None)
    db = Database(conn, execute_plugins=False)
    with immediate(db):
        MIGRATIONS.apply(db, stop_before="m0002_search")
        # Written out: today's code writes columns that this schema does not have.
        conn.execute("INSERT INTO owners (id, key) VALUES (1, ?)", (owner,))
        conn.execute("INSERT INTO conversations VALUES ('old', 1, 1.0, 1.0)")
        for i, node in enumerate(nodes):
            _insert_old(conn, i + 1, i or None, node)
    conn.close()


def _insert_old(conn: sqlite3.Connection, id_: int, parent: int | None, node: Node) -> None:
    row = (
        *(id_, 1, "old", parent, node.depth, node.role, node.text, node.n_tokens),
        *(node.tokenizer, node.token_ids, node.digest),
        message_digest(Message(node.role, node.text)),
        *(is_unspaced(node.text), node.created_at),
    )
    conn.execute(f"INSERT INTO messages VALUES ({', '.join('?' * len(row))})", row)


def names(directory: Path, pattern: str = "*") -> list[str]:
    return sorted(file.name for file in directory.glob(pattern))
