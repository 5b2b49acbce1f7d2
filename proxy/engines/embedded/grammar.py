"""Rules of a GBNF grammar, built so that llama.cpp can follow them at a bounded cost. Pure.

llama.cpp keeps every way in which a text may go on, and looks for left recursion along every path:
a few nested choices make both grow without bound, and neither says no in time. So the ways in
which each rule can begin are counted here first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_RULES = 20_000
MAX_BEGINNINGS = 4096
"""Ways to begin one rule; an object of 500 optional properties has 500."""
MAX_NESTED = 150
"""Rules that begin with one another: llama.cpp and this module call themselves for each."""
MAX_REPEATS = 2000
"""llama.cpp's own bound (MAX_REPETITION_THRESHOLD); a larger maximum counts as none there."""
MAX_REPEATS_ALL = 20_000


class GrammarError(ValueError):
    """`str()` is one sentence that says what cannot be followed, and why."""


@dataclass(frozen=True, slots=True)
class Item:
    """A place in a rule: `text` is a terminal as GBNF writes it, or the name of a rule.

    It stands `low` to `high` times, None being no bound.
    """

    text: str
    is_rule: bool = False
    low: int = 1
    high: int | None = 1

    def __str__(self) -> str:
        if (self.low, self.high) == (1, 1):
            return self.text
        return f"{self.text}{{{self.low},{'' if self.high is None else self.high}}}"


class Rules:
    """Named rules. What has the same body has the same name, so that equal choices are one."""

    def __init__(self) -> None:
        self._bodies: list[tuple[tuple[Item, ...], ...]] = []
        self._items: dict[tuple[tuple[Item, ...], ...], Item] = {}
        self._n_repeats = 0

    def add(self, *alternatives: Sequence[Item]) -> Item:
        """A rule with these alternatives; an empty one is the empty text. Raises GrammarError."""
        body = tuple(dict.fromkeys(tuple(a) for a in alternatives))
        if body not in self._items:
            self._items[body] = self._define(body)
        return self._items[body]

    def reserve(self) -> Item:
        """A rule whose body comes later: see `fill`."""
        return self._define(())

    def fill(self, rule: Item, *alternatives: Sequence[Item]) -> None:
        self._bodies[_number(rule)] = tuple(tuple(a) for a in alternatives)

    def repeat(self, item: Item, low: int, high: int | None) -> list[Item]:
        """`item` that often. Raises GrammarError."""
        if (low, high) == (1, 1):
            return [item]
        if high == 0:
            return []
        times = low if high is None else high
        if times > MAX_REPEATS:
            raise GrammarError(f"More than {MAX_REPEATS} repetitions are not supported.")
        # Rules of their own: llama.cpp writes repetitions out wherever they stand, and multiplies
        # those of a group with the group's.
        once = item if item.is_rule and (item.low, item.high) == (1, 1) else self.add([item])
        n_rules = len(self._bodies)
        rule = self.add([Item(once.text, True, low, high)])
        self._n_repeats += times if len(self._bodies) > n_rules else 0
        if self._n_repeats > MAX_REPEATS_ALL:
            raise GrammarError("The schema holds too many repetitions.")
        return [rule]

    def text(self, root: Item) -> str:
        """The whole grammar. Raises GrammarError if llama.cpp could not follow it."""
        beginnings = _Beginnings(self._bodies)
        for number in range(len(self._bodies)):
            beginnings.count(number)
        lines = (f"r{number} ::= {_body(body)}" for number, body in enumerate(self._bodies))
        return "\n".join([f"root ::= {root}", *lines, ""])

    def _define(self, body: tuple[tuple[Item, ...], ...]) -> Item:
        if len(self._bodies) >= MAX_RULES:
            raise GrammarError("The schema is too large.")
        self._bodies.append(body)
        return Item(f"r{len(self._bodies) - 1}", is_rule=True)


def _number(rule: Item) -> int:
    return int(rule.text[1:])


def _body(body: tuple[tuple[Item, ...], ...]) -> str:
    return " | ".join(" ".join(map(str, alternative)) or '""' for alternative in body)


class _Beginnings:
    """Counts the ways in which rules begin: each path to a first character is one."""

    def __init__(self, bodies: Sequence[tuple[tuple[Item, ...], ...]]) -> None:
        self._bodies = bodies
        self._found: dict[int, tuple[int, bool]] = {}
        self._open: set[int] = set()

    def count(self, number: int) -> tuple[int, bool]:
        """(ways, whether the rule may be empty). Raises GrammarError."""
        if number in self._found:
            return self._found[number]
        if number in self._open:
            raise GrammarError("The schema repeats itself without end.")
        if len(self._open) >= MAX_NESTED:
            raise GrammarError("The schema is nested too deeply.")
        self._open.add(number)
        counts = [self._sequence(alternative) for alternative in self._bodies[number]]
        self._open.remove(number)
        ways, may_be_empty = sum(n for n, _ in counts), any(empty for _, empty in counts)
        if ways > MAX_BEGINNINGS:
            raise GrammarError("The schema leaves too many choices at one place.")
        self._found[number] = ways, may_be_empty
        return ways, may_be_empty

    def _sequence(self, items: Sequence[Item]) -> tuple[int, bool]:
        ways = 0
        for item in items:
            n, empty = self.count(_number(item)) if item.is_rule else (1, False)
            if empty and item.high != 1:
                # llama.cpp makes a rule of it that begins with itself.
                raise GrammarError("The schema repeats what may be empty.")
            ways += n
            if not empty and item.low:
                return ways, False
        return ways, True


def literal(text: str) -> list[Item]:
    """Exactly this text."""
    return [Item('"' + "".join(_in_literal(c) for c in text) + '"')] if text else []


def char_class(ranges: Iterable[tuple[int, int]], *, but: bool = False) -> Item:
    """One character in these ranges of code points, or in none of them (`but`)."""
    inside = "".join(_range(low, high) for low, high in ranges)
    return Item(f"[{'^' if but else ''}{inside}]")


def _range(low: int, high: int) -> str:
    return _in_class(low) if low == high else f"{_in_class(low)}-{_in_class(high)}"


def _in_literal(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    return char if char.isprintable() else f"\\U{ord(char):08X}"


def _in_class(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\U{code:08X}"
