"""From a transcript to what is known of it: its place in the tree, its summaries, its stored
turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from memory.calls import RESULT_CLOSE, RESULT_OPEN
from memory.compaction import covered
from memory.context import Context, Room, System, assemble, fits, pins_text
from memory.overlap import attach
from memory.policy import Limits, Policy
from memory.ports import Budget, TokenCounter
from memory.records import Node, Pin, Standing, Summary
from memory.store import Store
from memory.system import note_text, split_system
from memory.transcript import ASSISTANT, ROOT, TOOL, USER, Message, Transcript, chain, extend

ANSWER_TOKENS_LEAST = 16
"""A prompt that leaves less room than this for the answer is cut further."""


@dataclass(frozen=True, slots=True)
class History:
    """A path in a conversation's tree, from the root to its newest message.

    `digests` holds the whole chain; `active` and `written` the summaries that cover this path from
    its first message: in use, and in use or waiting to be warm. `nodes` are the messages behind the
    active ones; of them the first `n_stored` are in the store. `placed` is false where the store
    could not be asked: the first message may stand in the middle of a conversation.
    """

    owner: str
    conversation: str
    system: System
    digests: tuple[bytes, ...]
    active: tuple[Summary, ...]
    written: tuple[Summary, ...]
    nodes: tuple[Node, ...]
    n_stored: int
    placed: bool = True

    @property
    def new(self) -> tuple[Node, ...]:
        return self.nodes[self.n_stored :]

    def behind(self, blocks: Sequence[Summary]) -> tuple[Node, ...]:
        """The verbatim nodes behind blocks that reach at least as far as the active ones."""
        return self.nodes[covered(blocks) - covered(self.active) :]


@dataclass(frozen=True, slots=True)
class Assembled:
    """A context, and the summaries that it uses though they were not active yet."""

    context: Context
    activates: tuple[int, ...]
    blocks: tuple[int, ...]
    """The ids of the summaries that it was made from."""
    room: Room


def conversation_id(owner: str, root: bytes) -> str:
    """The name of the tree that grows from this root: the same before and after it is stored."""
    return blake2b(owner.encode() + b"\0" + root, digest_size=8).hexdigest()


async def recognise(
    store: Store,
    counter: TokenCounter,
    owner: str,
    transcript: Transcript,
    *,
    system: str,
    tools: str = "",
    client_id: str | None = None,
    told: str = "",
    split: bool = True,
) -> History:
    """Finds the transcript's place in what is stored. Reads only. Raises StoreError.

    `client_id` is the client's own name for the conversation, where it sends one, and `told` its
    own summary of messages that it left out. With `split` a system prompt that changed is divided
    (memory.system).
    """
    digests = chain(transcript.messages)
    standing = await store.standing(owner, digests) if digests else None
    place = await _locate(store, owner, transcript.messages, digests, standing, client_id, told)
    return await _history(
        store,
        counter,
        owner,
        place.conversation,
        place.digests,
        place.known,
        system=system,
        tools=tools,
        new=_new_nodes(transcript.messages, place),
        split=split,
        standing=standing if place.digests is digests else None,
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """The chain from the root, of which the first `known` messages are stored. The transcript
    begins `before` messages behind the root: so many were dropped by the client."""

    conversation: str
    digests: tuple[bytes, ...]
    known: int
    before: int = 0


async def _locate(
    store: Store,
    owner: str,
    messages: Sequence[Message],
    digests: tuple[bytes, ...],
    standing: Standing | None,
    client_id: str | None,
    told: str,
) -> _Place:
    known = standing.known if standing else 0
    # All but the newest message and the answer before it is known: nothing was dropped.
    if known < len(messages) - 1:
        hinted = await store.conversation_by_client_id(owner, client_id) if client_id else None
        attached = await attach(store, owner, messages, known=known, hinted=hinted, told=told)
        if attached:
            head = await store.lineage(owner, attached.parent)
            tail = chain(messages, attached.parent)
            return _Place(
                attached.conversation, (*head, *tail), len(head) + attached.run, len(head)
            )
    if standing:
        return _Place(standing.conversation, digests, known)
    return _Place(conversation_id(owner, digests[0] if digests else ROOT), digests, known)


async def revisit(
    store: Store,
    counter: TokenCounter,
    owner: str,
    conversation: str,
    digests: tuple[bytes, ...],
    *,
    system: str,
    tools: str = "",
) -> History:
    """The same for a path that is stored already. Reads only. Raises StoreError."""
    return await _history(
        store,
        counter,
        owner,
        conversation,
        digests,
        len(digests),
        system=system,
        tools=tools,
        new=(),
        split=False,
    )


async def without_store(
    counter: TokenCounter, owner: str, transcript: Transcript, *, system: str, tools: str = ""
) -> History:
    """What can be said from the transcript alone, when memory cannot be read."""
    digests = chain(transcript.messages)
    nodes = _new_nodes(transcript.messages, _Place("", digests, 0))
    texts = await counter.count([system, *map(_weighed, nodes)])
    return History(
        owner=owner,
        conversation=conversation_id(owner, digests[0] if digests else ROOT),
        system=await _with_tools(counter, System(system, texts[0]), tools),
        digests=digests,
        active=(),
        written=(),
        nodes=_with_counts(nodes, texts[1:], counter.tokenizer),
        n_stored=0,
        placed=False,
    )


async def _history(
    store: Store,
    counter: TokenCounter,
    owner: str,
    conversation: str,
    digests: tuple[bytes, ...],
    known: int,
    *,
    system: str,
    tools: str,
    new: tuple[Node, ...],
    split: bool,
    standing: Standing | None = None,
) -> History:
    """`standing` is what was read of this very chain, if it was."""
    if standing:
        active, written, stored = standing.active, standing.written, standing.nodes
        pins = standing.pins
    else:
        active, written = await store.covering(owner, conversation, digests) if known else ((), ())
        stored = tuple(await store.nodes(owner, digests[covered(active) : known]))
        pins = tuple(await store.pins(owner, conversation)) if known else ()
    front = system
    if split and (stored or new):
        past = stored or tuple(await store.nodes(owner, digests[:known][-2:]))
        front, stored, new = _split(system, past, stored, new)
    nodes, n_system = await counted(counter, (*stored, *new), front)
    return History(
        owner=owner,
        conversation=conversation,
        system=await _with_pins(
            counter, await _with_tools(counter, System(front, n_system), tools), pins
        ),
        digests=digests,
        active=active,
        written=_longer(written, active),
        nodes=nodes,
        n_stored=len(stored),
    )


async def _with_tools(counter: TokenCounter, system: System, tools: str) -> System:
    if not tools:
        return system
    return replace(system, tools=tools, tools_tokens=await counter.count_tools(tools))


async def _with_pins(counter: TokenCounter, system: System, pins: Sequence[Pin]) -> System:
    if not pins:
        return system
    text = pins_text(pins)
    (n_tokens,) = await counter.count([text])
    return replace(system, pinned=text, pinned_tokens=n_tokens)


def _split(
    system: str, past: tuple[Node, ...], stored: tuple[Node, ...], new: tuple[Node, ...]
) -> tuple[str, tuple[Node, ...], tuple[Node, ...]]:
    """What of the system prompt stands in front, and the nodes with the rest before the newest
    user message. Where that one is stored already, as when its answer is given anew, what is
    stored with it stays as it is."""
    parts = split_system(system, past, visible=stored)
    if any(n.role == USER for n in new):
        return parts.front, stored, _told(new, front=parts.front, note=parts.note)
    if any(n.role == TOOL for n in new):
        # The turn goes on with a tool's result: it knows what it was told when it began, in front
        # or before its question, whatever has changed since.
        began = (n.front for n in reversed(past) if n.front is not None)
        return next(began, parts.front), stored, new
    # Counted anew with its other note.
    again = {"note": parts.note, "tokenizer": ""} if parts.note else {}
    return parts.front, _told(stored, **again), new


def _told(nodes: tuple[Node, ...], **note: Any) -> tuple[Node, ...]:
    """The same with another note before the newest user message."""
    newest = max((i for i, n in enumerate(nodes) if n.role == USER), default=None)
    if newest is None:
        return nodes
    return (*nodes[:newest], replace(nodes[newest], **note), *nodes[newest + 1 :])


def _longer(written: tuple[Summary, ...], active: tuple[Summary, ...]) -> tuple[Summary, ...]:
    return written if covered(written) >= covered(active) else active


def _new_nodes(messages: Sequence[Message], place: _Place) -> tuple[Node, ...]:
    """Nodes for the messages that are not stored yet; their tokens are not counted yet."""
    digests = place.digests
    return tuple(
        Node(
            digest=digests[depth],
            parent=digests[depth - 1] if depth else ROOT,
            depth=depth,
            role=messages[depth - place.before].role,
            text=messages[depth - place.before].text,
            n_tokens=-1,
            tokenizer="",
        )
        for depth in range(place.known, len(digests))
    )


async def counted(
    counter: TokenCounter, nodes: Sequence[Node], system: str = ""
) -> tuple[tuple[Node, ...], int]:
    """Counts what was never counted, or was counted by another model's tokenizer, and the system
    prompt in the same call."""
    missing = [i for i, n in enumerate(nodes) if n.tokenizer != counter.tokenizer]
    texts = [_weighed(nodes[i]) for i in missing]
    counts = await counter.count([system, *texts])
    fresh = dict(
        zip(
            missing,
            _with_counts([nodes[i] for i in missing], counts[1:], counter.tokenizer),
            strict=True,
        )
    )
    return tuple(fresh.get(i, n) for i, n in enumerate(nodes)), counts[0]


def _weighed(node: Node) -> str:
    """What of a message is counted: with the words that stand around a tool's result."""
    if node.role == TOOL:
        return RESULT_OPEN + node.text + RESULT_CLOSE
    return note_text(node.note) + node.text


