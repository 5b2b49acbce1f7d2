"""What an owner forgets is gone from memory and disk, whatever the model process does meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.engines.embedded import engine as module
from proxy.engines.embedded.protocol import Load
from proxy.engines.embedded.snapshots import Snapshots
from tests.engine.test_engine import (
    answer,
    ask,
    busy,
    load,
    long_text,
    replace_load,
    running,
    until,
)

__all__ = ["load"]

pytestmark = pytest.mark.slow

CHAT = long_text(300)


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    return tmp_path / "snapshots"


@pytest.fixture
def keeping(load: Load, shelf: Path) -> Load:
    return replace_load(load, snapshots=str(shelf))


def files(folder: Path) -> list[Path]:
    return list(folder.glob("*/*"))


def fails(path: Path, owner: str) -> None:
    raise OSError(30, "Read-only file system", str(path))


async def remembered(load: Load) -> None:
    """The owner's chat is on disk, and no process lives."""
    async with running(load) as engine:
        await answer(engine, ask(CHAT))


@pytest.mark.parametrize("forget_files", [module.forget_files, fails])
def test_a_process_that_dies_before_it_forgets_leaves_nothing_to_the_next(
    keeping: Load,
    shelf: Path,
    monkeypatch: pytest.MonkeyPatch,
    forget_files: Callable[[Path, str], None],
) -> None:
    async def main() -> None:
        await remembered(keeping)
        assert files(shelf)
        monkeypatch.setattr(module, "forget_files", forget_files)
        async with running(keeping) as engine:
            await engine.model()
            pid = engine.status()["pid"]
            os.kill(pid, signal.SIGSTOP)
            await engine.forget("a")
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not engine.ready())
            _, end = await answer(engine, ask(CHAT))
            assert end.cached_tokens == 0
            await until(lambda: not engine._forgotten)
        assert len(files(shelf)) == 1, "what was asked since is all there is"

    asyncio.run(main())


def test_files_go_though_no_process_can_be_had(
    keeping: Load, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner in "ab":
        held = Snapshots(shelf, fingerprint="any", budget_bytes=1 << 20)
        held.save(owner, [1, 2, 3], b"state")
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")

    async def main() -> None:
        async with running(keeping) as engine:
            await until(lambda: engine.status()["trouble"])
            await engine.forget("a")
            assert len(files(shelf)) == 1

    asyncio.run(main())


def test_files_go_at_the_latest_when_the_engine_stops(
    keeping: Load, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        await remembered(keeping)
        monkeypatch.setattr(module, "TERMINATE_S", 0.05)
        async with running(keeping) as engine:
            await engine.model()
            pid = engine.status()["pid"]
            os.kill(pid, signal.SIGSTOP)
            await engine.forget("a")
        assert not files(shelf)

    asyncio.run(main())


def test_a_request_that_waited_when_its_owner_was_forgotten_leaves_nothing_in_the_next_process(
    keeping: Load,
) -> None:
    async def main() -> None:
        async with running(replace_load(keeping, sequences=1)) as engine:
            ran = asyncio.create_task(answer(engine, replace(ask(long_text(600)), owner="b")))
            await until(lambda: busy(engine))
            waited = asyncio.create_task(answer(engine, ask(CHAT)))
            await until(lambda: busy(engine, waiting=True))
            os.kill(engine.status()["pid"], signal.SIGKILL)
            await engine.forget("a")
            await asyncio.wait([ran])
            assert ran.exception()
            await waited
            _, again = await answer(engine, ask(CHAT))
            assert again.cached_tokens == 0
            assert (await answer(engine, ask(CHAT)))[1].cached_tokens == again.prompt_tokens - 1

    asyncio.run(main())


def test_an_answer_at_hand_when_its_owner_is_forgotten_is_in_no_snapshot(
    keeping: Load, shelf: Path
) -> None:
    async def main() -> None:
        async with running(keeping) as engine:
            await answer(engine, ask(CHAT))
            at_hand = asyncio.create_task(answer(engine, ask(CHAT + " again", max_tokens=60)))
            await until(lambda: busy(engine))
            await engine.forget("a")
            assert (await at_hand)[1].completion_tokens
        assert not files(shelf)

    asyncio.run(main())


def test_without_a_budget_for_snapshots_those_of_before_are_removed(
    keeping: Load, shelf: Path
) -> None:
    async def main() -> None:
        await remembered(keeping)
        assert files(shelf)
        async with running(replace_load(keeping, snapshot_bytes=0)) as engine:
            _, end = await answer(engine, ask(CHAT))
            assert end.cached_tokens == 0
            assert not files(shelf)
        assert not files(shelf)

    asyncio.run(main())
