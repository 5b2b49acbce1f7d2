"""Memory's view of the engine: its Completer, Warmer and TokenCounter, at background priority."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memory.context import Context
from memory.keeper import Host
from memory.ports import Completion
from proxy.answers import content_of
from proxy.engines.base import (
    Delta,
    Engine,
    EngineUnavailable,
    Finished,
    Generate,
    Priority,
    Reading,
    Sampling,
    Started,
)
from proxy.metrics import BACKGROUND, Metrics

SUMMARY_SAMPLING = Sampling(temperature=0.0, repeat_penalty=1.1)
"""Summaries are not to surprise anybody. The penalty is for small models, which loop without
one.
"""


TOOLS_KEPT = 64
"""Sets of tools whose tokens are remembered: a client sends the same with every request."""


@dataclass(slots=True)
class Doing:
    """How far a background request is, in tokens: `read` of the prompt's `of` (0: not known yet),
    and about how many are `written` of at most `most`; `most` is 0 where a context is warmed."""

    owner: str
    conversation: str
    most: int
    read: int = 0
    of: int = 0
    written: int = 0


class BackgroundModel:
    """Nothing of this ever runs while a user's request does; the engine sees to it. For one worker,
    which asks for one thing at a time: `doing` is that, None where it asks for nothing."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self.doing: Doing | None = None

    async def complete(
        self, owner: str, context: Context, *, conversation: str, max_tokens: int
    ) -> Completion:
        request = Generate(
            owner=owner,
            context=context,
            priority=Priority.BACKGROUND,
            conversation=conversation,
            max_tokens=max_tokens,
            sampling=SUMMARY_SAMPLING,
            keep=False,
            # A summary's few tokens would be spent on thoughts.
            thinks=False,
            tells_progress=True,
        )
        text, finished = await self._run(request)
        return Completion(
            text=content_of(text, self._engine.info),
            prompt_tokens=finished.prompt_tokens,
            cached_tokens=finished.cached_tokens,
            completion_tokens=finished.completion_tokens,
            finish_reason=finished.finish_reason,
        )

    async def warm(self, owner: str, context: Context, *, conversation: str) -> int:
        # The answer at its end is a whole one: the next turn begins behind its end-of-turn mark.
        whole = replace(context, continues=False)
        request = Generate(
            owner,
            whole,
            Priority.BACKGROUND,
            max_tokens=0,
            conversation=conversation,
            tells_progress=True,
        )
        _, finished = await self._run(request)
        return finished.prompt_tokens - finished.cached_tokens

    async def _run(self, request: Generate) -> tuple[str, Finished]:
        text: list[str] = []
        finished: Finished | None = None
        doing = Doing(request.owner, request.conversation, request.max_tokens or 0)
        self.doing = doing
        try:
            async with self._engine.generate(request) as events:
                async for event in events:
                    match event:
                        case Reading(done=done, of=of):
                            doing.read, doing.of = done, of
                        case Started(prompt_tokens=of):
                            doing.read = doing.of = of
                        case Delta(text=piece):
                            text.append(piece)
                            doing.written += 1  # a piece is a token, nearly always
                        case Finished():
                            finished = event
        finally:
            self.doing = None
        assert finished is not None, "an engine ends with Finished or raises"
        self._metrics.tokens(
            BACKGROUND,
            prompt=finished.prompt_tokens,
            cached=finished.cached_tokens,
            generated=finished.completion_tokens,
        )
        return "".join(text), finished


class EngineTokens:
    """Counts with the engine's own tokenizer. `tokenizer` is known once the model is loaded."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tools: OrderedDict[tuple[str, str], int] = OrderedDict()

    @property
    def tokenizer(self) -> str:
        return self._engine.info.fingerprint if self._engine.info else ""

    async def count(self, texts: Sequence[str]) -> list[int]:
        return await self._engine.count(texts)

    async def count_tools(self, tools: str) -> int:
        key = self.tokenizer, tools
        if key not in self._tools:
            self._tools[key] = await self._engine.count_tools(tools)
            if len(self._tools) > TOOLS_KEPT:
                self._tools.popitem(last=False)
        return self._tools[key]

    def host(self) -> Host:
        """Raises EngineUnavailable before the model was loaded for the first time."""
        info = self._engine.info
        if info is None:
            raise EngineUnavailable("The model is not loaded yet.")
        return Host(info.budget, info.name)
