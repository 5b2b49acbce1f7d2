"""What the engine has done so far, in numbers that only grow. They cross the pipe, and those of
processes that died are added up.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import msgspec

N_CLASSES = 3

QUEUE_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
BATCH_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)

Numbers = tuple[float, ...]


class Histogram(msgspec.Struct, frozen=True):
    """`counts[i]` values were at most the i-th bound and over the one before; the last count is of
    those over all bounds. `total` is their sum.
    """

    counts: tuple[int, ...]
    total: float = 0.0

    def with_value(self, value: float, bounds: Numbers) -> Histogram:
        at = bisect_left(bounds, value)
        counts = tuple(n + (i == at) for i, n in enumerate(self.counts))
        return Histogram(counts, self.total + value)

    def __add__(self, other: Histogram) -> Histogram:
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Histogram(counts, self.total + other.total)


def empty(bounds: Numbers) -> Histogram:
    return Histogram((0,) * (len(bounds) + 1))


class ClassTotals(msgspec.Struct, frozen=True):
    """Tokens and waits of one class of requests. A request's tokens count when it ends, however it
    ends; those it evaluated twice count twice.
    """

    evaluated: int = 0
    cached: int = 0
    generated: int = 0
    restored: int = 0
    queue_s: Histogram = empty(QUEUE_BUCKETS_S)

    def __add__(self, other: ClassTotals) -> ClassTotals:
        return ClassTotals(
            self.evaluated + other.evaluated,
            self.cached + other.cached,
            self.generated + other.generated,
            self.restored + other.restored,
            self.queue_s + other.queue_s,
        )


class Totals(msgspec.Struct, frozen=True):
    """`classes` in the order of their priority. `batch_tokens` is how full the batches were."""

    classes: tuple[ClassTotals, ...] = (ClassTotals(),) * N_CLASSES
    batch_tokens: Histogram = empty(BATCH_BUCKETS)
    interrupted_batches: int = 0
    preemptions: int = 0
    held_back: int = 0

    def __add__(self, other: Totals) -> Totals:
        pairs = zip(self.classes, other.classes, strict=True)
        return Totals(
            tuple(a + b for a, b in pairs),
            self.batch_tokens + other.batch_tokens,
            self.interrupted_batches + other.interrupted_batches,
            self.preemptions + other.preemptions,
            self.held_back + other.held_back,
        )


def to_json(totals: Totals, classes: Sequence[str]) -> dict[str, Any]:
    """As it stands in /api/status; `classes` are the names of the classes."""
    named = dict(zip(classes, totals.classes, strict=True))
    return {
        "interrupted_batches": totals.interrupted_batches,
        "held_back": totals.held_back,
        "tokens": {
            kind: {cls: getattr(own, kind) for cls, own in named.items()}
            for kind in ("evaluated", "cached", "generated", "restored")
        },
        "queue_seconds": {
            cls: _histogram(own.queue_s, QUEUE_BUCKETS_S) for cls, own in named.items()
        },
        "batch_tokens": _histogram(totals.batch_tokens, BATCH_BUCKETS),
    }


def _histogram(histogram: Histogram, bounds: Numbers) -> dict[str, Any]:
    return {"bounds": bounds, "counts": histogram.counts, "sum": histogram.total}
