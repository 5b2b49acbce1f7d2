"""How far a background prompt is, told while it is evaluated."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from test_engine import PATIENCE_S, Load, ask, load, running

from proxy.engines.base import Event, Finished, Priority, Reading, Started

__all__ = ["load"]

LONG = " ".join(f"The train number {i} leaves from track {i}." for i in range(40))


def test_only_who_asks_for_it_is_told_how_far_the_prompt_is(load: Load) -> None:
    async def main() -> None:
        request = ask(LONG, priority=Priority.BACKGROUND)
        async with running(load) as engine, asyncio.timeout(PATIENCE_S):
            told: list[list[Event]] = []
            for asked in (replace(request, tells_progress=True), replace(request, owner="b")):
                async with engine.generate(asked) as events:
                    told.append([event async for event in events])
        reading = [e for e in told[0] if isinstance(e, Reading)]
        started = next(e for e in told[0] if isinstance(e, Started))
        assert reading and told[0][: len(reading)] == reading
        assert all(0 < e.done < e.of == started.prompt_tokens for e in reading)
        assert [e.done for e in reading] == sorted({e.done for e in reading})
        assert isinstance(told[1][0], Started) and isinstance(told[1][-1], Finished)

    asyncio.run(main())
