"""transcript + summaries + policy + budget -> context. Pure: same input, same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import accumulate, pairwise
from math import ceil

from memory.records import Node, Pin, Summary
from memory.system import note_text
from memory.transcript import ASSISTANT, DIGEST_BYTES, TOOL, USER, turn_starts

SYSTEM = "system"

PINS_HEADER = "\n\nKeep in mind:\n"
BLOCK_HEADER = "\n\nEarlier in this conversation:\n"
LEFT_OUT = "\n\n[{n} earlier messages are left out here.]"
CUT = "\n[...]\n"
NO_USER = "(The conversation goes on.)"
"""Stands before an answer whose question is gone: templates want the user to speak first."""

MARKUP_SHARE = 4
"""At most one token in so many may be markup when texts must be cut."""

NOTE_TOKENS = 16
"""Room for LEFT_OUT: it has 11 to 13 tokens in the vocabularies of SmolLM2, Qwen2.5 and cl100k."""


@dataclass(frozen=True, slots=True)
class ContextMessage:
    """One message as sent to the model.

    `parts` are joined without a separator; each is tokenized by itself, so that appending a part
    never changes the tokens of the parts before it. `token_ids` are the exact tokens (little-endian
    int32) of the whole text where they are known, else None; they are good only for the tokenizer
    of the same name.
    """

    role: str
    parts: tuple[str, ...]
    token_ids: bytes | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a context is made of: counts, and tokens of each kind without the template around
    them.
    """

    verbatim_turns: int
    verbatim_tokens: int
    summaries: int
    summary_tokens: int
    system_tokens: int
    dropped_messages: int


@dataclass(frozen=True, slots=True)
class Context:
    """The messages really sent to the model. `tokenizer` names the vocabulary of all token ids in
    it.

    When `continues` is true the model goes on with the last message, which is the assistant's.
    `tools` are what the model may call: a JSON list as in OpenAI's requests, "" for none. The chat
    template says where they stand.
    """

    messages: tuple[ContextMessage, ...]
    tokenizer: str
    continues: bool
    shape: Shape
    tools: str = ""


@dataclass(frozen=True, slots=True)
class System:
    """What stands first: the client's system prompt (or the model's own default) and the tools,
    each with its tokens."""

    text: str
    n_tokens: int
    tools: str = ""
    tools_tokens: int = 0
    pinned: str = ""
    """Facts that the user has pinned, as they stand behind the system prompt."""
    pinned_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Room:
    """How long a prompt may be, and what the template adds to it. Tokens."""

    prompt_tokens: int
    message_tokens: int
    base_tokens: int
    step_tokens: int
    """When turns must go, so many tokens of them go at once: a cut that moves with every turn
    would break the prefix with every turn."""


class DoesNotFit(ValueError):
    """Even the newest turn by itself, or the summaries before it, are longer than the room."""


def pins_text(pins: Sequence[Pin]) -> str:
    """Pinned facts as they stand in the system message; "" for none."""
    return PINS_HEADER + "\n".join(f"- {pin.text}" for pin in pins) if pins else ""


def digest_of(context: Context) -> bytes:
    """Equal digests mean that the same messages were sent, to the character."""
    state = blake2b(digest_size=DIGEST_BYTES)
    for message in context.messages:
        for text in (message.role, message.text):
            data = text.encode("utf-8", "surrogatepass")
            state.update(len(data).to_bytes(8, "little") + data)
    return state.digest()


def block_text(text: str) -> str:
    """A summary as it stands in the system message."""
    return BLOCK_HEADER + text


def assemble(
    *,
    system: System,
    blocks: Sequence[Summary],
    nodes: Sequence[Node],
    room: Room,
    tokenizer: str,
    may_drop: bool = True,
    hidden: Sequence[Node] = (),
) -> Context:
    """The messages to send: the system prompt with the summaries behind it, then the verbatim
    nodes.

        system | S1 | S2 | (left out) | (told) | turn turn turn ... newest

    What does not fit goes by rule, in this order: the oldest verbatim turns, in steps; the oldest
    summaries; the middle of the longest texts. The newest turn always stays. With `may_drop` false
    DoesNotFit is raised instead. The last note (memory.system) among what was left out and among
    `hidden`, messages that only the blocks stand for, is told again behind the summaries where no
    message that is sent carries one.
    """
    draft = _Draft(system, tuple(blocks), tuple(nodes), tuple(hidden))
    return _context(_fitting(draft, room, may_drop=may_drop), tokenizer=tokenizer)


