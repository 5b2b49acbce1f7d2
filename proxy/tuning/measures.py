"""From replayed turns to a policy's figures, and which policies are worth a look. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from proxy.tuning.replay import Turn, Work
from proxy.tuning.retention import Kept, Reach, together, total
from proxy.tuning.speeds import Speeds

PAUSE_S = 30.0
"""How long a user reads and types before the next question, where nobody knows better."""


@dataclass(frozen=True, slots=True)
class Row:
    """What a policy came to, over all turns of all chats. Lengths are tokens, times seconds."""

    policy: str
    turns: int
    evaluated_mean: float
    evaluated_p95: int
    background_mean: float
    prompt_mean: float
    first_token_mean_s: float
    first_token_p50_s: float
    first_token_p95_s: float
    first_token_worst_s: float
    background_s: float
    """Mean work after an answer."""
    busy: float
    """Share of the pauses after answers in which the machine works."""
    overrun: float
    """Share of the turns whose work after the answer is longer than the pause."""
    summaries: int
    kept: Kept
    reach: Reach | None

    @property
    def retention(self) -> float | None:
        """Share of facts and instructions that could still be read, over all points looked at."""
        return total(self.kept).value

    def to_json(self) -> dict[str, Any]:
        out = {name: getattr(self, name) for name in self.__slots__ if name not in _NESTED}
        out = {k: round(v, 4) if isinstance(v, float) else v for k, v in out.items()}
        out["retention"] = self.retention
        out["kept"] = {kind: [share.kept, share.of] for kind, share in self.kept.items()}
        if self.reach:
            reach = self.reach
            out["reach"] = self.reach.value
            out["reach_verbatim"], out["reach_covered"] = reach.verbatim, reach.covered
            out["questions"] = reach.of
        return out


_NESTED = ("kept", "reach")


def row(
    policy: str, chats: Sequence[Sequence[Turn]], speeds: Speeds, *, pause_s: float = PAUSE_S
) -> Row:
    """`chats` holds the turns of each. There must be a turn."""
    turns = [turn for chat in chats for turn in chat]
    firsts = [first_token_s(turn.chat, speeds) for turn in turns]
    after = [sum(background_s(w, speeds) for w in turn.background) for turn in turns]
    evaluated = [turn.chat.evaluated for turn in turns]
    reaches = [turn.reach for turn in turns if turn.reach]
    return Row(
        policy=policy,
        turns=len(turns),
        evaluated_mean=mean(evaluated),
        evaluated_p95=int(percentile(evaluated, 95)),
        background_mean=mean([sum(w.evaluated for w in turn.background) for turn in turns]),
        prompt_mean=mean([turn.chat.prompt_tokens for turn in turns]),
        first_token_mean_s=mean(firsts),
        first_token_p50_s=percentile(firsts, 50),
        first_token_p95_s=percentile(firsts, 95),
        first_token_worst_s=max(firsts, default=0.0),
        background_s=mean(after),
        busy=mean([min(1.0, s / pause_s) for s in after]),
        overrun=mean([float(s > pause_s) for s in after]),
        summaries=sum(turn.summaries for turn in turns),
        kept=together(turn.kept for turn in turns if turn.kept),
        reach=sum(reaches, Reach()) if reaches else None,
    )


def first_token_s(work: Work, speeds: Speeds) -> float:
    """As measured, else as the speeds say."""
    if work.seconds is not None:
        return work.seconds
    behind = work.prompt_tokens - work.evaluated
    return speeds.request_s + speeds.prefill(work.evaluated, behind=behind)


def background_s(work: Work, speeds: Speeds) -> float:
    if work.seconds is not None:
        return work.seconds
    written = speeds.decode(work.generated, behind=work.prompt_tokens)
    return first_token_s(work, speeds) + written


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is at least as large as `share` of 100 of them (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, ceil(len(ordered) * share / 100) - 1)] if ordered else 0.0


def best(rows: Sequence[Row]) -> frozenset[str]:
    """The policies that no other beats: none waits as little for the first token on average, works
    as little after answers and keeps as much, and is better in one of these."""
    return frozenset(r.policy for r in rows if not any(_beats(other, r) for other in rows))


def _beats(one: Row, other: Row) -> bool:
    ours, theirs = _merits(one), _merits(other)
    return ours != theirs and all(a >= b for a, b in zip(ours, theirs, strict=True))


def _merits(one: Row) -> tuple[float, float, float]:
    kept = round(one.retention or 0.0, 4)
    return -round(one.first_token_mean_s, 3), -round(one.background_s, 2), kept
