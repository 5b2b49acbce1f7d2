"""Chats from other programs' files into the store, every branch."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from memory.conversations import conversation_id
from memory.records import Node
from memory.store import Store
from memory.transcript import ASSISTANT, ROOT, USER, Message, extend
from proxy.exports import Exported, Said, parse_export

BATCH = 500
"""Messages in one transaction: other writes get their turn between two."""


@dataclass(frozen=True, slots=True)
class Imported:
    conversations: int
    messages: int


async def import_file(store: Store, owner: str, data: bytes) -> Imported:
    """Stores what is not stored yet; the same file twice changes nothing. Reads the file in a
    thread: one that nests deeply takes seconds. Raises ExportError, StoreError."""
    messages = conversations = 0
    for chat in await asyncio.to_thread(parse_export, data, name="The file"):
        for root, grown in (await asyncio.to_thread(_trees, chat)).items():
            name = conversation_id(owner, root)
            for start in range(0, len(grown), BATCH):
                await store.append(owner, grown[start : start + BATCH], conversation=name)
            conversations += 1
            messages += len(grown)
    return Imported(conversations, messages)


def _trees(chat: Exported) -> dict[bytes, list[Node]]:
    """The messages by their roots' digests."""
    trees: dict[bytes, list[Node]] = {}
    home: dict[bytes, bytes] = {}
    for node in nodes_of(chat):
        home[node.digest] = home.get(node.parent, node.digest)
        trees.setdefault(home[node.digest], []).append(node)
    return trees


def nodes_of(chat: Exported) -> list[Node]:
    """Parents first, each message once. Questions that never got an answer are left out, as they
    are of what is said here; an answer that nobody asked for keeps its place."""
    kept = _answered(chat.messages)
    placed: dict[str, Node] = {}
    found: dict[bytes, Node] = {}
    for said in chat.messages:
        if said.id not in kept:
            continue
        before = placed.get(said.parent)
        parent, depth = (before.digest, before.depth + 1) if before else (ROOT, 0)
        node = Node(
            digest=extend(parent, Message(said.role, said.text)),
            parent=parent,
            depth=depth,
            role=said.role,
            text=said.text,
            n_tokens=-1,
            tokenizer="",
            created_at=said.created_at,
            front=chat.system if chat.system and said.role == USER else None,
        )
        placed[said.id] = found.setdefault(node.digest, node)
    return list(found.values())


def _answered(messages: tuple[Said, ...]) -> set[str]:
    """The ids of answers and of all that stands before one."""
    kept: set[str] = set()
    parents = {said.id: said.parent for said in messages}
    for said in reversed(messages):
        if said.role == ASSISTANT:
            id_ = said.id
            while id_ and id_ not in kept:
                kept.add(id_)
                id_ = parents.get(id_, "")
    return kept