def _with_counts(nodes: Sequence[Node], counts: Sequence[int], tokenizer: str) -> tuple[Node, ...]:
    return tuple(
        replace(n, n_tokens=c, tokenizer=tokenizer, token_ids=None)
        for n, c in zip(nodes, counts, strict=True)
    )


def room_for(
    budget: Budget, limits: Limits, *, max_tokens: int | None, spare_tokens: int = 0
) -> Room:
    """The room for a prompt whose answer may have `max_tokens`. `spare_tokens` stay free
    besides.
    """
    answer = limits.answer_tokens if max_tokens is None else min(limits.answer_tokens, max_tokens)
    return Room(
        prompt_tokens=max(
            1, budget.window_tokens - max(answer, ANSWER_TOKENS_LEAST) - spare_tokens
        ),
        message_tokens=budget.message_tokens,
        base_tokens=budget.base_tokens,
        step_tokens=limits.step_tokens,
    )


def context_for(history: History, policy: Policy, room: Room, *, tokenizer: str) -> Assembled:
    """The context to send now. Summaries that are not warm yet are used only when it would not fit
    without them. Raises DoesNotFit under a policy that refuses."""
    blocks = history.active
    if not fits(system=history.system, blocks=blocks, nodes=history.nodes, room=room):
        blocks = history.written
    context = assemble(
        system=history.system,
        blocks=blocks,
        nodes=history.behind(blocks),
        room=room,
        tokenizer=tokenizer,
        may_drop=policy.overflow == "drop",
        hidden=history.nodes[: covered(blocks) - covered(history.active)],
    )
    waiting = tuple(b.id for b in blocks if b.activated_at is None)
    return Assembled(context, waiting, tuple(b.id for b in blocks), room)


