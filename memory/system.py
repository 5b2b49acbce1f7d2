"""System prompts that change between turns: the lasting part stays in front, the rest goes to the
tail. Pure.

Dates, retrieved files and the user's memories stand at the end of a system prompt and change with
every turn; sent in front, each change would break the prefix of the whole conversation.

    turn 1   system: You are kind. Today is Monday.   user: hi
    turn 2   system: You are kind.                    user: hi ... user: [Today is Tuesday.] well?
    turn 3   the same, and behind it                  user: [Today is Wednesday.] so?
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from memory.records import Node

NOTE = "[{rest}]\n\n"
"""How the changed rest stands before the user's message."""

_BOUNDARY = re.compile(r"\n+|(?<=[.!?。！？])\s*")
"""Where a prompt may be cut: behind a line or a sentence, never inside one."""


@dataclass(frozen=True, slots=True)
class Split:
    """`front` stands in the system message, `note` before the newest user message; "" is none."""

    front: str
    note: str


def split_system(system: str, history: Sequence[Node], *, visible: Sequence[Node]) -> Split:
    """Divides a system prompt by what was in front of this conversation before.

    `history` are the stored messages of the path as far as they are at hand, `visible` those that
    the context will hold word for word: a rest that one of them carries needs no telling again.
    """
    front = next((n.front for n in reversed(history) if n.front is not None), None)
    if front is None or front == system:
        # Nothing changed, or it never changed yet: but a note that is now wrong must be outdone.
        return Split(system, "")
    if not system.startswith(front):
        front = common_lead(front, system)
    rest = system[len(front) :].strip()
    told = next((n.note for n in reversed(visible) if n.note), "")
    return Split(front, "" if rest == told else rest)


def common_lead(a: str, b: str) -> str:
    """The longest common beginning of both that ends where a line or a sentence ends."""
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if n == len(a) or n == len(b):
        return a[:n]
    ends = [m.end() for m in _BOUNDARY.finditer(a) if 0 < m.end() <= n]
    return a[: max(ends, default=0)]


def note_text(note: str) -> str:
    return NOTE.format(rest=note) if note else ""
