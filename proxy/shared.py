"""One answer for requests that are the same: who repeats a request joins the one that runs.

Clients that lose patience or the connection send the same again while the first is still at work;
evaluated twice, both would take twice as long, and the next repetition would be on its way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Hashable
from contextlib import aclosing
from typing import Generic, TypeVar

import anyio

T = TypeVar("T")


class Shared(Generic[T]):
    """The items of one source, read by several. Owns the task that reads the source.

    The source is read as fast as the fastest reader takes its items; who comes later gets all of
    them from the first one. When the last reader leaves, the source is cancelled and closed.
    """

    def __init__(self, source: AsyncGenerator[T, None]) -> None:
        self._items: list[T] = []
        self._readers = 0
        self._over = False
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._wanted = asyncio.Event()
        self._task = asyncio.create_task(self._take(source), name="shared-answer")

    def __repr__(self) -> str:
        return f"<Shared items={len(self._items)} readers={self._readers} over={self._over}>"

    @property
    def is_over(self) -> bool:
        return self._over

    async def read(self) -> AsyncGenerator[T, None]:
        """All items. Raises what the source raised."""
        self._readers += 1
        try:
            position = 0
            while True:
                while position < len(self._items):
                    yield self._items[position]
                    position += 1
                if self._over:
                    break
                self._wanted.set()
                await self._news.wait()
        finally:
            self._readers -= 1
            if not self._readers:
                await self._end()
        if self._error:
            raise self._error

    async def _take(self, source: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(source):
                async for item in source:
                    self._wanted.clear()
                    self._items.append(item)
                    self._tell()
                    await self._wanted.wait()
        except Exception as exc:
            # Raised where it is read, for every reader.
            self._error = exc
        finally:
            self._over = True
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _end(self) -> None:
        self._over = True
        self._task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([self._task])


class Joins(Generic[T]):
    """The shared answers that are under way, by key. A key must name the owner."""

    def __init__(self, joined: Callable[[], None]) -> None:
        """`joined` is called for each request that finds its twin."""
        self._running: dict[Hashable, Shared[T]] = {}
        self._joined = joined

    def __len__(self) -> int:
        return len(self._running)

    def read(
        self, key: Hashable | None, start: Callable[[], AsyncGenerator[T, None]]
    ) -> AsyncGenerator[T, None]:
        """The items of `start()`, or of the one that runs under this key already. Without a key
        nobody can join: the reader runs it itself, with no task in between."""
        return start() if key is None else self._shared(key, start)

    async def _shared(
        self, key: Hashable, start: Callable[[], AsyncGenerator[T, None]]
    ) -> AsyncGenerator[T, None]:
        shared = self._running.get(key)
        if shared and not shared.is_over:
            self._joined()
        else:
            shared = self._running[key] = Shared(start())
        try:
            async with aclosing(shared.read()) as items:
                async for item in items:
                    yield item
        finally:
            if shared.is_over and self._running.get(key) is shared:
                del self._running[key]