def fits(*, system: System, blocks: Sequence[Summary], nodes: Sequence[Node], room: Room) -> bool:
    """Whether all of it can be sent as it is."""
    return _Draft(system, tuple(blocks), tuple(nodes), ()).fits(room)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A context in the making. `gone` are the messages before `nodes` that are not sent, of which
    `dropped` were left out by rule.
    """

    system: System
    blocks: tuple[Summary, ...]
    nodes: tuple[Node, ...]
    gone: tuple[Node, ...]
    dropped: int = 0

    @property
    def told(self) -> System:
        """The note that no message carries any more: stands behind the summaries."""
        if any(n.note for n in self.nodes):
            return System("", 0)
        last = next((n for n in reversed(self.gone) if n.note), None)
        return System("\n\n" + last.note, _note_tokens(last)) if last else System("", 0)

    @property
    def head_tokens(self) -> int:
        summaries = sum(b.n_tokens for b in self.blocks)
        system = self.system.n_tokens + self.system.pinned_tokens
        return system + summaries + self.told.n_tokens

    def cost(self, room: Room) -> int:
        # One system message in any case: the note of what was left out needs one.
        markup = room.base_tokens + NOTE_TOKENS + room.message_tokens + self.system.tools_tokens
        verbatim = sum(n.n_tokens + room.message_tokens for n in self.nodes)
        return markup + self.head_tokens + verbatim

    def fits(self, room: Room) -> bool:
        return self.cost(room) <= room.prompt_tokens

    def without(self, n_nodes: int) -> _Draft:
        """The same without its first messages."""
        gone, nodes = (*self.gone, *self.nodes[:n_nodes]), self.nodes[n_nodes:]
        return replace(self, nodes=nodes, gone=gone, dropped=self.dropped + n_nodes)


def _note_tokens(node: Node) -> int:
    """How many of the node's tokens are its note's, by characters: both were counted as one."""
    note = len(note_text(node.note))
    return ceil(node.n_tokens * note / (note + len(node.text))) if note else 0


def _fitting(draft: _Draft, room: Room, *, may_drop: bool) -> _Draft:
    if draft.fits(room):
        return draft
    if not may_drop:
        raise DoesNotFit("The conversation is longer than the model's window.")
    draft = draft.without(_turns_to_drop(draft, room))
    while draft.blocks and not draft.fits(room):
        draft = replace(draft, blocks=draft.blocks[1:])
    return draft if draft.fits(room) else _cut_texts(draft, room)


def _turns_to_drop(draft: _Draft, room: Room) -> int:
    """Messages of whole turns, counted in steps from the first: the cut stays where it is for many
    turns.

    A step is at most half of what the turns may have, so that a long system prompt does not leave
    the newest turn alone.
    """
    starts = turn_starts([n.role for n in draft.nodes])
    offsets = [0, *accumulate(n.n_tokens + room.message_tokens for n in draft.nodes)]
    # The longest note may have to be told again. Counted in any case: else the cut could go back.
    fixed = draft.cost(room) - offsets[-1] + max(map(_note_tokens, draft.nodes), default=0)
    excess = fixed + offsets[-1] - room.prompt_tokens
    step = min(room.step_tokens, max(1, (room.prompt_tokens - fixed) // 2))
    least = -(-excess // step) * step
    fitting = (start for start in starts[1:] if offsets[start] >= least)
    return next(fitting, starts[-1] if starts else 0)


def _cut_texts(draft: _Draft, room: Room) -> _Draft:
    """Takes the middle out of the longest texts until the rest fits: the newest turn alone is too
    long. Of a turn of very many messages the oldest go first: their markup alone would fill it.
    """
    markup = MARKUP_SHARE * room.message_tokens * len(draft.nodes)
    if markup > room.prompt_tokens:
        most_messages = max(1, room.prompt_tokens // (MARKUP_SHARE * room.message_tokens))
        draft = draft.without(_behind_results(draft.nodes, len(draft.nodes) - most_messages))
    markup = room.base_tokens + NOTE_TOKENS + room.message_tokens * (len(draft.nodes) + 1)
    markup += draft.system.tools_tokens
    if draft.dropped and draft.nodes[0].role != USER:
        # NO_USER stands before it, beside the note of what was left out.
        markup += room.message_tokens + NOTE_TOKENS
    share = max(1, room.prompt_tokens - markup)
    head = draft.system.text + draft.system.pinned + draft.told.text
    n_head = draft.head_tokens
    most = _level([n_head, *(n.n_tokens for n in draft.nodes)], share)
    text = cut_text(head, n_head, most)
    return replace(
        draft,
        system=replace(
            draft.system, text=text, n_tokens=min(n_head, most), pinned="", pinned_tokens=0
        ),
        nodes=tuple(_cut_node(n, most) for n in draft.nodes),
        gone=(),
    )


def _behind_results(nodes: Sequence[Node], cut: int) -> int:
    """The cut moved behind results whose call would be gone; where nothing but results is left it
    stays: of one call's very many results the newest are better than none."""
    return next((i for i in range(cut, len(nodes)) if nodes[i].role != TOOL), cut)


