"""Retention works by itself, only while idle, and outlives a store that cannot be written."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from memory.records import Node
from memory.store import Store, StoreUnavailable
from memory.transcript import ASSISTANT, USER, Message, chain
from proxy.app import create_app
from proxy.config import Config, RetentionConfig, load
from proxy.doctor import DATABASE, examine
from proxy.tuning.simulation import SimulatedEngine
from proxy.upkeep import DAY_S, Upkeep

BOUND_S = 60.0


async def forgets_nobody(owner: str) -> None:
    pass


async def store_with(
    path: Path, texts: list[str], *, clock_s: list[float], owner: str = "owner"
) -> Store:
    """One conversation of a turn for each text, each a day after the one before."""
    store = await Store.open(path, clock=lambda: clock_s[0])
    for text in texts:
        messages = [Message(USER, text), Message(ASSISTANT, f"about {text}")]
        digests = chain(messages)
        nodes = [
            Node(d, p, i, m.role, m.text, 1, "t")
            for i, (m, d, p) in enumerate(
                zip(messages, digests, (bytes(20), digests[0]), strict=True)
            )
        ]
        await store.append(owner, nodes, conversation=None)
        clock_s[0] += DAY_S
    return store


async def until(done: asyncio.Event) -> None:
    async with asyncio.timeout(BOUND_S):
        await done.wait()


def test_old_conversations_go_and_new_ones_stay(tmp_path: Path) -> None:
    async def run() -> int:
        store = await store_with(tmp_path / "s.db", ["one", "two", "three"], clock_s=[1e6])
        upkeep = Upkeep(
            store=store,
            retention=RetentionConfig(max_age_days=1.5),
            idle=lambda: True,
            forget=forgets_nobody,
        )
        assert await upkeep.prune() == 2
        left = (await store.status())["conversations"]
        await store.close()
        return int(left)

    assert asyncio.run(run()) == 1


def test_the_model_forgets_whose_conversations_go_and_nobody_else(tmp_path: Path) -> None:
    """Through the whole application: the limit stands in its configuration."""
    retention = RetentionConfig(max_age_days=1.5, every_s=0.01)

    async def run() -> list[str]:
        store = await store_with(tmp_path / DATABASE, ["one"], clock_s=[1e6])
        now = [time.time()]
        await store.close()
        store = await store_with(tmp_path / DATABASE, ["two"], clock_s=now, owner="other")
        await store.close()
        forgotten, told = list[str](), asyncio.Event()

        class Engine(SimulatedEngine):
            async def forget(self, owner: str) -> None:
                forgotten.append(owner)
                told.set()

        engine = Engine(1000, lambda context: "", lambda context: "")
        app = create_app(Config(data=tmp_path, retention=retention), engine=engine)
        async with app.router.lifespan_context(app):
            await until(told)
            assert (await app.state.store.status())["conversations"] == 1
        return forgotten

    assert asyncio.run(run()) == ["owner"]


def test_nothing_is_deleted_while_somebody_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.upkeep.LOOK_AGAIN_S", 0.01)

    async def run() -> None:
        store = await store_with(tmp_path / "s.db", ["one", "two"], clock_s=[1e6])
        asked, idle, pruned = asyncio.Event(), False, asyncio.Event()

        def is_idle() -> bool:
            asked.set()
            return idle

        class Watched(Upkeep):
            async def prune(self) -> int:
                n = await super().prune()
                pruned.set()
                return n

        upkeep = Watched(
            store=store,
            retention=RetentionConfig(max_conversations=1),
            idle=is_idle,
            forget=forgets_nobody,
        )
        upkeep.start()
        await until(asked)
        assert (await store.status())["conversations"] == 2
        idle = True
        await until(pruned)
        assert (await store.status())["conversations"] == 1
        await upkeep.stop()
        await store.close()

    asyncio.run(run())


def test_a_store_that_fails_does_not_end_the_upkeep(tmp_path: Path) -> None:
    async def run() -> None:
        store = await store_with(tmp_path / "s.db", ["one", "two"], clock_s=[1e6])
        tries, healed = 0, asyncio.Event()

        class Failing(Upkeep):
            async def prune(self) -> int:
                nonlocal tries
                tries += 1
                if tries == 1:
                    raise StoreUnavailable("the disk is full")
                n = await super().prune()
                healed.set()
                return n

        retention = RetentionConfig(max_conversations=1, every_s=0.01)
        upkeep = Failing(store=store, retention=retention, idle=lambda: True, forget=forgets_nobody)
        upkeep.start()
        await until(healed)
        await upkeep.stop()
        assert (await store.status())["conversations"] == 1
        await store.close()

    asyncio.run(run())


def test_without_limits_no_task_runs(tmp_path: Path) -> None:
    async def run() -> None:
        store = await store_with(tmp_path / "s.db", ["one"], clock_s=[1e6])
        before = asyncio.all_tasks()
        upkeep = Upkeep(
            store=store, retention=RetentionConfig(), idle=lambda: True, forget=forgets_nobody
        )
        upkeep.start()
        assert asyncio.all_tasks() == before
        await upkeep.stop()
        await store.close()

    asyncio.run(run())


def test_doctor_finds_a_damaged_database(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"no database at all" * 500)
    findings = list(examine(load({"data": str(tmp_path)}, environ={})))
    assert [f.subject for f in findings if f.trouble] == ["database"]


def test_doctor_finds_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    config = load(environ={"CHATFOLD_ENGINE_LORA": "none.gguf", "CHATFOLD_DATA": str(tmp_path)})
    (trouble,) = [f.trouble for f in examine(config) if f.trouble]
    assert trouble.startswith("engine.lora: the adapter none.gguf cannot be read: No such file")


def test_doctor_is_content_with_a_good_one(tmp_path: Path) -> None:
    async def run() -> None:
        store = await store_with(tmp_path / DATABASE, ["one"], clock_s=[1e6])
        await store.close()

    asyncio.run(run())
    findings = list(examine(load({"data": str(tmp_path)}, environ={})))
    assert not [f for f in findings if f.trouble]


def test_doctor_tells_of_a_file_that_was_set_aside(tmp_path: Path) -> None:
    (tmp_path / f"{DATABASE}.damaged-20260101T000000").write_bytes(b"x")
    findings = list(examine(load({"data": str(tmp_path)}, environ={})))
    assert any("set aside" in f.trouble for f in findings)
