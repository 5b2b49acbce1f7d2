"""What /metrics says of an engine, and that docs/metrics.md knows all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from proxy.engine_metrics import EngineCollector
from proxy.engines.embedded.engine import EmbeddedEngine, EmbeddedSettings
from proxy.engines.embedded.protocol import Load
from proxy.engines.embedded.totals import (
    BATCH_BUCKETS,
    QUEUE_BUCKETS_S,
    ClassTotals,
    Histogram,
    Totals,
    empty,
    to_json,
)
from proxy.metrics import Metrics

DOCUMENTATION = Path(__file__).parents[2] / "docs/metrics.md"
CLASSES = ("chat", "side", "background")


def scrape(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {(s.name, *s.labels.values()): s.value for f in families for s in f.samples}


def of(status: dict[str, Any]) -> dict[tuple[str, ...], float]:
    registry = CollectorRegistry()
    registry.register(EngineCollector(lambda: status))
    return scrape(registry)


def test_an_engines_status_becomes_metrics_by_class() -> None:
    queue = empty(QUEUE_BUCKETS_S).with_value(0.2, QUEUE_BUCKETS_S)
    batches = empty(BATCH_BUCKETS).with_value(3, BATCH_BUCKETS).with_value(900, BATCH_BUCKETS)
    chat = ClassTotals(evaluated=10, cached=90, generated=5, restored=7, queue_s=queue)
    totals = Totals((chat, ClassTotals(), ClassTotals()), batches, interrupted_batches=2)
    status = {
        "cells_used": 40,
        "restarts": 3,
        "running": {"chat": 2, "side": 0, "background": 1},
        "totals": to_json(totals, CLASSES),
    }
    found = of(status)
    assert found["chatfold_engine_cells_used",] == 40
    assert found["chatfold_engine_restarts_total",] == 3
    assert found["chatfold_engine_running", "background"] == 1
    assert found["chatfold_engine_tokens_evaluated_total", "chat"] == 10
    assert found["chatfold_engine_tokens_cached_total", "chat"] == 90
    assert found["chatfold_engine_tokens_generated_total", "side"] == 0
    assert found["chatfold_engine_tokens_restored_total", "chat"] == 7
    assert found["chatfold_engine_interrupted_batches_total",] == 2
    assert found["chatfold_engine_queue_seconds_bucket", "chat", "0.1"] == 0
    assert found["chatfold_engine_queue_seconds_bucket", "chat", "0.3"] == 1
    assert found["chatfold_engine_queue_seconds_count", "chat"] == 1
    assert found["chatfold_engine_queue_seconds_sum", "chat"] == 0.2
    assert found["chatfold_engine_batch_tokens_bucket", "4.0"] == 1
    assert found["chatfold_engine_batch_tokens_bucket", "512.0"] == 1
    assert found["chatfold_engine_batch_tokens_bucket", "+Inf"] == 2
    assert found["chatfold_engine_batch_tokens_sum",] == 903


def test_an_engine_that_tells_little_has_few_metrics() -> None:
    assert of({"kind": "remote", "ready": True}) == {}


def test_totals_add_up_field_by_field() -> None:
    one = Totals((ClassTotals(1, 2, 3, 4), ClassTotals(), ClassTotals(9)), preemptions=5)
    two = one + one
    assert (two.classes[0].cached, two.classes[2].evaluated, two.preemptions) == (4, 18, 10)
    assert one + Totals() == one
    value = Histogram((0, 1), 2.0) + Histogram((1, 1), 0.5)
    assert value == Histogram((1, 2), 2.5)


def test_every_metric_is_documented() -> None:
    documented, metrics = DOCUMENTATION.read_text(), Metrics()
    engine = EmbeddedEngine(EmbeddedSettings(Load(path="none")))
    metrics.registry.register(EngineCollector(engine.status))
    for family in metrics.registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert f"`{name}" in documented, name
