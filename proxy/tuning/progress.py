"""What a run with the model has done so far, in files, so that it can go on after an interruption.

DIRECTORY/NAME.jsonl     figures of the turns that are over, a line each: no text of anybody's
DIRECTORY/NAME/store.db  the store of a replay that is not over; removed when it is
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import astuple
from hashlib import blake2b
from pathlib import Path

import msgspec

from memory.policy import Policy
from proxy.engines.base import Engine
from proxy.tuning.replay import Aim, Script, Setting, Turn, replay
from proxy.tuning.replayed import ReplayedEngine

VERSION = 1
"""Of what a line means."""


class Progress:
    """One replay's files. One process at a time writes them."""

    def __init__(self, directory: Path, name: str) -> None:
        self._lines = directory / f"{name}.jsonl"
        self._store = directory / name / "store.db"

    @property
    def store(self) -> Path:
        return self._store

    def turns(self) -> list[Turn]:
        """Those that are over. A last line that was not written to its end does not count; without
        the store that belongs to them an unfinished replay begins anew."""
        try:
            lines = self._lines.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                found.append(msgspec.json.decode(line, type=Turn))
            except msgspec.MsgspecError:
                break
        return found

    def begin(self, n_turns: int) -> list[Turn]:
        """What is done already. Makes the directory (0700). Raises OSError."""
        self._store.parent.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        done = self.turns()
        if len(done) < n_turns and not self._store.exists():
            done = []
        self._rewrite(done)
        return done

    def add(self, turn: Turn) -> None:
        with self._lines.open("ab") as file:
            file.write(msgspec.json.encode(turn) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """The store is not needed any more: it held the chat's text."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._store.parent)

    def _rewrite(self, done: list[Turn]) -> None:
        draft = self._lines.with_suffix(".draft")
        draft.write_bytes(b"".join(msgspec.json.encode(t) + b"\n" for t in done))
        draft.replace(self._lines)


def name_of(aim: Aim, policy: Policy, setting: Setting, fingerprint: str) -> str:
    """The same for the same replay with the same model, and for nothing else."""
    said = repr((VERSION, aim.chat.digest, policy.digest, astuple(setting), fingerprint))
    return blake2b(said.encode(), digest_size=10).hexdigest()


async def measured(
    aim: Aim,
    policy: Policy,
    engine: Engine,
    setting: Setting,
    *,
    directory: Path,
    tell: Callable[[int], object] = lambda n: None,
) -> list[Turn]:
    """All turns of the chat with the model; `tell` gets how many more are over. What was done
    before is taken from `directory`. Raises EngineError, StoreError, OSError."""
    model = await engine.model()
    n_turns = len(aim.chat.exchanges)
    progress = Progress(directory, name_of(aim, policy, setting, model.fingerprint))
    turns = progress.begin(n_turns)
    tell(len(turns))
    if len(turns) < n_turns:
        async with aclosing(_rest(aim, policy, engine, setting, progress, len(turns))) as rest:
            async for turn in rest:
                turns.append(turn)
                progress.add(turn)
                tell(1)
    progress.finish()
    return turns


def _rest(
    aim: Aim, policy: Policy, engine: Engine, setting: Setting, progress: Progress, done: int
) -> AsyncGenerator[Turn, None]:
    script = Script()
    return replay(
        aim,
        policy,
        ReplayedEngine(engine, script),
        script,
        path=progress.store,
        setting=setting,
        done=done,
    )
