"""What the model process tells of its cache."""

from __future__ import annotations

import asyncio
from pathlib import Path

from msgspec.structs import replace
from test_engine import PATIENCE_S, Load, answer, ask, context, load, running

from proxy.engines.base import Generate, Priority, Warmth

__all__ = ["load"]

LONG = " ".join(f"The ferry number {i} leaves from pier {i}." for i in range(30))


def test_what_is_warm_is_told_to_its_owner_and_after_a_restart_from_disk(
    load: Load, tmp_path: Path
) -> None:
    asyncio.run(_told(replace(load, snapshots=str(tmp_path / "snapshots"))))


async def _told(load: Load) -> None:
    asked = context(LONG)
    warm = Generate("a", asked, Priority.BACKGROUND, max_tokens=0)
    async with running(load) as engine, asyncio.timeout(PATIENCE_S):
        cold = await engine.warmth("a", asked)
        assert (cold.in_memory, cold.on_disk) == (0, 0) and cold.of > 128
        async with engine.generate(warm) as events:
            async for _ in events:
                pass
        assert await engine.warmth("a", asked) == Warmth(cold.of, cold.of, 0)
        assert (await engine.warmth("b", asked)).in_memory == 0
        # A question changes nothing, and half of a prompt is told as such.
        longer = await engine.warmth("a", context(LONG, "Good.", LONG))
        assert cold.of - 4 <= longer.in_memory <= cold.of < longer.of
        _, finished = await answer(engine, ask(LONG))
        assert finished.cached_tokens >= cold.of - 1
    async with running(load) as engine, asyncio.timeout(PATIENCE_S):
        kept = await engine.warmth("a", asked)
        assert kept == Warmth(cold.of, 0, cold.of)
        await engine.forget("a")
        assert await engine.warmth("a", asked) == cold
