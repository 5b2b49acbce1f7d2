"""Who waits for whom: a chat request that finds background work under way, and a long prompt that
comes while others are given their answers. From the model process's own trace of batches.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench import events
from bench.bounds import Check, at_least, at_most
from bench.engine_sides import Answer, ask, ours, question, story, text
from bench.events import BACKGROUND, Event
from proxy.engines.base import Priority
from proxy.engines.embedded.batches import BACKGROUND_CHUNK, SHARED_CHUNK
from proxy.engines.embedded.engine import EmbeddedEngine

WINDOW_TOKENS = 8192
CELLS = 16_384

BACKGROUND_TOKENS = 4000
ARRIVALS = 50
GAP_S = (0.1, 0.6)
"""Between an answer and the next request, evenly spread: they come at any point of a batch."""
QUESTION_TOKENS = 20
WAIT_MS_MOST = 20.0
PROMPTS_MOST = 10
"""Background prompts before giving up on so many arrivals."""

TALKING = 3
NEWCOMER_TOKENS = 2000
SETTLE_S = 1.0
TALK_TOKENS = 400
"""Enough to go on talking until the newcomer's prompt is evaluated."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Chat requests during background prefill. Waits are seconds from the parent's sending to the
    start of the first batch with the request in it; token counts are over all background prompts.
    """

    waits_s: tuple[float, ...]
    background_batches: int
    """Started while a chat request was there."""
    background_prompts: int
    prompt_tokens: int
    evaluated: int
    """As the engine tells in the end: each token once."""
    handed_over: int
    """In batches, those that were broken off included."""

    @property
    def median_ms(self) -> float:
        return 1000 * median(self.waits_s)

    @property
    def lost_each(self) -> float:
        """Tokens that went into a batch a second time, for each interruption."""
        return (self.handed_over - self.prompt_tokens) / len(self.waits_s)

    def checks(self) -> list[Check]:
        name = "chat during background prefill"
        return [
            at_least(f"{name}: requests", len(self.waits_s), ARRIVALS),
            at_most(f"{name}: ms to its first batch, median", self.median_ms, WAIT_MS_MOST),
            at_most(f"{name}: background batches meanwhile", self.background_batches, 0),
            at_most("background: evaluated - prompt", self.evaluated - self.prompt_tokens, 0),
            at_most("background: tokens lost an interruption", self.lost_each, BACKGROUND_CHUNK),
        ]

    def to_json(self) -> dict[str, Any]:
        waits = [round(1000 * s, 2) for s in sorted(self.waits_s)]
        counts = {k: v for k, v in asdict(self).items() if k != "waits_s"}
        return counts | {"waits_ms": waits, "median_ms": round(self.median_ms, 2)}


async def arrivals() -> Arrivals:
    with tempfile.TemporaryDirectory(prefix="chatfold-bench-") as folder:
        trace = Path(folder) / "trace.jsonl"
        size = {"n_ctx": WINDOW_TOKENS, "cache_tokens": CELLS}
        async with ours(**size, trace_path=str(trace)) as engine:
            chats: list[Answer] = []
            backgrounds: list[Answer] = []
            while len(chats) < ARRIVALS and len(backgrounds) < PROMPTS_MOST:
                backgrounds.append(await _interrupted(engine, len(backgrounds), chats))
        return _arrivals(chats, backgrounds, events.read(trace))


async def _interrupted(engine: EmbeddedEngine, number: int, chats: list[Answer]) -> Answer:
    """One background prompt from beginning to end, with chat requests all the while."""
    chance = random.Random(number)
    prompt = text(BACKGROUND_TOKENS, seed=("background", number))
    wanted = question(prompt, max_tokens=0, priority=Priority.BACKGROUND, owner="background")
    work = asyncio.create_task(ask(engine, wanted))
    while True:
        await asyncio.wait([work], timeout=chance.uniform(*GAP_S))
        if work.done():
            return work.result()
        short = text(QUESTION_TOKENS, seed=("question", len(chats)))
        chats.append(await ask(engine, question(short, max_tokens=2)))


def _arrivals(
    chats: Sequence[Answer], backgrounds: Sequence[Answer], found: Sequence[Event]
) -> Arrivals:
    visits = events.chat_visits(found)
    # The last request of each prompt may have come just after its end: those found nothing.
    pairs = [(a, v) for a, v in zip(chats, visits, strict=True) if v.found_busy]
    work = [e for e in found if e["event"] == "batch" and e["cls"] == BACKGROUND]
    return Arrivals(
        waits_s=tuple(v.first_batch_at - a.sent_at for a, v in pairs),
        background_batches=sum(v.background_batches for _, v in pairs),
        background_prompts=len(backgrounds),
        prompt_tokens=sum(a.end.prompt_tokens for a in backgrounds),
        evaluated=sum(a.evaluated for a in backgrounds),
        handed_over=sum(e["tokens"] for e in work),
    )


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A long prompt beside answers that go on. Tokens of it between two tokens of any answer."""

    prompt_tokens: int
    batches: int
    most_tokens_between: int
    pauses_s: tuple[float, ...]
    """How long each batch that held a chunk of the prompt took."""
    alone_s: float
    """Median of a batch without one, just before."""

    def checks(self) -> list[Check]:
        name = f"prompt of {NEWCOMER_TOKENS} beside {TALKING} answers"
        return [
            at_least(f"{name}: batches with it", self.batches, NEWCOMER_TOKENS // SHARED_CHUNK),
            at_most(
                f"{name}: tokens between two of theirs", self.most_tokens_between, SHARED_CHUNK
            ),
        ]

    def to_json(self) -> dict[str, Any]:
        pause, alone = 1000 * median(self.pauses_s), 1000 * self.alone_s
        counts = {k: v for k, v in asdict(self).items() if isinstance(v, int)}
        return counts | {"batch_ms": round(pause, 2), "batch_without_it_ms": round(alone, 2)}


async def newcomer() -> Newcomer:
    with tempfile.TemporaryDirectory(prefix="chatfold-bench-") as folder:
        trace = Path(folder) / "trace.jsonl"
        size = {"n_ctx": WINDOW_TOKENS, "cache_tokens": CELLS}
        async with ours(**size, trace_path=str(trace)) as engine:
            wanted = [question(story(("talk", i)), max_tokens=TALK_TOKENS) for i in range(TALKING)]
            talks = [asyncio.create_task(ask(engine, w)) for w in wanted]
            await asyncio.sleep(SETTLE_S)
            prompt = text(NEWCOMER_TOKENS, seed="newcomer")
            answer = await ask(engine, question(prompt, max_tokens=1))
            for talk in talks:
                talk.cancel()
            await asyncio.wait(talks)
        return _newcomer(answer, events.read(trace))


def _newcomer(answer: Answer, found: Sequence[Event]) -> Newcomer:
    queued = [e for e in found if e["event"] == "request_queued"]
    talking, new = {e["request"] for e in queued[:TALKING]}, queued[TALKING]["request"]
    batches = [e for e in found if e["event"] == "batch"]
    steps = list(pairwise(batches))
    with_it = [(b, after) for b, after in steps if new in b["requests"]]
    without = [
        (b, after)
        for b, after in steps
        if set(b["requests"]) == talking and new not in after["requests"]
    ]
    return Newcomer(
        prompt_tokens=answer.end.prompt_tokens,
        batches=len(with_it),
        most_tokens_between=_most_between(batches, talking, new),
        pauses_s=tuple(after["t"] - b["t"] for b, after in with_it),
        alone_s=median(after["t"] - b["t"] for b, after in without),
    )


def _most_between(batches: Sequence[Event], talking: set[int], new: int) -> int:
    """A batch with a token of every answer in it ends a pause of them all."""
    most = since = 0
    ids = [i for i, b in enumerate(batches) if new in b["requests"]]
    for batch in batches[ids[0] : ids[-1] + 1]:
        here = talking & set(batch["requests"])
        since += batch["tokens"] - len(here)
        most = max(most, since)
        since = 0 if here == talking else since
    return most


def report(found: Arrivals, beside: Newcomer) -> str:
    waits = sorted(1000 * s for s in found.waits_s)
    pause, alone = 1000 * median(beside.pauses_s), 1000 * beside.alone_s
    return "\n".join(
        [
            f"{len(waits)} chat requests during background prefill of {BACKGROUND_TOKENS} tokens:",
            f"  from sending to the first batch: median {found.median_ms:.1f} ms, nine in ten "
            f"within {waits[len(waits) * 9 // 10]:.1f} ms, longest {waits[-1]:.1f} ms",
            f"  {found.background_prompts} background prompts, {found.prompt_tokens} tokens: "
            f"{found.evaluated} evaluated, {found.handed_over} handed over: "
            f"{found.lost_each:.1f} tokens lost an interruption",
            f"A prompt of {beside.prompt_tokens} tokens beside {TALKING} answers: "
            f"{beside.batches} batches, at most {beside.most_tokens_between} of its tokens between "
            f"two of theirs;",
            f"  such a batch takes {pause:.0f} ms, one without it {alone:.0f} ms",
        ]
    )
