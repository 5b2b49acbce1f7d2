"""What is not evaluated again: chats that take turns, chats that leave memory and come back, chats
that outlive the process. Counts are exact; seconds are the model process's own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bench.bounds import Check, at_least, at_most
from bench.engine_sides import Answer, Message, ask, ours, request, text
from proxy.engines.embedded.engine import EmbeddedEngine

CHATS = 8
CHAT_TOKENS = 1500
CELLS = 16_384
WINDOW_TOKENS = 4096
ROUNDS = 3
MESSAGE_TOKENS = 80
ANSWER_TOKENS = 16
EVALUATED_PER_NEW_MOST = 1.02

RESTORED_TOKENS = 2000
RESTARTS = 5
SWAPS = 8
TIGHT_CELLS = 3072
"""Room for one of two such chats and a bit."""
FASTER_LEAST = 50
NEW_AND_MOST = 1
"""The last token of an answer that was cut at its length is chosen, but never evaluated."""

DISK_BYTES = 1 << 30


@dataclass(slots=True, eq=False)
class Talk:
    """A growing chat of one owner. Answers go back in as the very tokens that were generated."""

    name: str
    first_tokens: int
    messages: list[Message] = field(default_factory=list)
    last: Answer | None = None

    async def say(self, engine: EmbeddedEngine) -> tuple[int, Answer]:
        """One turn: how many of its prompt's tokens are new to the model, and what came back."""
        size = MESSAGE_TOKENS if self.messages else self.first_tokens
        self.messages.append(("user", text(size, seed=(self.name, len(self.messages))), None))
        wanted = request(self.messages, max_tokens=ANSWER_TOKENS, owner=self.name, keep=True)
        answer = await ask(engine, wanted)
        before = self.last.end.prompt_tokens + self.last.end.completion_tokens if self.last else 0
        self.last = answer
        self.messages.append(("assistant", answer.text, answer.end.token_ids))
        return answer.end.prompt_tokens - before, answer


@dataclass(frozen=True, slots=True)
class Turns:
    """Tokens that were new, and that were evaluated, over some turns."""

    turns: int
    new_tokens: int
    evaluated: int
    worst_over: int
    """Most tokens that one turn evaluated beyond its new ones."""

    @property
    def ratio(self) -> float:
        return self.evaluated / self.new_tokens

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"evaluated_per_new": round(self.ratio, 4)}


@dataclass(frozen=True, slots=True)
class Shared:
    """Chats taking turns in one cache, then the same chats with a new process."""

    cells_used: int
    taking_turns: Turns
    restarted: Turns

    def checks(self) -> list[Check]:
        turns, restarted = self.taking_turns, self.restarted
        return [
            at_most(f"{CHATS} chats: evaluated / new tokens", turns.ratio, EVALUATED_PER_NEW_MOST),
            at_most("restart: evaluated - new tokens, worst", restarted.worst_over, NEW_AND_MOST),
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "cells_used": self.cells_used,
            "taking_turns": self.taking_turns.to_json(),
            "restarted": self.restarted.to_json(),
        }


async def shared() -> Shared:
    """The first turns, which are all new, are left out of the counts."""
    talks = [Talk(f"chat {i}", CHAT_TOKENS) for i in range(CHATS)]
    with tempfile.TemporaryDirectory(prefix="chatfold-bench-") as folder:
        size = {"n_ctx": WINDOW_TOKENS, "cache_tokens": CELLS, "sequences": CHATS}
        disk = {"snapshots": folder, "snapshot_bytes": DISK_BYTES}
        async with ours(**size, **disk) as engine:
            await _round(engine, talks)
            turns = _sum([turn for _ in range(ROUNDS) for turn in await _round(engine, talks)])
            used = int(engine.status()["cells_used"])
        async with ours(**size, **disk) as engine:
            restarted = _sum(await _round(engine, talks))
    return Shared(used, turns, restarted)


async def _round(engine: EmbeddedEngine, talks: Sequence[Talk]) -> list[tuple[int, Answer]]:
    return [await talk.say(engine) for talk in talks]


