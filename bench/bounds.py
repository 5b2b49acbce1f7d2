"""The claims as arithmetic: pure, on turns that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from bench.chats import Turn

FIRST_TURN = 6
"""The turns before it are too short to tell anything."""

MEAN_EVALUATED_PER_NEW = 1.10
SLACK_TOKENS = 32
"""No turn evaluates more than twice its own new tokens and this."""

MIN_COMPACTIONS = 3
COMPACTIONS_FROM_TURNS = 60
EDGE_TURNS = 10


@dataclass(frozen=True)
class Check:
    """One claim: what was measured, what it is held against, whether it holds."""

    claim: str
    measured: float
    bound: str
    holds: bool

    def __str__(self) -> str:
        verdict = "ok    " if self.holds else "MISSED"
        return f"{verdict}  {self.claim}: {self.measured:g} ({self.bound})"

    def to_json(self) -> dict[str, Any]:
        measured = round(self.measured, 4)
        return {"claim": self.claim, "measured": measured, "bound": self.bound, "holds": self.holds}


def at_most(claim: str, measured: float, bound: float) -> Check:
    return Check(claim, round(measured, 4), f"at most {bound:g}", measured <= bound)


def at_least(claim: str, measured: float, bound: float) -> Check:
    return Check(claim, round(measured, 4), f"at least {bound:g}", measured >= bound)


def settled(turns: Sequence[Turn]) -> list[Turn]:
    return [t for t in turns if t.number >= FIRST_TURN and t.evaluated is not None]


def mean_ratio(turns: Sequence[Turn]) -> float:
    """Mean over the settled turns of evaluated / new tokens."""
    return fmean([t.ratio for t in settled(turns) if t.ratio is not None] or [0.0])


def total_ratio(turns: Sequence[Turn]) -> float:
    """All evaluated tokens / all new tokens of the settled turns: prefill amplification."""
    new = sum(t.new_tokens for t in settled(turns))
    return sum(t.evaluated or 0 for t in settled(turns)) / new if new else 0.0


def worst_share(turns: Sequence[Turn]) -> float:
    """The largest evaluated / (2 x new + slack): at most 1 is within the bound."""
    shares = [(t.evaluated or 0) / (2 * t.new_tokens + SLACK_TOKENS) for t in settled(turns)]
    return max(shares, default=0.0)


def first_content(turns: Sequence[Turn], *, last: bool) -> float | None:
    """Median seconds to the first content: ten turns from the sixth on, or the last ten."""
    some = settled(turns)
    some = some[-EDGE_TURNS:] if last else some[:EDGE_TURNS]
    times = [t.answer.first_content_s for t in some if t.answer.first_content_s is not None]
    return median(times) if times else None


def paced_checks(
    turns: Sequence[Turn], *, wanted: int, compactions: int, window_tokens: int
) -> list[Check]:
    """What a chat owes that lets the background work end between its turns."""
    checks = [
        at_least("turns answered", sum(t.answer.ok for t in turns), wanted),
        at_most(
            f"evaluated / new tokens, mean from turn {FIRST_TURN}",
            mean_ratio(turns),
            MEAN_EVALUATED_PER_NEW,
        ),
        at_most(f"worst turn's evaluated / (2 x new + {SLACK_TOKENS})", worst_share(turns), 1.0),
        at_most("prompt + answer, most tokens", most_tokens(turns), window_tokens),
    ]
    if wanted >= COMPACTIONS_FROM_TURNS:
        checks.append(at_least("compactions", compactions, MIN_COMPACTIONS))
    return checks


def most_tokens(turns: Sequence[Turn]) -> int:
    return max((t.total_tokens for t in turns), default=0)
