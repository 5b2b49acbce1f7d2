"""Two sets of summaries of the same messages, side by side: what each of them kept. Pure.

Measured as `chatfold tune` measures (proxy.tuning.retention): lower bounds, for what is told in
other words is not found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memory.facts import Fact, Told, all_facts
from memory.records import Node, Summary
from memory.transcript import Message
from proxy.tuning.retention import KINDS, Kept, Share, kept_in, sought, together, total

FACTS_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Row:
    """Messages `first`..`last` (both included), which both sides cover with whole summaries, and
    what of them one side alone tells, the weightiest first."""

    first: int
    last: int
    left: tuple[Summary, ...]
    right: tuple[Summary, ...]
    left_kept: Kept
    right_kept: Kept
    only_left: tuple[str, ...]
    only_right: tuple[str, ...]
    n_neither: int

    @property
    def left_total(self) -> Share:
        return total(self.left_kept)

    @property
    def right_total(self) -> Share:
        return total(self.right_kept)


@dataclass(frozen=True, slots=True)
class Side:
    """A set as a whole."""

    n_summaries: int
    n_tokens: int
    n_by_model: int
    seconds: float
    kept: Kept

    @property
    def share(self) -> Share:
        return total(self.kept)


@dataclass(frozen=True, slots=True)
class Comparison:
    rows: tuple[Row, ...]
    left: Side
    right: Side

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those of which the messages hold anything."""
        return tuple(kind for kind in KINDS if self.left.kept[kind].of)


def compare(
    left: Sequence[Summary],
    right: Sequence[Summary],
    nodes: Sequence[Node],
    *,
    all_left: Sequence[Summary] = (),
    all_right: Sequence[Summary] = (),
) -> Comparison:
    """Both sides in the order of what they stand for, from one first message to one last, and
    `nodes` these messages. What was merged counts in the time only: `all_left` and `all_right`."""
    rows = tuple(_row(a, b, nodes) for a, b in aligned(left, right))
    return Comparison(
        rows,
        _side(left, together(row.left_kept for row in rows), all_left or left),
        _side(right, together(row.right_kept for row in rows), all_right or right),
    )


def aligned(
    left: Sequence[Summary], right: Sequence[Summary]
) -> list[tuple[tuple[Summary, ...], tuple[Summary, ...]]]:
    """The shortest stretches at whose ends both sides have an end."""
    out: list[tuple[tuple[Summary, ...], tuple[Summary, ...]]] = []
    common = {s.last_depth for s in left} & {s.last_depth for s in right}
    start = -1
    for end in sorted(common):
        parts = [tuple(s for s in side if start < s.last_depth <= end) for side in (left, right)]
        out.append((parts[0], parts[1]))
        start = end
    return out


def _row(left: tuple[Summary, ...], right: tuple[Summary, ...], nodes: Sequence[Node]) -> Row:
    first, last = left[0].first_depth, left[-1].last_depth
    said = [Message(n.role, n.text) for n in nodes if first <= n.depth <= last]
    wanted = sought(said)
    one, other = (_text(side) for side in (left, right))
    only_left, only_right, n_neither = _differing(all_facts(said), Told.of(one), Told.of(other))
    return Row(
        first,
        last,
        left,
        right,
        kept_in(wanted, one),
        kept_in(wanted, other),
        only_left,
        only_right,
        n_neither,
    )


def _differing(
    facts: Sequence[Fact], one: Told, other: Told
) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    held = [(f.text, one.holds(f), other.holds(f)) for f in sorted(facts, key=lambda f: f.rank)]
    return (
        tuple(text for text, a, b in held if a and not b),
        tuple(text for text, a, b in held if b and not a),
        sum(not a and not b for _, a, b in held),
    )


def _side(blocks: Sequence[Summary], kept: Kept, made: Sequence[Summary]) -> Side:
    return Side(
        n_summaries=len(blocks),
        n_tokens=sum(s.n_tokens for s in blocks),
        n_by_model=sum(s.made_by == "model" for s in blocks),
        seconds=sum(s.duration_s for s in made),
        kept=kept,
    )


def _text(side: Sequence[Summary]) -> str:
    return "\n".join(s.text for s in side)
