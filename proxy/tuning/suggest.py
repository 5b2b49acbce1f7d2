"""The search for the knobs that keep most of a chat within given limits. Pure: whoever asks
replays the policies.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from memory.policy import Policy
from proxy.tuning.measures import Row

NAME = "suggested"
OVERRUN_MOST = 0.05
"""In at most one turn of twenty the work after an answer may be longer than the pause."""
GAIN_LEAST = 0.005
"""Less than half a per cent more is not worth a knob."""

Measure = Callable[[Policy], Awaitable[Row]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user asks for. None is no limit."""

    first_token_s: float | None = None
    pause_s: float = 30.0

    def broken(self, row: Row) -> list[str]:
        """What does not hold, as ends of sentences."""
        out = []
        if self.first_token_s is not None and row.first_token_p95_s > self.first_token_s:
            out.append(
                f"the first token takes {row.first_token_p95_s:.2f} s at p95, "
                f"over the {self.first_token_s:g} s asked for"
            )
        if row.overrun > OVERRUN_MOST:
            out.append(
                f"after {row.overrun:.0%} of the answers the machine works longer than the pause "
                f"of {self.pause_s:g} s"
            )
        return out


@dataclass(frozen=True, slots=True)
class Tried:
    policy: Policy
    row: Row


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What was found, how it came about in sentences, and whether the limits hold."""

    policy: Policy
    row: Row
    reasons: tuple[str, ...]
    holds: bool


async def search(
    presets: Sequence[Tried], measure: Measure, limits: Limits, *, tries: int
) -> Suggestion:
    """Begins with the best preset and changes one knob after the other, as long as that helps; at
    most `tries` policies are measured besides the presets. There must be a preset."""
    start = max(presets, key=lambda tried: _merit(tried.row, limits))
    reasons = [_first(start, limits)]
    best, left = start, tries
    improved = True
    while improved and left > 0:
        improved = False
        for knob, policy in _moves(best.policy):
            if left <= 0:
                break
            left -= 1
            tried = Tried(policy, await measure(policy))
            if _better(tried.row, best.row, limits):
                reasons.append(_step(knob, best, tried))
                best, improved = tried, True
                break
    if best is start:
        reasons.append(f"No single change of a knob did better ({tries - left} were tried).")
    reasons += _closing(best, limits)
    policy = replace(best.policy, name=NAME) if best is not start else best.policy
    return Suggestion(policy, best.row, tuple(reasons), not limits.broken(best.row))


def _merit(row: Row, limits: Limits) -> tuple[float, ...]:
    """Larger is better: limits kept, or how nearly; then what is retained; then rest."""
    over = 0.0
    if limits.first_token_s is not None:
        over += max(0.0, row.first_token_p95_s / limits.first_token_s - 1)
    over += max(0.0, row.overrun - OVERRUN_MOST)
    return -round(over, 3), round(row.retention or 0.0, 3), -round(row.background_s, 2)


def _better(one: Row, other: Row, limits: Limits) -> bool:
    a, b = _merit(one, limits), _merit(other, limits)
    if a[0] != b[0]:
        return a[0] > b[0]
    if abs(a[1] - b[1]) >= GAIN_LEAST:
        return a[1] > b[1]
    # As much retained: a tenth less work is worth a knob too.
    return a[1] >= b[1] and one.background_s < 0.9 * other.background_s


def _moves(policy: Policy) -> Iterator[tuple[str, Policy]]:
    """Neighbours, one knob changed; those that make no policy are skipped. Who writes summaries is
    not changed: without the model nobody knows how well it would."""
    steps: list[tuple[str, object]] = [
        *(("high", round(policy.high * f, 3)) for f in (1.1, 0.8)),
        *(("low", round(policy.low * f, 3)) for f in (0.75, 1.25)),
        *(("summary", round(policy.summary * f, 3)) for f in (1.5, 0.67)),
        *(("summaries", round(policy.summaries * f, 3)) for f in (1.3, 0.75)),
        ("block", round(policy.block * 0.6, 3)),
        ("verbatim_turns", policy.verbatim_turns + 2),
    ]
    if not policy.compact:
        steps = [("compact", True)]
    for knob, value in steps:
        if isinstance(value, float) and not _sensible(policy, knob, value):
            continue
        try:
            yield knob, replace(policy, **{knob: value})  # type: ignore[arg-type]
        except ValueError:
            continue


def _sensible(policy: Policy, knob: str, value: float) -> bool:
    """Whether the parts still leave room for the next question; only shares are added up."""
    if policy.high > 1 or policy.summaries > 1 or policy.answer > 1 or value > 1:
        return knob not in ("high", "summaries")
    parts = {"high": policy.high, "summaries": policy.summaries, "answer": policy.answer}
    return sum((parts | {knob: value}).get(name, 0.0) for name in parts) <= 0.95


# -- sentences -------------------------------------------------------------------------------------


def _first(start: Tried, limits: Limits) -> str:
    row = start.row
    broken = limits.broken(row)
    why = "it keeps most within the limits" if not broken else "it comes nearest to the limits"
    return (
        f"Of the policies at hand {start.policy.name} is where to begin: {why} "
        f"({_kept(row)} of the facts kept, first token {row.first_token_p95_s:.2f} s at p95)."
    )


def _step(knob: str, before: Tried, after: Tried) -> str:
    old, new = getattr(before.policy, knob), getattr(after.policy, knob)
    return (
        f"{knob} {_shown(old)} -> {_shown(new)}: kept {_kept(before.row)} -> {_kept(after.row)}, "
        f"first token at p95 {before.row.first_token_p95_s:.2f} -> "
        f"{after.row.first_token_p95_s:.2f} s, work after an answer "
        f"{before.row.background_s:.1f} -> {after.row.background_s:.1f} s."
    )


def _closing(best: Tried, limits: Limits) -> list[str]:
    broken = limits.broken(best.row)
    if not broken:
        asked = "" if limits.first_token_s is None else f" (asked: {limits.first_token_s:g} s)"
        return [
            f"The first token then takes {best.row.first_token_p95_s:.2f} s at p95{asked}, and "
            f"the machine works {best.row.background_s:.1f} s after an answer on average."
        ]
    out = [f"The limits do not hold with any policy that was tried: {'; '.join(broken)}."]
    if limits.first_token_s is not None and best.row.first_token_p95_s > limits.first_token_s:
        out.append(
            f"A turn's own {best.row.evaluated_p95} tokens at p95 must be evaluated under any "
            "policy: a smaller or faster model helps, no knob does."
        )
    return out


def _kept(row: Row) -> str:
    return "none" if row.retention is None else f"{row.retention:.1%}"


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
