"""Adds up what the scheduler does, from the events that it tells of anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec.structs import replace

from proxy.engines.embedded.request import Request
from proxy.engines.embedded.totals import (
    BATCH_BUCKETS,
    QUEUE_BUCKETS_S,
    ClassTotals,
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
        self.totals = Totals()

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
        filled = self.totals.batch_tokens.with_value(n_tokens, BATCH_BUCKETS)
        self.totals = replace(self.totals, batch_tokens=filled)
        self._trace.batch(requests, n_tokens=n_tokens)

    def _started(self, request: Request) -> None:
        new, self._restored_before = self._restored() - self._restored_before, self._restored()
        own = self.totals.classes[request.priority]
        queue_s = own.queue_s
        # Once each: not for further answers, nor when it had to go back to the queue.
        if not request.choice and request.id not in self._asked:
            self._asked.add(request.id)
            waited_s = request.began_at - request.arrived_at
            queue_s = queue_s.with_value(waited_s, QUEUE_BUCKETS_S)
        self._put(request, replace(own, restored=own.restored + new, queue_s=queue_s))

    def _ended(self, request: Request) -> None:
        self._asked.discard(request.id)
        own = self.totals.classes[request.priority]
        prefilled = bool(request.first_token_at) and not request.choice
        ended = replace(
            own,
            evaluated=own.evaluated + request.evaluated_prompt,
            cached=own.cached + (request.cached_tokens if prefilled else 0),
            generated=own.generated + len(request.generated),
        )
        self._put(request, ended)

    def _put(self, request: Request, own: ClassTotals) -> None:
        classes = list(self.totals.classes)
        classes[request.priority] = own
        self.totals = replace(self.totals, classes=tuple(classes))

    def _add(self, **numbers: int) -> None:
        grown = {name: getattr(self.totals, name) + n for name, n in numbers.items()}
        self.totals = replace(self.totals, **grown)
