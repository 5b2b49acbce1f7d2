"""What waits for the thread that owns the model."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from proxy.engines.embedded.embedding import Job
from proxy.engines.embedded.llama import Llama
from proxy.engines.embedded.protocol import Cancel, Forget, Read
from proxy.engines.embedded.request import Request


@dataclass(frozen=True, slots=True)
class Glance:
    """A question after the cache: nothing stops for it."""

    id: int
    owner: str
    tokens: list[int]


class End:
    """The parent has gone, or wants the process to end."""


Item = Request | Job | Cancel | Read | Forget | Glance | End


class Inbox:
    """Commands on their way to the engine thread, and what that thread is doing meanwhile."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self._items: deque[Item] = deque()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._batch: tuple[int, frozenset[int]] | None = None
        self.steps = 0
        """How often the engine thread has come by here: it grows as long as that thread lives."""
        self.idle = False

    def put(self, item: Item) -> None:
        with self._lock:
            self._items.append(item)
            if self._must_interrupt(item):
                self._llama.abort.set()
            self._changed.notify()

    def take(self, *, wait_s: float) -> list[Item]:
        with self._lock:
            self.steps += 1
            self._batch = None
            if wait_s and not self._items:
                self.idle = True
                self._changed.wait(wait_s)
                self.idle = False
            items = list(self._items)
            self._items.clear()
            return items

    def enter(self, priority: int, requests: Sequence[int]) -> bool:
        """The engine thread is about to evaluate this batch; false if there is news to read first.

        What arrives after this finds the batch here, until the next `take`, and can raise the
        flag: none slips through. A flag that comes too late is taken down before the next batch.
        """
        with self._lock:
            self.steps += 1
            self._llama.abort.clear()
            self._batch = (priority, frozenset(requests)) if not self._items else None
            return self._batch is not None

    def _must_interrupt(self, item: Item) -> bool:
        if self._batch is None or isinstance(item, Forget | Glance):
            return False
        if isinstance(item, End):
            return True
        priority, requests = self._batch
        if isinstance(item, Cancel):
            return requests == {item.id}
        if isinstance(item, Job):
            return False
        return item.priority < priority
