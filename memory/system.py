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

_END = re.compile(r"(?<=\S)\s*\n|(?<=[.!?])\s|(?<=[。！？])")
"""Begins where a line or a sentence ends. A full stop ends one only before white space: 3.14,
example.com."""


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
        return Split(system, "")
    if not (system.startswith(front) and len(front.rstrip()) in _ends(system, len(front))):
        front = common_lead(front, system)
    rest = system[len(front) :].strip()
    told = next((n.note for n in reversed(visible) if n.note), "")
    return Split(front, "" if rest == told else rest)


def common_lead(a: str, b: str) -> str:
    """The longest common beginning of both that ends where a line or a sentence does, without the
    white space behind it."""
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a if a == b else a[: max(_ends(a, n) & _ends(b, n))]


def _ends(text: str, most: int) -> set[int]:
    """Where lines and sentences end in it, up to index `most`. Linear in the text's length."""
    ends = {m.start() for m in _END.finditer(text)} | {0, len(text.rstrip())}
    return {end for end in ends if end <= most}


def note_text(note: str) -> str:
    return NOTE.format(rest=note) if note else ""