def _sum(turns: Sequence[tuple[int, Answer]]) -> Turns:
    return Turns(
        turns=len(turns),
        new_tokens=sum(new for new, _ in turns),
        evaluated=sum(answer.evaluated for _, answer in turns),
        worst_over=max(answer.evaluated - new for new, answer in turns),
    )


@dataclass(frozen=True, slots=True)
class Restored:
    """Seconds, one number each: evaluating a chat from nothing; reading it from disk in a process
    that was just started; doing so in place of another chat, which is written to disk first.
    """

    evaluated_s: tuple[float, ...]
    restarted_s: tuple[float, ...]
    swapped_s: tuple[float, ...]
    worst_over: int
    snapshot_bytes: int

    @property
    def faster(self) -> float:
        return median(self.evaluated_s) / median(self.restarted_s)

    @property
    def faster_swapped(self) -> float:
        return median(self.evaluated_s) / median(self.swapped_s)

    def checks(self) -> list[Check]:
        return [
            at_least(f"snapshot of {RESTORED_TOKENS}: times faster", self.faster, FASTER_LEAST),
            at_most("snapshot: evaluated - new tokens, worst", self.worst_over, NEW_AND_MOST),
        ]

    def to_json(self) -> dict[str, Any]:
        found = {
            k: [round(s, 5) for s in v] if isinstance(v, tuple) else v
            for k, v in asdict(self).items()
        }
        ratios = {"times_faster": self.faster, "times_faster_swapped": self.faster_swapped}
        return found | {k: round(v, 1) for k, v in ratios.items()}


async def restored() -> Restored:
    """Two chats in a cache that holds one of them and a bit: each takes the other's place."""
    size = {"n_ctx": TIGHT_CELLS, "cache_tokens": TIGHT_CELLS}
    talks = [Talk("one", RESTORED_TOKENS), Talk("other", RESTORED_TOKENS)]
    with tempfile.TemporaryDirectory(prefix="chatfold-bench-") as folder:
        disk = {"snapshots": folder, "snapshot_bytes": DISK_BYTES}
        async with ours(**size, **disk) as engine:
            first = [await talk.say(engine) for talk in talks]
            swaps = [await talks[i % 2].say(engine) for i in range(SWAPS)]
        restarts = []
        for i in range(RESTARTS):
            async with ours(**size, **disk) as engine:
                restarts.append(await talks[i % 2].say(engine))
                snapshot_bytes = int(engine.status()["snapshot_bytes"])
    return Restored(
        tuple(answer.end.prefill_s for _, answer in first),
        tuple(answer.end.queued_s for _, answer in restarts),
        tuple(answer.end.queued_s for _, answer in swaps),
        max(answer.evaluated - new for new, answer in (*swaps, *restarts)),
        snapshot_bytes,
    )


def report(found: Shared, snapshots: Restored) -> str:
    turns, again = found.taking_turns, found.restarted
    evaluated, read, swapped = (
        1000 * median(s)
        for s in (snapshots.evaluated_s, snapshots.restarted_s, snapshots.swapped_s)
    )
    return "\n".join(
        [
            f"{CHATS} chats of {CHAT_TOKENS} tokens, {CELLS} cells ({found.cells_used} used at the "
            f"end), {ROUNDS} rounds after the first:",
            f"  {turns.turns} turns: {turns.new_tokens} new tokens, {turns.evaluated} evaluated: "
            f"{turns.ratio:.4f}",
            f"  process stopped and started, {again.turns} turns: {again.new_tokens} new, "
            f"{again.evaluated} evaluated; over in one turn at most {again.worst_over}",
            f"A chat of {RESTORED_TOKENS} tokens, medians: evaluated in {evaluated:.0f} ms, read "
            f"from disk in {read:.1f} ms ({snapshots.faster:.0f} x faster),",
            f"  in place of another that must be written first in {swapped:.1f} ms "
            f"({snapshots.faster_swapped:.0f} x); files {snapshots.snapshot_bytes / 1e6:.0f} MB",
        ]
    )
