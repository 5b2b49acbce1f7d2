"""One run of `chatfold tune`: chats times policies, with or without the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from memory.policy import Policy
from proxy.config import Config
from proxy.engines.base import Engine
from proxy.tuning import calibration, models
from proxy.tuning.chats import Chat
from proxy.tuning.measures import Row, row
from proxy.tuning.planning import planned
from proxy.tuning.progress import measured
from proxy.tuning.replay import Aim, Setting, Turn
from proxy.tuning.simulation import Vocabulary
from proxy.tuning.speeds import Speeds

AT_ONCE = 4
"""Replays side by side without a model: each waits half of its time for the disk and for threads.
"""

Tell = Callable[[int], object]
"""Gets how many more turns are over."""


@dataclass(frozen=True, slots=True)
class Run:
    """What does not change from policy to policy."""

    aims: tuple[Aim, ...]
    setting: Setting
    speeds: Speeds
    pause_s: float

    @classmethod
    def of(cls, chats: Sequence[Chat], setting: Setting, speeds: Speeds, *, pause_s: float) -> Run:
        return cls(tuple(map(Aim.of, chats)), setting, speeds, pause_s)

    @property
    def turns(self) -> int:
        """Of one policy."""
        return sum(len(aim.chat.exchanges) for aim in self.aims)

    def row(self, policy: Policy, chats: Sequence[Sequence[Turn]]) -> Row:
        return row(policy.name, chats, self.speeds, pause_s=self.pause_s)


async def plan(
    run: Run, policies: Sequence[Policy], vocabulary: Vocabulary, *, tell: Tell
) -> list[Row]:
    """A row for each policy, without a model. Raises what the first replay that fails raises."""
    turnstile = asyncio.Semaphore(AT_ONCE)

    async def one(aim: Aim, policy: Policy) -> list[Turn]:
        async with turnstile:
            return await planned(aim, policy, vocabulary, run.setting, progress=lambda: tell(1))

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                [group.create_task(one(aim, policy)) for aim in run.aims] for policy in policies
            ]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    return [
        run.row(policy, [task.result() for task in of_policy])
        for policy, of_policy in zip(policies, tasks, strict=True)
    ]


async def measure(
    run: Run, policies: Sequence[Policy], engine: Engine, *, directory: Path, tell: Tell
) -> list[Row]:
    """A row for each policy, with the model, one replay after the other."""
    rows = []
    for policy in policies:
        chats = [
            await measured(aim, policy, engine, run.setting, directory=directory, tell=tell)
            for aim in run.aims
        ]
        rows.append(run.row(policy, chats))
    return rows


@asynccontextmanager
async def started(config: Config, *, directory: Path) -> AsyncIterator[Engine]:
    """The model, loaded; it ends with the block. Raises EngineError."""
    engine = models.engine(config, directory=directory)
    try:
        await engine.start()
        await engine.model()
        yield engine
    finally:
        await engine.stop()


async def speeds_of(
    config: Config, *, directory: Path, engine: Engine | None = None, anew: bool = False
) -> tuple[Speeds, str]:
    """What was measured here before, or else is measured now; and where it comes from. Raises
    EngineError, OSError, ConfigError."""
    file, key = calibration.default_file(), calibration.key(config)
    found = None if anew else calibration.known(key, file=file)
    if found:
        return found, "an earlier measurement on this machine"
    if engine is not None:
        speeds = await calibration.calibrate(engine)
    else:
        async with started(config, directory=directory) as own:
            speeds = await calibration.calibrate(own)
    calibration.keep(key, speeds, file=file)
    return speeds, "a measurement on this machine"
