"""Adds up what the scheduler does, from the events that it tells of anyway."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec.structs import replace

from proxy.engines.embedded.request import Request
from proxy.engines.embedded.totals import (
    BATCH_BUCKETS,
    QUEUE_BUCKETS_S,
    ClassTotals,
    Histogram,
    Totals,
)


class Trace(Protocol):
    """Told of everything that happens to a request, and of each batch with the requests in it."""

    def request(self, event: str, request: Request) -> None: ...
    def batch(self, requests: Sequence[Request], *, n_tokens: int) -> None: ...


class Tally:
    """A Trace that counts and passes on. `restored` says how many tokens came back from disk so
    far: they are put down to the request that is started next.
    """

    def __init__(self, trace: Trace, *, restored: Callable[[], int]) -> None:
        self._trace = trace
        self._restored = restored
        self._restored_before = 0
        self._batch: Sequence[Request] = ()
        self._asked: set[int] = set()
        self._totals = Totals()
        self._batch_counts = list(self._totals.batch_tokens.counts)
        self._batch_tokens = 0

    @property
    def totals(self) -> Totals:
        # Only when they are asked for: a batch of one token has no time for new structs.
        filled = Histogram(tuple(self._batch_counts), self._batch_tokens)
        return replace(self._totals, batch_tokens=filled)

    def request(self, event: str, request: Request) -> None:
        match event:
            case "request_started":
                self._started(request)
            case "request_done" | "request_cancelled" | "request_failed":
                self._ended(request)
            case "request_interrupted" if request is self._batch[0]:
                # Every request of the batch is told of; the batch is one.
                self._add(interrupted_batches=1)
            case "request_paused" | "request_requeued":
                self._add(preemptions=1)
            case "request_held_back":
                self._add(held_back=1)
        self._trace.request(event, request)

    def batch(self, requests: Sequence[Request], *, n_tokens: int) -> None:
        self._batch = requests
        self._batch_counts[bisect_left(BATCH_BUCKETS, n_tokens)] += 1
        self._batch_tokens += n_tokens
        self._trace.batch(requests, n_tokens=n_tokens)

    def _started(self, request: Request) -> None:
        new, self._restored_before = self._restored() - self._restored_before, self._restored()
        own = self._totals.classes[request.priority]
        queue_s = own.queue_s
        # Once each: not for further answers, nor when it had to go back to the queue.
        if not request.choice and request.id not in self._asked:
            self._asked.add(request.id)
            waited_s = request.began_at - request.arrived_at
            queue_s = queue_s.with_value(waited_s, QUEUE_BUCKETS_S)
        self._put(request, replace(own, restored=own.restored + new, queue_s=queue_s))

    def _ended(self, request: Request) -> None:
        self._asked.discard(request.id)
        own = self._totals.classes[request.priority]
        prefilled = bool(request.first_token_at) and not request.choice
        ended = replace(
            own,
            evaluated=own.evaluated + request.evaluated_prompt,
            cached=own.cached + (request.cached_tokens if prefilled else 0),
            generated=own.generated + request.n_generated,
        )
        self._put(request, ended)

    def _put(self, request: Request, own: ClassTotals) -> None:
        classes = list(self._totals.classes)
        classes[request.priority] = own
        self._totals = replace(self._totals, classes=tuple(classes))

    def _add(self, **numbers: int) -> None:
        grown = {name: getattr(self._totals, name) + n for name, n in numbers.items()}
        self._totals = replace(self._totals, **grown)