def answered(
    history: History,
    *,
    text: str,
    n_tokens: int,
    token_ids: bytes | None,
    tokenizer: str,
    created_at: float,
) -> tuple[tuple[Node, ...], tuple[bytes, ...]]:
    """Nodes to store after an answer, and the chain that ends with it.

    An answer that continues a partial one stands beside that one in the tree, under the same
    parent: the client will send it as one message from now on. Without an answer there is nothing
    to store: clients leave such a turn out, or send its question again.
    """
    new, digests = history.new, history.digests
    if not text.strip():
        return (), digests
    before = history.nodes[-1] if history.nodes else None
    if before is not None and before.role == ASSISTANT:
        text, n_tokens = before.text + text, before.n_tokens + n_tokens
        token_ids = _joined(before, token_ids, tokenizer)
        if token_ids is None:
            # It will be sent as text, and that has other tokens than were generated.
            n_tokens, tokenizer = -1, ""
        new, digests = new[: max(0, len(new) - 1)], digests[:-1]
    parent = digests[-1] if digests else ROOT
    answer = Node(
        digest=extend(parent, Message(ASSISTANT, text)),
        parent=parent,
        depth=len(digests),
        role=ASSISTANT,
        text=text,
        n_tokens=n_tokens,
        tokenizer=tokenizer,
        token_ids=token_ids,
    )
    return _stamped((*new, answer), created_at), (*digests, answer.digest)


def _joined(before: Node, token_ids: bytes | None, tokenizer: str) -> bytes | None:
    if before.token_ids is None or token_ids is None or before.tokenizer != tokenizer:
        return None
    return before.token_ids + token_ids


def _stamped(nodes: Sequence[Node], created_at: float) -> tuple[Node, ...]:
    return tuple(replace(n, created_at=created_at) for n in nodes)
