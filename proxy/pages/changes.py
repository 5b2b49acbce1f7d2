"""What changed from one context to the next, message by message. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

from memory.context import Context

SAME, GONE, NEW = "same", "gone", "new"

Piece = tuple[str, str, str]
"""How it changed, whose it is, and the text."""


def changes(before: Context | None, after: Context) -> list[Piece]:
    """The parts of both in the order of the later one. Parts are compared as wholes: a block, a
    message. Without one before it all is new."""
    old, new = list(_parts(before)) if before else [], list(_parts(after))
    out: list[Piece] = []
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            out += [(SAME, role, text) for role, text in new[c:d]]
        else:
            out += [(GONE, role, text) for role, text in old[a:b]]
            out += [(NEW, role, text) for role, text in new[c:d]]
    return out


def _parts(context: Context) -> Iterator[tuple[str, str]]:
    for message in context.messages:
        parts: Sequence[str] = message.parts if message.role == "system" else (message.text,)
        yield from ((message.role, part) for part in parts)
