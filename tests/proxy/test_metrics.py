"""What /metrics says."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from proxy.metrics import BACKGROUND, CHAT, Metrics


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, *s.labels.values()): s.value for f in families for s in f.samples}


def test_everything_counted_is_rendered() -> None:
    metrics = Metrics()
    metrics.request("/v1/chat/completions", 200)
    metrics.tokens(CHAT, prompt=100, cached=90, generated=5)
    metrics.tokens(BACKGROUND, prompt=10, cached=0, generated=1)
    metrics.embedded(0.5, prompt=7)
    metrics.summary("model")
    metrics.error("QueueFull")
    metrics.memory_degraded()
    metrics.first_token(0.2)
    metrics.queued(0.1)
    metrics.gauge("waiting", "Requests that wait.", lambda: 7)
    found = samples(metrics)
    assert found["chatfold_requests_total", "/v1/chat/completions", "200"] == 1
    assert found["chatfold_tokens_evaluated_total", "chat"] == 10
    assert found["chatfold_tokens_cached_total", "chat"] == 90
    assert found["chatfold_tokens_generated_total", "background"] == 1
    assert found["chatfold_tokens_evaluated_total", "embeddings"] == 7
    assert found["chatfold_embeddings_seconds_sum",] == 0.5
    assert found["chatfold_summaries_total", "model"] == 1
    assert found["chatfold_errors_total", "QueueFull"] == 1
    assert found["chatfold_memory_degraded_total",] == 1
    assert found["chatfold_first_token_seconds_count",] == 1
    assert found["chatfold_queue_seconds_sum",] == 0.1
    assert found["chatfold_waiting",] == 7


def test_two_of_them_share_nothing() -> None:
    first, second = Metrics(), Metrics()
    first.memory_degraded()
    assert samples(second)["chatfold_memory_degraded_total",] == 0
