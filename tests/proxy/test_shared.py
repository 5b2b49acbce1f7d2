"""Who repeats a request joins the one that runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import pytest

from proxy.shared import Joins


class Source:
    """Gives numbers, waiting before each for `go`; counts how often it began and how it ended."""

    def __init__(self, n: int, error: Exception | None = None) -> None:
        self.n = n
        self.error = error
        self.go = asyncio.Semaphore(0)
        self.given: list[int] = []
        self.begun = 0
        self.closed = 0

    async def __call__(self) -> AsyncGenerator[int, None]:
        self.begun += 1
        try:
            for i in range(self.n):
                await self.go.acquire()
                self.given.append(i)
                yield i
            if self.error:
                raise self.error
        finally:
            self.closed += 1

    def let(self, n: int) -> None:
        for _ in range(n):
            self.go.release()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


async def everything(joins: Joins[int], source: Source, key: str = "a") -> list[int]:
    async with aclosing(joins.read(key, source)) as items:
        return [item async for item in items]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def counted() -> tuple[Joins[int], list[None]]:
    joined: list[None] = []
    return Joins(lambda: joined.append(None)), joined


def test_a_twin_gets_everything_from_the_beginning_and_nothing_runs_twice() -> None:
    async def test() -> None:
        (joins, joined), source = counted(), Source(4)
        first = asyncio.create_task(everything(joins, source))
        source.let(2)
        await settle()
        second = asyncio.create_task(everything(joins, source))
        await settle()
        source.let(2)
        assert await first == await second == [0, 1, 2, 3]
        assert (source.begun, source.closed, len(joined), len(joins)) == (1, 1, 1, 0)

    run(test)


def test_without_a_key_nobody_joins_and_no_task_is_made() -> None:
    async def test() -> None:
        (joins, joined), source = counted(), Source(2)
        source.let(4)
        tasks = len(asyncio.all_tasks())
        for _ in range(2):
            async with aclosing(joins.read(None, source)) as items:
                assert await anext(items) == 0
                assert (len(joins), len(asyncio.all_tasks())) == (0, tasks)
        assert (source.begun, source.closed, joined) == (2, 2, [])

    run(test)


def test_other_keys_and_later_requests_run_by_themselves() -> None:
    async def test() -> None:
        (joins, joined), source = counted(), Source(2)
        source.let(6)
        for key in ("a", "a", "b"):
            assert await everything(joins, source, key) == [0, 1]
        assert (source.begun, source.closed, joined) == (3, 3, [])

    run(test)


def test_the_first_may_leave_and_the_second_gets_it_all() -> None:
    async def test() -> None:
        (joins, _), source = counted(), Source(3)
        first = asyncio.create_task(everything(joins, source))
        source.let(1)
        await settle()
        second = asyncio.create_task(everything(joins, source))
        await settle()
        first.cancel()
        await settle()
        assert source.closed == 0
        source.let(2)
        assert await second == [0, 1, 2]
        assert (source.begun, source.closed) == (1, 1)

    run(test)


def test_when_the_last_one_leaves_the_source_is_closed_before_its_reader_has_ended() -> None:
    async def test() -> None:
        (joins, _), source = counted(), Source(3)
        readers = [asyncio.create_task(everything(joins, source)) for _ in range(2)]
        source.let(1)
        await settle()
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
        assert (source.closed, len(joins)) == (1, 0)

    run(test)


def test_a_slow_reader_slows_the_source() -> None:
    async def test() -> None:
        (joins, _), source = counted(), Source(5)
        source.let(5)
        async with aclosing(joins.read("a", source)) as items:
            assert await anext(items) == 0
            await settle()
            assert source.given == [0]
            assert await anext(items) == 1
            await settle()
            assert source.given == [0, 1]

    run(test)


def test_a_failure_reaches_every_reader() -> None:
    async def test() -> None:
        (joins, _), source = counted(), Source(1, ZeroDivisionError("lamp"))
        readers = [asyncio.create_task(everything(joins, source)) for _ in range(2)]
        await settle()
        source.let(1)
        for reader in readers:
            with pytest.raises(ZeroDivisionError):
                await reader
        assert (source.begun, source.closed, len(joins)) == (1, 1, 0)

    run(test)
