"""Answers that stand still because others need their cells, and how long that may be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from test_engine import (
    ENDLESS,
    PATIENCE_S,
    EmbeddedEngine,
    Load,
    answer,
    ask,
    busy,
    load,
    replace_load,
    running,
    traced,
    until,
)

from proxy.bounds import within_bounds
from proxy.config import TimeoutsConfig
from proxy.engines.base import (
    Delta,
    EngineUnavailable,
    Event,
    Finished,
    Generate,
    QueueFull,
    Started,
    Waiting,
)

__all__ = ["load"]

SHORT = TimeoutsConfig(between_tokens_s=1.0)
OLD = ask("Tell me a story.", max_tokens=None, sampling=ENDLESS)
YOUNG = replace(OLD, owner="b", max_tokens=250)


def one_window(load: Load) -> Load:
    """Cells for one whole answer, or for half of each of two."""
    return replace_load(load, n_ctx=512, cache_tokens=512)


async def bounded(engine: EmbeddedEngine, request: Generate) -> list[Event]:
    async with engine.generate(request) as events:
        return [event async for event in within_bounds(events, SHORT)]


@pytest.mark.long
def test_an_answer_put_back_goes_on_however_long_a_token_may_take(load: Load) -> None:
    async def main() -> None:
        async with running(one_window(load)) as engine, asyncio.timeout(PATIENCE_S):
            old = asyncio.create_task(answer(engine, OLD))
            await until(lambda: busy(engine))
            events = await bounded(engine, YOUNG)
            assert old.done(), "it ran to its end meanwhile"
            await old
        assert isinstance(events[0], Started)
        assert all(isinstance(event, Delta) for event in events[1:-1])
        assert isinstance(events[-1], Finished)
        assert events[-1].completion_tokens == 250
        told = [t["event"] for t in traced(load) if t.get("request") == 2]
        assert told.index("request_requeued") > told.index("first_token")

    asyncio.run(main())


@pytest.mark.long
def test_who_is_put_back_for_too_long_is_told_so_and_the_engine_is_free(load: Load) -> None:
    async def main() -> None:
        async with running(one_window(load)) as engine, asyncio.timeout(PATIENCE_S):
            old = asyncio.create_task(answer(engine, OLD))
            await until(lambda: busy(engine))
            events: list[Event] = []
            with pytest.raises(QueueFull, match=r"waited for 0\.05 seconds"):
                async with engine.generate(YOUNG) as stream:
                    async for event in stream:
                        events.append(event)
                        # Only now: on a slow machine it may stand in line for longer.
                        engine._settings = replace(engine._settings, queue_s=0.05)
            assert isinstance(events[-1], Waiting)
            assert isinstance(events[-2], Delta)
            assert not old.done()
            await old
            await until(lambda: not busy(engine) and not busy(engine, waiting=True))

    asyncio.run(main())


# -- the bound alone -----------------------------------------------------------------------------

TIGHT = TimeoutsConfig(queue_s=PATIENCE_S, between_tokens_s=0.1)


async def telling(*events: Event) -> AsyncIterator[Event]:
    """They come at once, and after the last one three times as long as a token may take."""
    for event in events:
        yield event
    await asyncio.sleep(3 * TIGHT.between_tokens_s)


def seen(*events: Event) -> list[Event]:
    async def main() -> list[Event]:
        return [event async for event in within_bounds(telling(*events), TIGHT)]

    return asyncio.run(main())


def test_only_an_answer_that_waits_again_has_the_time_of_a_first_token() -> None:
    text = (Started(9, 0), Delta("a"))
    assert seen(*text, Waiting()) == list(text)
    with pytest.raises(EngineUnavailable, match=r"no token for 0\.1 seconds"):
        seen(*text, Waiting(), Delta("b"))
