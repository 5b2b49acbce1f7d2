"""From an estimate of tokens to the server's own count, learned from what it reports: pure.

    prompt_tokens = rate * estimate + message * messages + base

The three are fitted by least squares to the newest answers, each weighted by its own size so that
errors are shares, and held by what is usual while there are few.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

ENOUGH = 3
"""Answers until the fit is believed."""
NEWEST = 32

# (usual, how far from it others are): tiktoken's cl100k against the vocabularies of Llama 2 and 3,
# Qwen2.5, Gemma, SmolLM2; ChatML, Llama 3 and Gemma templates.
RATE = (1.05, 0.15)
MESSAGE = (5.0, 2.0)
BASE = (3.0, 12.0)
NOISE = 0.005
"""How exact a sum over a whole prompt is at best, as a share of it."""

MARGIN_UNKNOWN = 0.15
MARGIN_KNOWN = 0.02


@dataclass(frozen=True, slots=True)
class Sample:
    """An estimate of texts, how many messages they were, and what the server counted."""

    estimate: int
    messages: int
    actual: int


class Calibration:
    """Holds the newest samples. Whoever adds one changes what `tokens` says from then on."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=NEWEST)
        self._answers = 0
        self._fit = (RATE[0], MESSAGE[0], BASE[0])

    def __repr__(self) -> str:
        rate, message, base = self._fit
        return f"<Calibration answers={self._answers} rate={rate:.3f} +{message:.1f} +{base:.1f}>"

    @property
    def answers(self) -> int:
        return self._answers

    @property
    def margin(self) -> float:
        """The share to add to a count so that it errs on the long side."""
        return MARGIN_KNOWN if self._answers >= ENOUGH else MARGIN_UNKNOWN

    def add(self, sample: Sample) -> None:
        if sample.estimate > 0 and sample.actual > 0:
            self._samples.append(sample)
            self._answers += 1
            self._fit = _solve(self._samples)

    def text(self, estimate: int) -> float:
        """Tokens of a text by itself, without the margin."""
        return self._fit[0] * estimate

    def prompt(self, estimate: int, *, messages: int) -> float:
        """Tokens of a prompt, without the margin."""
        rate, message, base = self._fit
        return rate * estimate + message * messages + base


def _solve(samples: deque[Sample]) -> tuple[float, float, float]:
    """Ridge regression in three unknowns: the normal equations, by Cramer's rule."""
    usual = (RATE, MESSAGE, BASE)
    a = [[0.0] * 3 for _ in range(3)]
    b = [0.0] * 3
    for i, (value, spread) in enumerate(usual):
        a[i][i] = 1 / spread**2
        b[i] = value / spread**2
    for sample in samples:
        row = (sample.estimate, sample.messages, float(sample.messages > 0))
        weight = 1 / (NOISE * sample.actual + 1) ** 2
        for i in range(3):
            b[i] += weight * row[i] * sample.actual
            for j in range(3):
                a[i][j] += weight * row[i] * row[j]
    whole = _determinant(a)
    replaced = [
        [[b[i] if j == k else a[i][j] for j in range(3)] for i in range(3)] for k in range(3)
    ]
    rate, message, base = (_determinant(m) / whole for m in replaced)
    return max(rate, 0.2), max(message, 0.0), max(base, 0.0)


def _determinant(m: list[list[float]]) -> float:
    return (
        m[0][0] * (m[1][1] * m[2][2] - m[1][2] * m[2][1])
        - m[0][1] * (m[1][0] * m[2][2] - m[1][2] * m[2][0])
        + m[0][2] * (m[1][0] * m[2][1] - m[1][1] * m[2][0])
    )
