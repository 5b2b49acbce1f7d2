"""A conversation as a picture: a bar for each turn, above them the spans of its summaries. Pure.

rank 1   [=======S3=======]
rank 0   [==S1==][==S2==][==S4==]
turns    | | | | | | | | | | | | | | |     the ones behind the last summary in use: verbatim
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from memory.records import Summary
from proxy.pages.trees import Turn

WIDTH = 1000.0
BARS_MOST = 250
"""More turns than these share bars: a screen has no more columns to tell them apart."""

BARS_HEIGHT = 56.0
ROW_HEIGHT = 16.0
ROW_GAP = 4.0
STRIP_HEIGHT = 4.0
STRIP_GAP = 3.0
GAP = 0.18
"""Share of a bar's width that is left free."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One turn, or several. `kind` is how it reaches the model: verbatim or folded."""

    x: float
    y: float
    width: float
    height: float
    first: Turn
    last: Turn
    kind: str


@dataclass(frozen=True, slots=True)
class SpanBox:
    """A summary's place. `state` is active, waiting (written, not warm yet) or past."""

    x: float
    y: float
    width: float
    height: float
    summary: Summary
    state: str


@dataclass(frozen=True, slots=True)
class Strip:
    """A stretch from the first turn on. `kind` is memory or disk."""

    y: float
    width: float
    kind: str


@dataclass(frozen=True, slots=True)
class Picture:
    width: float
    height: float
    bars: tuple[Bar, ...]
    spans: tuple[SpanBox, ...]
    ranks: tuple[tuple[int, float], ...]
    """Each rank with the height at which its row stands, the highest rank first."""
    strips: tuple[Strip, ...] = ()
    """What is warm, under the bars."""


def draw(
    turns: Sequence[Turn],
    summaries: Sequence[Summary],
    *,
    active: Collection[int],
    n_covered: int,
) -> Picture:
    """`summaries` are those that hold for this path, `active` the ids of those in use, which
    stand for its first `n_covered` messages."""
    ranks = sorted({s.rank for s in summaries}, reverse=True)
    tops = {rank: i * (ROW_HEIGHT + ROW_GAP) for i, rank in enumerate(ranks)}
    floor = len(ranks) * (ROW_HEIGHT + ROW_GAP) + (ROW_GAP if ranks else 0)
    n_messages = turns[-1].last + 1 if turns else 1
    by_message = _positions(turns, n_messages)
    return Picture(
        width=WIDTH,
        height=floor + BARS_HEIGHT,
        bars=tuple(_bars(turns, floor, n_covered)),
        spans=tuple(_span(s, by_message, tops[s.rank], active) for s in summaries),
        ranks=tuple(tops.items()),
    )


def with_strips(
    picture: Picture, turns: Sequence[Turn], *, in_memory: int, on_disk: int
) -> Picture:
    """The same with a line under the messages, counted from the first, that are warm."""
    at = _positions(turns, turns[-1].last + 1 if turns else 1)
    lengths = (("disk", on_disk), ("memory", in_memory))  # the one in memory lies on top
    y = picture.height + STRIP_GAP
    strips = tuple(
        Strip(y, round(at[min(n, len(at) - 1)], 2), kind) for kind, n in lengths if n > 0
    )
    return replace(picture, height=y + STRIP_HEIGHT, strips=strips)


def _positions(turns: Sequence[Turn], n_messages: int) -> list[float]:
    """Where each message begins, and where the last one ends: turns are equally wide."""
    out = []
    step = WIDTH / max(1, len(turns))
    for i, turn in enumerate(turns):
        n = turn.last - turn.first + 1
        out += [step * (i + k / n) for k in range(n)]
    return [*out, WIDTH] if out else [0.0] * n_messages + [WIDTH]


def _bars(turns: Sequence[Turn], floor: float, n_covered: int) -> list[Bar]:
    size = -(-len(turns) // BARS_MOST) or 1
    groups = [turns[i : i + size] for i in range(0, len(turns), size)]
    weights = [sum(t.n_tokens for t in group) / len(group) for group in groups]
    most = max(weights, default=1.0) or 1.0
    step = WIDTH / max(1, len(turns)) * size
    return [
        _bar(group, step * i, step, max(3.0, BARS_HEIGHT * weight / most), floor, n_covered)
        for i, (group, weight) in enumerate(zip(groups, weights, strict=True))
    ]


def _bar(
    group: Sequence[Turn], x: float, step: float, height: float, floor: float, n_covered: int
) -> Bar:
    verbatim = group[-1].last >= n_covered
    width = min(step, WIDTH - x)
    return Bar(
        round(x, 2),
        round(floor + BARS_HEIGHT - height, 2),
        round(width * (1 - GAP), 2),
        round(height, 2),
        group[0],
        group[-1],
        "verbatim" if verbatim else "folded",
    )


def _span(
    summary: Summary, positions: Sequence[float], top: float, active: Collection[int]
) -> SpanBox:
    left, right = positions[summary.first_depth], positions[summary.last_depth + 1]
    state = "past" if summary.activated_at is not None else "waiting"
    return SpanBox(
        round(left, 2),
        top,
        round(max(1.0, right - left - 1.5), 2),
        ROW_HEIGHT,
        summary,
        "active" if summary.id in active else state,
    )
