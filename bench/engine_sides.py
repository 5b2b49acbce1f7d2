"""The two sides of `bench.engine`: the embedded engine as the proxy drives it, and the process that
it is held against. Same model, same settings, never both at work.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from bench.servers import ROOT, BenchError, model_file
from memory.context import Context, ContextMessage, Shape
from proxy.engines.base import Delta, Finished, Generate, Priority, Sampling, Started
from proxy.engines.embedded.engine import EmbeddedEngine, EmbeddedSettings
from proxy.engines.embedded.protocol import Load

SYSTEM = "You are a patient storyteller."
GREEDY = Sampling(temperature=0.0)

N_BATCH, N_UBATCH = 512, 128
"""chatfold's own defaults."""

STOP_S = 30.0
LINE_BYTES = 1 << 20

_WORDS = (
    *("apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer", "island"),
    *("jacket", "kitchen", "ladder", "market", "needle", "office", "pencil", "quarter", "river"),
    *("silver", "temple", "under", "valley", "window", "yellow", "animal", "bottle", "castle"),
    *("dinner", "evening", "finger", "guitar", "honest"),
)
"""One token each to the default model."""


def threads() -> int:
    """As many as the engine takes by itself."""
    cores = os.cpu_count() or 1
    return cores - 1 if cores > 2 else cores


def text(n_words: int, *, seed: object) -> str:
    """Words in no order, a token each; every seed gives another text."""
    chance = random.Random(repr(seed))
    return " ".join(chance.choices(_WORDS, k=n_words))


def story(seed: object) -> str:
    """A short question with a long answer."""
    a, b = random.Random(repr(seed)).sample(_WORDS, 2)
    return f"Tell me a very long story about the {a} and the {b}. Use many sentences."


@dataclass(slots=True)
class Answer:
    """What came back, and when, in seconds on the machine's monotonic clock."""

    sent_at: float
    started_at: float = 0.0
    finished_at: float = 0.0
    delta_at: list[float] = field(default_factory=list)
    text: str = ""
    finished: Finished | None = None

    @property
    def end(self) -> Finished:
        if self.finished is None:
            raise BenchError("an answer has no end")
        return self.finished

    @property
    def evaluated(self) -> int:
        """Tokens of the prompt that were not in the cache."""
        return self.end.prompt_tokens - self.end.cached_tokens


Message = tuple[str, str, bytes | None]
"""Role, text, and the answer's tokens where they are known."""


def request(
    messages: Sequence[Message],
    *,
    max_tokens: int,
    owner: str = "bench",
    priority: Priority = Priority.CHAT,
    keep: bool = False,
    sampling: Sampling = GREEDY,
    system: str = SYSTEM,
) -> Generate:
    parts = [ContextMessage("system", (system,))]
    parts += [ContextMessage(role, (text,), token_ids=ids) for role, text, ids in messages]
    context = Context(tuple(parts), "", False, Shape(1, 0, 0, 0, 0, 0))
    return Generate(owner, context, priority, max_tokens, sampling, keep)


def question(user: str, **options: Any) -> Generate:
    return request([("user", user, None)], **options)


async def ask(engine: EmbeddedEngine, wanted: Generate) -> Answer:
    answer = Answer(time.monotonic())
    async with engine.generate(wanted) as events:
        async for event in events:
            _take(event, answer)
    return answer


def _take(event: Started | Delta | Finished, answer: Answer) -> None:
    now = time.monotonic()
    match event:
        case Started():
            answer.started_at = now
        case Delta(text=text):
            answer.delta_at.append(now)
            answer.text += text
        case Finished():
            answer.finished_at, answer.finished = now, event


@asynccontextmanager
async def ours(
    *, n_ctx: int, cache_tokens: int, sequences: int = 8, **more: Any
) -> AsyncIterator[EmbeddedEngine]:
    """A loaded engine with a model process of its own."""
    load = Load(
        path=str(model_file()),
        n_ctx=n_ctx,
        cache_tokens=cache_tokens,
        sequences=sequences,
        n_batch=N_BATCH,
        n_ubatch=N_UBATCH,
        threads=threads(),
        gpu_layers=0,
        **more,
    )
    engine = EmbeddedEngine(EmbeddedSettings(load))
    await engine.start()
    try:
        await engine.model()
        yield engine
    finally:
        async with asyncio.timeout(STOP_S):
            await engine.stop()


class Bare:
    """The other process. One command at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def generate(self, user: str, *, n: int) -> dict[str, Any]:
        return await self._do("generate", [user], n)

    async def together(self, users: Sequence[str], *, n: int) -> dict[str, Any]:
        return await self._do("together", users, n)

    async def _do(self, what: str, users: Sequence[str], n: int) -> dict[str, Any]:
        prompts = [(SYSTEM, user) for user in users]
        return await self.say({"do": what, "prompts": prompts, "n": n})

    async def say(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        line = await self._process.stdout.readline()
        if not line:
            raise BenchError("the process beside the engine ended; its last words are above")
        found: dict[str, Any] = json.loads(line)
        return found


@asynccontextmanager
async def bare(*, n_ctx: int) -> AsyncIterator[Bare]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.engine_bare"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_BYTES,
        cwd=ROOT,
    )
    try:
        side = Bare(process)
        await side.say(
            {
                "path": str(model_file()),
                "n_ctx": n_ctx,
                "n_batch": N_BATCH,
                "n_ubatch": N_UBATCH,
                "threads": threads(),
            }
        )
        yield side
    finally:
        process.kill()
        await process.wait()
