"""Replays without a model: seconds for a long chat, exact in tokens, assumed in summaries."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from memory.policy import Policy
from proxy.tuning.replay import Aim, Script, Setting, Turn, assumed, replay
from proxy.tuning.simulation import SimulatedEngine, Vocabulary


async def planned(
    aim: Aim,
    policy: Policy,
    vocabulary: Vocabulary,
    setting: Setting,
    *,
    progress: Callable[[], object] = lambda: None,
) -> list[Turn]:
    """All turns of the chat. The store is in a directory of its own, which is gone afterwards."""
    script = Script()
    say = assumed(policy, setting.window_tokens)
    engine = SimulatedEngine(setting.window_tokens, script, say, vocabulary)
    turns: list[Turn] = []
    with tempfile.TemporaryDirectory(prefix="chatfold-tune-") as directory:
        path = Path(directory) / "store.db"
        async for turn in replay(aim, policy, engine, script, path=path, setting=setting):
            turns.append(turn)
            progress()
    return turns
