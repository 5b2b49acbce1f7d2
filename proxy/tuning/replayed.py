"""A real engine that is told what to answer: everything but the answers is the model's own work."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from memory.context import Context, ContextMessage
from memory.transcript import ASSISTANT
from proxy.engines.base import (
    Delta,
    Embeddings,
    Engine,
    Event,
    Finished,
    Generate,
    ModelInfo,
    Priority,
    Started,
    Warmth,
)
from proxy.tuning.simulation import Call, Line

TOKEN_BYTES = 4


@dataclass(slots=True, eq=False)
class ReplayedEngine:
    """Engine. Chat prompts are evaluated and timed up to the first token, then the answer that was
    really given is put behind them, as if it had been generated; that is in no book. Summaries are
    written and contexts warmed by the model. Starting and stopping the engine is not its affair."""

    engine: Engine
    answer: Callable[[Context], Line]
    calls: list[Call] = field(default_factory=list)

    @property
    def info(self) -> ModelInfo | None:
        return self.engine.info

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def model(self) -> ModelInfo:
        return await self.engine.model()

    def ready(self) -> bool:
        return self.engine.ready()

    async def count(self, texts: Sequence[str]) -> list[int]:
        return await self.engine.count(texts)

    async def embed(self, inputs: Sequence[str | tuple[int, ...]]) -> Embeddings:
        return await self.engine.embed(inputs)

    async def count_tools(self, tools: str) -> int:
        return await self.engine.count_tools(tools)

    def check(self, request: Generate) -> None:
        self.engine.check(request)

    async def forget(self, owner: str) -> None:
        await self.engine.forget(owner)

    @property
    def tells_warmth(self) -> bool:
        return self.engine.tells_warmth

    async def warmth(self, owner: str, context: Context) -> Warmth:
        return await self.engine.warmth(owner, context)

    def status(self) -> dict[str, Any]:
        return self.engine.status()

    @asynccontextmanager
    async def generate(self, request: Generate) -> AsyncIterator[AsyncIterator[Event]]:
        if request.priority == Priority.CHAT:
            yield self._told(request)
        else:
            yield self._own(request)

    async def _own(self, request: Generate) -> AsyncIterator[Event]:
        began = time.monotonic()
        async with self.engine.generate(request) as events:
            async for event in events:
                if isinstance(event, Finished):
                    self._book(request, event, seconds=time.monotonic() - began)
                yield event

    async def _told(self, request: Generate) -> AsyncIterator[Event]:
        line = self.answer(request.context)
        began = time.monotonic()
        started, seconds = Started(0, 0), 0.0
        async with self.engine.generate(replace(request, max_tokens=1)) as events:
            async for event in events:
                if isinstance(event, Started):
                    started, seconds = event, time.monotonic() - began
        n_tokens = await self._length(line)
        finished = Finished(
            "stop", started.prompt_tokens, started.cached_tokens, n_tokens, line.token_ids
        )
        self._book(request, finished, seconds=seconds)
        await self._put_behind(request, line)
        yield started
        yield Delta(line.text)
        yield finished

    async def _length(self, line: Line) -> int:
        if line.token_ids is not None:
            return len(line.token_ids) // TOKEN_BYTES
        (n_tokens,) = await self.engine.count([line.text])
        return n_tokens

    async def _put_behind(self, request: Generate, line: Line) -> None:
        said = ContextMessage(ASSISTANT, (line.text,), line.token_ids)
        messages = (*request.context.messages, said)
        context = replace(request.context, messages=messages, continues=True)
        async with self.engine.generate(replace(request, context=context, max_tokens=0)) as events:
            async for _ in events:
                pass

    def _book(self, request: Generate, finished: Finished, *, seconds: float) -> None:
        self.calls.append(
            Call(
                request.owner,
                request.priority,
                request.context,
                finished.prompt_tokens,
                finished.cached_tokens,
                request.max_tokens,
                finished.completion_tokens,
                seconds,
            )
        )
