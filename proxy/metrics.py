"""Numbers for Prometheus. Each `Metrics` has a registry of its own: nothing is global."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST

CHAT = "chat"
SIDE = "side"
BACKGROUND = "background"
EMBEDDINGS = "embeddings"
"""The classes of work that tokens are counted for."""

WAIT_BUCKETS_S = (
    0.01,
    0.03,
    0.1,
    0.2,
    0.3,
    0.5,
    0.75,
    1,
    1.5,
    2,
    3,
    5,
    8,
    13,
    21,
    34,
    60,
    120,
    300,
)


class Metrics:
    """What the proxy counts. Labels take few values: never a path, a user or a text."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(namespace="chatfold", registry=self.registry)
        self._requests = self._counter("requests", "Requests answered.", "route", "status")
        self._evaluated = self._counter(
            "tokens_evaluated", "Prompt tokens that the model had to evaluate.", "work"
        )
        self._cached = self._counter(
            "tokens_cached", "Prompt tokens that were in the KV cache already.", "work"
        )
        self._generated = self._counter("tokens_generated", "Tokens generated.", "work")
        self._summaries = self._counter("summaries", "Summaries made.", "made_by")
        self._side_requests = self._counter(
            "side_requests", "Titles and other requests that belong to no chat.", "kind"
        )
        self._joined = self._counter(
            "requests_joined", "Requests that found the same one under way and shared its answer."
        )
        self._errors = self._counter("errors", "Failures, by the name of their class.", "kind")
        self._degraded = self._counter(
            "memory_degraded", "Requests answered while memory could not be read or written."
        )
        self._first_token = self._histogram(
            "first_token_seconds", "From a chat request's arrival to its first token."
        )
        self._embeddings = self._histogram(
            "embeddings_seconds", "From the arrival of a request for embeddings to its vectors."
        )
        self._queue = self._histogram(
            "queue_seconds", "Time that chat requests waited in the queue."
        )

    def request(self, route: str, status: int) -> None:
        """`route` is the route's template or name, not the path that was asked for."""
        self._requests.labels(route, str(status)).inc()

    def tokens(self, work: str, *, prompt: int, cached: int, generated: int) -> None:
        """`work` is one of the four above; `cached` of the `prompt` tokens cost nothing."""
        self._evaluated.labels(work).inc(max(0, prompt - cached))
        self._cached.labels(work).inc(cached)
        self._generated.labels(work).inc(generated)

    def joined(self) -> None:
        self._joined.inc()

    def side_request(self, kind: str) -> None:
        self._side_requests.labels(kind).inc()

    def summary(self, made_by: str) -> None:
        self._summaries.labels(made_by).inc()

    def error(self, kind: str) -> None:
        self._errors.labels(kind).inc()

    def memory_degraded(self) -> None:
        self._degraded.inc()

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def embedded(self, seconds: float, *, prompt: int) -> None:
        self._embeddings.observe(seconds)
        self.tokens(EMBEDDINGS, prompt=prompt, cached=0, generated=0)

    def queued(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def gauge(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """Adds the gauge `chatfold_NAME`. `read` is called at each scrape and must not block."""
        gauge = Gauge(f"chatfold_{name}", documentation, registry=self.registry)
        gauge.set_function(read)

    def render(self) -> bytes:
        """The text for GET /metrics, of type CONTENT_TYPE."""
        return generate_latest(self.registry)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"chatfold_{name}", documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str) -> Histogram:
        return Histogram(
            f"chatfold_{name}", documentation, buckets=WAIT_BUCKETS_S, registry=self.registry
        )