def _cut_node(node: Node, most: int) -> Node:
    """The longer one of the note and the text gives first."""
    if node.n_tokens <= most:
        return node
    note = _note_tokens(node)
    text = node.n_tokens - note
    level = _level([note, text], most)
    return replace(
        node,
        text=cut_text(node.text, text, level),
        note=cut_text(node.note, note, level),
        n_tokens=most,
        token_ids=None,
    )


def _level(lengths: Sequence[int], total: int) -> int:
    """The greatest m with sum(min(length, m)) <= total: the long give, the short keep all."""
    rest = total
    ordered = sorted(lengths)
    for i, length in enumerate(ordered):
        fair = rest // (len(ordered) - i)
        if length > fair:
            return max(1, fair)
        rest -= length
    return max(ordered, default=total)


def cut_text(text: str, n_tokens: int, max_tokens: int) -> str:
    """The text without its middle, about `max_tokens` long by its own rate of characters per token.

    Two thirds of what stays are from the beginning. The rate is an estimate: whoever needs to be
    sure counts again.
    """
    if n_tokens <= max_tokens:
        return text
    keep = max(0, int(len(text) * max(0, max_tokens - 6) / n_tokens * 0.95))
    head = keep * 2 // 3
    return text[:head] + CUT + text[len(text) - (keep - head) :]


def _context(draft: _Draft, *, tokenizer: str) -> Context:
    nodes, told = draft.nodes, draft.told.text
    parts = [text for text in (draft.system.text, draft.system.pinned) if text]
    parts += [block_text(b.text) for b in draft.blocks]
    if draft.dropped:
        parts.append(LEFT_OUT.format(n=draft.dropped))
    parts += [told] if told else []
    head = [ContextMessage(SYSTEM, tuple(parts))] if parts else []
    summary_tokens = sum(b.n_tokens for b in draft.blocks)
    return Context(
        messages=(*head, *_alternate(nodes, tokenizer)),
        tokenizer=tokenizer,
        continues=bool(nodes) and nodes[-1].role == ASSISTANT,
        shape=Shape(
            verbatim_turns=len(turn_starts([n.role for n in nodes])),
            verbatim_tokens=sum(n.n_tokens for n in nodes),
            summaries=len(draft.blocks),
            summary_tokens=summary_tokens,
            system_tokens=draft.head_tokens - summary_tokens + draft.system.tools_tokens,
            dropped_messages=draft.dropped,
        ),
        tools=draft.system.tools,
    )


def _alternate(nodes: Sequence[Node], tokenizer: str) -> list[ContextMessage]:
    """User and assistant in turn, the user first, as most templates demand; results of tools each
    by itself."""
    out: list[ContextMessage] = []
    if nodes and nodes[0].role != USER:
        out.append(ContextMessage(USER, (NO_USER,)))
    for before, node in pairwise([None, *nodes]):
        assert node is not None
        if before is not None and before.role == node.role != TOOL:
            out[-1] = ContextMessage(node.role, (*out[-1].parts, "\n\n", *_parts(node)))
        else:
            ids = node.token_ids if node.tokenizer == tokenizer else None
            out.append(ContextMessage(node.role, _parts(node), ids))
    return out


def _parts(node: Node) -> tuple[str, ...]:
    return (note_text(node.note), node.text) if node.note else (node.text,)
