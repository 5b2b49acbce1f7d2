"""transcript + summaries + policy + budget -> context. Pure: same input, same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from memory.records import Node, Summary
from memory.system import note_text
from memory.transcript import ASSISTANT, USER, turn_starts

SYSTEM = "system"

BLOCK_HEADER = "\n\nEarlier in this conversation:\n"
LEFT_OUT = "\n\n[{n} earlier messages are left out here.]"
CUT = "\n[...]\n"
NO_USER = "(The conversation goes on.)"
"""Stands before an answer whose question is gone: templates want the user to speak first."""

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
    """

    messages: tuple[ContextMessage, ...]
    tokenizer: str
    continues: bool
    shape: Shape


@dataclass(frozen=True, slots=True)
class System:
    """The client's system prompt (or the model's own default) and its tokens."""

    text: str
    n_tokens: int


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
) -> Context:
    """The messages to send: the system prompt with the summaries behind it, then the verbatim
    nodes.

        system | S1 | S2 | (left out) | turn turn turn ... newest

    What does not fit goes by rule, in this order: the oldest verbatim turns, in steps; the oldest
    summaries; the middle of the longest texts. The newest turn always stays. With `may_drop` false
    DoesNotFit is raised instead.
    """
    fitting = _fitting(system, tuple(blocks), tuple(nodes), room, may_drop=may_drop)
    return _context(*fitting, tokenizer=tokenizer, asked=len(nodes))


def fits(*, system: System, blocks: Sequence[Summary], nodes: Sequence[Node], room: Room) -> bool:
    """Whether all of it can be sent as it is."""
    return _cost(system, blocks, nodes, room) <= room.prompt_tokens


def _fitting(
    system: System,
    blocks: tuple[Summary, ...],
    nodes: tuple[Node, ...],
    room: Room,
    *,
    may_drop: bool,
) -> tuple[System, tuple[Summary, ...], tuple[Node, ...]]:
    if fits(system=system, blocks=blocks, nodes=nodes, room=room):
        return system, blocks, nodes
    if not may_drop:
        raise DoesNotFit("The conversation is longer than the model's window.")
    nodes = _drop_turns(system, blocks, nodes, room)
    while blocks and not fits(system=system, blocks=blocks, nodes=nodes, room=room):
        blocks = blocks[1:]
    if fits(system=system, blocks=blocks, nodes=nodes, room=room):
        return system, blocks, nodes
    return _cut_texts(system, nodes, room)


def _cost(system: System, blocks: Sequence[Summary], nodes: Sequence[Node], room: Room) -> int:
    summaries = sum(b.n_tokens for b in blocks)
    head = system.n_tokens + summaries + room.message_tokens if system.text or blocks else 0
    verbatim = sum(n.n_tokens + room.message_tokens for n in nodes)
    return room.base_tokens + NOTE_TOKENS + head + verbatim


def _drop_turns(
    system: System, blocks: tuple[Summary, ...], nodes: tuple[Node, ...], room: Room
) -> tuple[Node, ...]:
    """Whole turns, counted in steps from the first node: the cut stays where it is for many
    turns.
    """
    starts = turn_starts([n.role for n in nodes])
    offsets = [0, *accumulate(n.n_tokens + room.message_tokens for n in nodes)]
    excess = _cost(system, blocks, nodes, room) - room.prompt_tokens
    steps = -(-excess // room.step_tokens)
    for start in starts[1:]:
        if offsets[start] >= steps * room.step_tokens:
            return nodes[start:]
    return nodes[starts[-1] :] if starts else nodes


def _cut_texts(
    system: System, nodes: tuple[Node, ...], room: Room
) -> tuple[System, tuple[Summary, ...], tuple[Node, ...]]:
    """Takes the middle out of the longest texts until the rest fits: the newest turn alone is too
    long.
    """
    markup = room.base_tokens + NOTE_TOKENS + room.message_tokens * (len(nodes) + 1)
    share = max(1, room.prompt_tokens - markup)
    lengths = [system.n_tokens, *(n.n_tokens for n in nodes)]
    most = _level(lengths, share)
    cut_system = System(cut_text(system.text, system.n_tokens, most), min(system.n_tokens, most))
    cut_nodes = tuple(
        n
        if n.n_tokens <= most
        else replace(n, text=cut_text(n.text, n.n_tokens, most), n_tokens=most, token_ids=None)
        for n in nodes
    )
    return cut_system, (), cut_nodes


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


def _context(
    system: System,
    blocks: Sequence[Summary],
    nodes: Sequence[Node],
    *,
    tokenizer: str,
    asked: int,
) -> Context:
    dropped = asked - len(nodes)
    parts = [system.text] if system.text else []
    parts += [block_text(b.text) for b in blocks]
    if dropped:
        parts.append(LEFT_OUT.format(n=dropped))
    head = [ContextMessage(SYSTEM, tuple(parts))] if parts else []
    return Context(
        messages=(*head, *_alternate(nodes, tokenizer)),
        tokenizer=tokenizer,
        continues=bool(nodes) and nodes[-1].role == ASSISTANT,
        shape=Shape(
            verbatim_turns=len(turn_starts([n.role for n in nodes])),
            verbatim_tokens=sum(n.n_tokens for n in nodes),
            summaries=len(blocks),
            summary_tokens=sum(b.n_tokens for b in blocks),
            system_tokens=system.n_tokens,
            dropped_messages=dropped,
        ),
    )


def _alternate(nodes: Sequence[Node], tokenizer: str) -> list[ContextMessage]:
    """User and assistant in turn, the user first, as most templates demand."""
    out: list[ContextMessage] = []
    if nodes and nodes[0].role == ASSISTANT:
        out.append(ContextMessage(USER, (NO_USER,)))
    for before, node in pairwise([None, *nodes]):
        assert node is not None
        if before is not None and before.role == node.role:
            out[-1] = ContextMessage(node.role, (*out[-1].parts, "\n\n", *_parts(node)))
        else:
            ids = node.token_ids if node.tokenizer == tokenizer else None
            out.append(ContextMessage(node.role, _parts(node), ids))
    return out


def _parts(node: Node) -> tuple[str, ...]:
    return (note_text(node.note), node.text) if node.note else (node.text,)
