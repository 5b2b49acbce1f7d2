"""Where chats come from: a store, exports of other programs, LoCoMo's files. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memory.records import Node
from memory.store import Store, StoreError
from memory.transcript import Message
from proxy.exports import MAX_EXPORT_BYTES, Exported, ExportError, parse_export, parse_json
from proxy.tuning.chats import Chat, one_answer_each
from proxy.tuning.locomo import is_locomo, parse_locomo

SQLITE_HEADER = b"SQLite format 3\0"

LEAST_TURNS = 2
"""Shorter chats say nothing about memory."""


class SourceError(Exception):
    """A source cannot be used. `str()` is one sentence that names it."""


async def read_source(path: Path, *, limit: int) -> list[Chat]:
    """At most `limit` chats, the longest first. Raises SourceError."""
    chats = await _from_store(path, limit) if _is_database(path) else _from_file(path)
    found = [chat for chat in chats if len(chat.exchanges) >= LEAST_TURNS]
    if not found:
        raise SourceError(f"{path} holds no chat of {LEAST_TURNS} turns or more.")
    return sorted(found, key=lambda chat: -len(chat.exchanges))[:limit]


def _is_database(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(SQLITE_HEADER)) == SQLITE_HEADER
    except OSError as exc:
        raise SourceError(f"{path} cannot be read: {exc.strerror}.") from exc


# -- files -----------------------------------------------------------------------------------------


def _from_file(path: Path) -> list[Chat]:
    try:
        if path.stat().st_size > MAX_EXPORT_BYTES:
            raise SourceError(f"{path} has more than {MAX_EXPORT_BYTES // 2**20} MiB.")
        data = path.read_bytes()
        value = parse_json(data, name=str(path))
        if is_locomo(value):
            return [_locomo(value, path)]
        exported = parse_export(data, name=str(path))
    except OSError as exc:
        raise SourceError(f"{path} cannot be read: {exc.strerror}.") from exc
    except ExportError as exc:
        raise SourceError(str(exc)) from exc
    return [_chat(one, f"{path.stem} {i}") for i, one in enumerate(exported, 1)]


def _locomo(value: dict[str, Any], path: Path) -> Chat:
    try:
        return parse_locomo(value, name=path.stem)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as exc:
        raise SourceError(f"{path} looks like LoCoMo's and is not: {exc!r}.") from exc


def _chat(exported: Exported, name: str) -> Chat:
    messages = [Message(said.role, said.text) for said in exported.newest()]
    return Chat(exported.title or name, one_answer_each(messages), (exported.system,))


# -- the store -------------------------------------------------------------------------------------


async def _from_store(path: Path, limit: int) -> list[Chat]:
    try:
        store = await Store.open_read_only(path)
        try:
            found = await store.longest(limit=limit)
            return [await _stored(store, *where) for where in found]
        finally:
            await store.close()
    except StoreError as exc:
        raise SourceError(f"{path} cannot be used: {exc}.") from exc


async def _stored(store: Store, owner: str, conversation: str, digest: bytes, _: int) -> Chat:
    nodes = await store.path(owner, digest)
    summaries = await store.summaries(owner, conversation)
    messages = tuple(Message(n.role, n.text) for n in nodes)
    return Chat(
        name=conversation,
        messages=messages,
        systems=_systems(nodes),
        token_ids={n.depth: n.token_ids for n in nodes if n.token_ids},
        tokenizer=next((n.tokenizer for n in nodes if n.token_ids), ""),
        summaries=tuple(summaries),
    )


def _systems(nodes: Sequence[Node]) -> tuple[str, ...]:
    """What the client sent with each answered question: its lasting part, and the part that
    changed, which is told once and holds until it changes again (memory.system)."""
    found: list[str] = []
    note = ""
    for node in nodes:
        note = node.note or note
        if node.front is not None:
            found.append("\n".join(filter(None, (node.front, note))))
    return tuple(found) or ("",)
