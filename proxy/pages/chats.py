"""One stored conversation on one of its paths, with all that a page shows of it. Reads only."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from memory.compaction import cover, covered
from memory.context import Context, Room, System, assemble, digest_of
from memory.conversations import context_for, counted, revisit, room_for
from memory.listing import Entry, Twig
from memory.policy import Policy
from memory.ports import TokenCounter
from memory.records import Node, Summary
from memory.store import Store
from memory.transcript import USER
from proxy.engines.base import ModelInfo
from proxy.pages.timeline import Picture, draw
from proxy.pages.trees import Tree, Turn, turns_of


@dataclass(frozen=True, slots=True)
class Said:
    """A turn with its messages."""

    turn: Turn
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, and the path to `leaf` in it. `summaries` are those that hold on this path,
    `active` the ones in use."""

    owner: str
    entry: Entry
    tree: Tree
    leaf: bytes
    path: tuple[Twig, ...]
    turns: tuple[Turn, ...]
    summaries: tuple[Summary, ...]
    active: tuple[Summary, ...]

    @property
    def digests(self) -> tuple[bytes, ...]:
        return tuple(twig.digest for twig in self.path)

    @property
    def n_tokens(self) -> int:
        return sum(max(0, twig.n_tokens) for twig in self.path)

    @property
    def n_covered(self) -> int:
        return covered(self.active)

    def turn_at(self, depth: int) -> Turn:
        """The turn that the message of this depth lies in."""
        return self.turns[bisect_right(self.turns, depth, key=lambda turn: turn.first) - 1]

    def summary(self, id_: int) -> Summary | None:
        return next((s for s in self.summaries if s.id == id_), None)

    def state(self, summary: Summary) -> str:
        if summary in self.active:
            return "active"
        return "waiting" if summary.activated_at is None else "past"

    def picture(self) -> Picture:
        ids = {s.id for s in self.active}
        return draw(self.turns, self.summaries, active=ids, n_covered=self.n_covered)


async def read_chat(store: Store, owner: str, conversation: str, leaf: str = "") -> Chat | None:
    """None where this owner has no such conversation, or it has no such message. `leaf` is a
    message's digest in hexadecimal, "" for the newest; the path goes on from there to the newest
    end. Raises StoreError."""
    entry = await store.conversation(owner, conversation)
    if entry is None:
        return None
    tree = Tree(await store.tree(owner, conversation))
    end = tree.end_below(digest_in(leaf)) if leaf else tree.newest_leaf()
    path = tree.path(end) if end else ()
    if not path:
        return None
    digests = [twig.digest for twig in path]
    known = await store.summaries(owner, conversation)
    holding = tuple(
        s for s in known if s.last_depth < len(path) and digests[s.last_depth] == s.last_digest
    )
    active = cover((s for s in holding if s.activated_at is not None), digests)
    return Chat(owner, entry, tree, path[-1].digest, path, turns_of(path), holding, active)


def digest_in(text: str) -> bytes:
    """No message has the digest of a text that spells none."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""


async def read_turns(store: Store, chat: Chat, turns: Sequence[Turn]) -> list[Said]:
    """These turns with their texts. Raises StoreError."""
    if not turns:
        return []
    digests = chat.digests[turns[0].first : turns[-1].last + 1]
    nodes = await store.nodes(chat.owner, digests)
    return [Said(t, tuple(n for n in nodes if t.first <= n.depth <= t.last)) for t in turns]


async def seen_at(
    store: Store, counter: TokenCounter, info: ModelInfo, chat: Chat, turn: Turn
) -> tuple[Context, bool] | None:
    """The context that this turn's last answer was given from, built again, and whether it equals
    what was sent, to the character; None where nothing was recorded of it. Raises StoreError and
    EngineUnavailable."""
    path = chat.digests
    noted = await store.answers(chat.owner, path[turn.first : turn.last + 1])
    depth = max((d for d in range(turn.first, turn.last + 1) if path[d] in noted), default=-1)
    if depth < 0:
        return None
    answer = noted[path[depth]]
    blocks = [s for s in chat.summaries if s.id in answer.summaries]
    n_covered = covered(blocks)
    nodes, _ = await counted(counter, await store.nodes(chat.owner, path[:depth]))
    front = next((n.front for n in reversed(nodes) if n.front is not None), "")
    n_front, n_pinned = await counter.count([front, answer.pinned])
    context = assemble(
        system=System(front, n_front, pinned=answer.pinned, pinned_tokens=n_pinned),
        blocks=blocks,
        nodes=nodes[n_covered:],
        room=Room(*answer.room),
        tokenizer=info.fingerprint,
        hidden=nodes[:n_covered],
    )
    return context, digest_of(context) == answer.context_digest


async def context_now(
    store: Store, counter: TokenCounter, policy: Policy, info: ModelInfo, chat: Chat
) -> Context:
    """What stands before the next message on this path, word for word. Raises StoreError and
    EngineUnavailable, and DoesNotFit under a policy that refuses."""
    system = await front_of(store, chat, info.default_system)
    history = await revisit(store, counter, chat.owner, chat.entry.id, chat.digests, system=system)
    room = room_for(info.budget, policy.limits(info.budget.window_tokens), max_tokens=None)
    return context_for(history, policy, room, tokenizer=info.fingerprint).context


async def front_of(store: Store, chat: Chat, default: str) -> str:
    """The system prompt that stood in front when this path was last answered."""
    last = [t.digest for t in chat.path if t.role == USER][-8:]
    nodes = await store.nodes(chat.owner, last)
    return next((n.front for n in reversed(nodes) if n.front is not None), default)
