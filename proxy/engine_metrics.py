"""An engine's own numbers for /metrics, read from its status at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

Status = Mapping[str, Any]

GAUGES = {
    "sequences_used": "Sequences of the KV cache that hold something.",
    "cells_used": "Cells of the KV cache that hold a token.",
    "cells": "Cells of the KV cache.",
    "snapshots": "Snapshots of sequences on disk.",
    "snapshot_bytes": "Their size on disk.",
    "checkpoints": "Places in prompts that can be gone back to, for models that need them.",
    "checkpoint_bytes": "Their size in memory.",
    "memory_bytes": "Resident memory of the model process.",
}
BY_CLASS = {
    "running": "Requests in the engine's batches.",
    "waiting": "Requests in the engine's queue.",
}
COUNTERS = {
    "restarts": "Times that the model process was started again.",
    "checkpoint_hits": "Times that a prompt went on from a checkpoint.",
    "preemptions": "Times that a request gave way or gave its cells up.",
}
TOTALS = {
    "interrupted_batches": "Batches that were ended for a request of a better class, or a cancel.",
    "held_back": "Times that a request was left out because its reader did not keep up.",
}
TOKENS = {
    "evaluated": "Prompt tokens that the model evaluated, also for requests that were cancelled.",
    "cached": "Prompt tokens that were in the KV cache.",
    "generated": "Tokens that the model generated.",
    "restored": "Tokens that came back from snapshots on disk.",
}


class EngineCollector(Collector):
    """Families named `chatfold_engine_...`. What an engine's status does not hold is left out:
    remote engines know little of this.
    """

    def __init__(self, status: Callable[[], Status]) -> None:
        """`status` is called at each scrape and must not block."""
        self._status = status

    def describe(self) -> Iterator[Metric]:
        # Names only, so that registering asks nobody.
        yield from ()

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        for name, text in GAUGES.items():
            if name in status:
                yield GaugeMetricFamily(_name(name), text, value=status[name])
        for name, text in BY_CLASS.items():
            if name in status:
                yield _by_class(
                    GaugeMetricFamily(_name(name), text, labels=["class"]), status[name]
                )
        for name, text in COUNTERS.items():
            if name in status:
                yield CounterMetricFamily(_name(name), text, value=status[name])
        if "totals" in status:
            yield from _totals(status["totals"])


def _totals(totals: Status) -> Iterator[Metric]:
    for name, text in TOTALS.items():
        yield CounterMetricFamily(_name(name), text, value=totals[name])
    for name, text in TOKENS.items():
        family = CounterMetricFamily(_name(f"tokens_{name}"), text, labels=["class"])
        yield _by_class(family, totals["tokens"][name])
    text = "Time in the engine's queue, from arrival to the first evaluation."
    queue = HistogramMetricFamily(_name("queue_seconds"), text, labels=["class"])
    for cls, value in totals["queue_seconds"].items():
        queue.add_metric([cls], _buckets(value), value["sum"])
    yield queue
    batches = totals["batch_tokens"]
    text = "How many tokens a batch held."
    yield HistogramMetricFamily(
        _name("batch_tokens"), text, buckets=_buckets(batches), sum_value=batches["sum"]
    )


def _by_class(family: Any, values: Mapping[str, float]) -> Metric:
    for cls, value in values.items():
        family.add_metric([cls], value)
    metric: Metric = family
    return metric


def _buckets(histogram: Status) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus wants them."""
    found, so_far = [], 0
    for bound, n in zip([*map(str, histogram["bounds"]), "+Inf"], histogram["counts"], strict=True):
        so_far += n
        found.append((bound, float(so_far)))
    return found


def _name(name: str) -> str:
    return f"chatfold_engine_{name}"
