"""What each answer cost, as pictures. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memory.records import Answered
from proxy.pages.trees import Turn

WIDTH = 1000.0
HEIGHT = 90.0
COLUMNS_MOST = 250
GAP = 0.18


@dataclass(frozen=True, slots=True)
class Column:
    """One turn. `parts` are (name, y, height), from the bottom up; `values` the numbers as told."""

    turn: Turn
    x: float
    width: float
    parts: tuple[tuple[str, float, float], ...]
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Chart:
    """`most` is the value at the top."""

    columns: tuple[Column, ...]
    most: float
    width: float = WIDTH
    height: float = HEIGHT


def charts(
    turns: Sequence[Turn], digests: Sequence[bytes], answers: Mapping[bytes, Answered]
) -> tuple[Chart, Chart] | None:
    """Tokens, and seconds to the first one, of the newest turns; None where none is known. A turn
    with several answers, as where tools are called, shows their sum."""
    known = []
    for turn in turns[-COLUMNS_MOST:]:
        own = [answers[d] for d in digests[turn.first : turn.last + 1] if d in answers]
        if own:
            known.append((turn, own))
    if not known:
        return None
    tokens = [(turn, _tokens(own)) for turn, own in known]
    seconds = [(turn, {"first_token": own[0].first_token_s}) for turn, own in known]
    return _chart(tokens), _chart(seconds)


def _tokens(answers: Sequence[Answered]) -> dict[str, float]:
    return {
        "cached": sum(a.cached_tokens for a in answers),
        "evaluated": sum(a.evaluated_tokens for a in answers),
        "generated": sum(a.generated_tokens for a in answers),
    }


def _chart(rows: Sequence[tuple[Turn, Mapping[str, float]]]) -> Chart:
    most = max(sum(values.values()) for _, values in rows) or 1.0
    step = WIDTH / len(rows)
    columns = []
    for i, (turn, values) in enumerate(rows):
        y, parts = HEIGHT, []
        for name, value in values.items():
            height = HEIGHT * value / most
            y -= height
            parts.append((name, round(y, 2), round(height, 2)))
        columns.append(
            Column(turn, round(step * i, 2), round(step * (1 - GAP), 2), tuple(parts), values)
        )
    return Chart(tuple(columns), most)
