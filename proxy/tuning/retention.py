"""How much of what was said can be read in a context, without a judge. Pure.

Lower bounds: what is said in other words, or follows from what is there, is not found.
docs/tuning.md says what each share means and where the definitions come from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memory import names, numbers
from memory.context import SYSTEM, Context
from memory.facts import Fact, Told, all_facts
from memory.language import words
from memory.standing import standing_instructions
from memory.transcript import Message
from proxy.tuning.chats import Question

KINDS = ("names", "numbers", "dates", "identifiers", "instructions")
_KIND_OF = {
    "name": "names",
    "number": "numbers",
    "date": "dates",
    "url": "identifiers",
    "file": "identifiers",
    "code": "identifiers",
}

_WORD = re.compile(r"\w+")
_EMPTY_WORDS = words(
    "a an the and or of to in on at for with by from as is are was were be been it its this that"
    " he she they his her their him them i you we my your our not no yes so do does did has have"
    " had will would can could about into"
)


@dataclass(frozen=True, slots=True)
class Share:
    """`kept` of `of` things."""

    kept: int = 0
    of: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(self.kept + other.kept, self.of + other.of)

    @property
    def value(self) -> float | None:
        """None where there was nothing to keep."""
        return self.kept / self.of if self.of else None


Kept = dict[str, Share]
"""By kind, one of KINDS."""


@dataclass(frozen=True, slots=True)
class Sought:
    """What of a chat should still be there."""

    facts: tuple[Fact, ...]
    instructions: tuple[str, ...]


def sought(said: Sequence[Message]) -> Sought:
    """Every fact and standing instruction of these messages, once each."""
    return Sought(tuple(all_facts(said)), standing_instructions(said))


def kept(wanted: Sought, context: Context) -> Kept:
    """How many of them the model can read in this context."""
    return kept_in(wanted, whole_text(context))


def kept_in(wanted: Sought, text: str) -> Kept:
    """How many of them can be read in a text."""
    told = Told.of(text)
    found = {kind: Share() for kind in KINDS}
    for fact in wanted.facts:
        found[_KIND_OF[fact.kind]] += Share(int(told.holds(fact)), 1)
    flat = _flat(text)
    for order in wanted.instructions:
        found["instructions"] += Share(int(_flat(order) in flat), 1)
    return found


def total(found: Kept) -> Share:
    return sum(found.values(), Share())


def together(many: Iterable[Kept]) -> Kept:
    """All of them added up, kind by kind."""
    out = {kind: Share() for kind in KINDS}
    for one in many:
        for kind, share in one.items():
            out[kind] += share
    return out


@dataclass(frozen=True, slots=True)
class Reach:
    """Questions whose evidence is in the context word for word, those besides whose answer's words
    are all there, and all."""

    verbatim: int = 0
    covered: int = 0
    of: int = 0

    def __add__(self, other: Reach) -> Reach:
        return Reach(
            self.verbatim + other.verbatim, self.covered + other.covered, self.of + other.of
        )

    @property
    def value(self) -> float | None:
        return (self.verbatim + self.covered) / self.of if self.of else None


def reach(questions: Sequence[Question], context: Context) -> Reach:
    spoken = "\n".join(m.text for m in context.messages if m.role != SYSTEM)
    held = _Held.of(whole_text(context))
    verbatim = [all(line in spoken for line in q.evidence) for q in questions]
    covered = [held.covers(q.answer) for q in questions]
    besides = sum(c and not v for c, v in zip(covered, verbatim, strict=True))
    return Reach(sum(verbatim), besides, len(questions))


@dataclass(frozen=True, slots=True)
class _Held:
    words: frozenset[str]
    numbers: frozenset[str]
    known: names.Known

    @classmethod
    def of(cls, text: str) -> _Held:
        found = frozenset(word.casefold() for word in _WORD.findall(text))
        return cls(found, numbers.readings(text), names.known(text))

    def covers(self, answer: str) -> bool:
        """Whether each word of the answer that says something is there, in this form or another
        (memory.names), and each number, however it is written. An answer without such words is
        never covered."""
        found = {word.casefold() for word in _WORD.findall(answer)} - _EMPTY_WORDS
        said = [word for word in found if not word.isdigit()]
        digits = [word for word in found if word.isdigit()]
        if not found or not set(digits) <= self.numbers | self.words:
            return False
        return all(word in self.words or self.known.holds(word) for word in said)


def whole_text(context: Context) -> str:
    return "\n".join(message.text for message in context.messages)


def _flat(text: str) -> str:
    return " ".join(text.split()).casefold()
