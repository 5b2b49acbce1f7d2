"""An engine without a model: exact books of a prefix cache over words, scripted answers.

It stands for a model where the question is what reaches it and how much of that is new: hundreds
of turns in a second, with counts as exact as a real engine's. What a model would say is no part of
such a question.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memory.context import Context
from memory.conversations import History
from memory.keeper import Keeper
from memory.policy import Policy
from memory.ports import Budget
from memory.store import Store
from memory.transcript import Message, Transcript
from proxy.background import BackgroundModel, EngineTokens
from proxy.chat import Chats, Plan
from proxy.config import TimeoutsConfig
from proxy.engines.base import (
    ContextOverflow,
    Delta,
    Event,
    Finished,
    Generate,
    ModelInfo,
    Priority,
    Sampling,
    Started,
)
from proxy.metrics import Metrics
from proxy.running import Running
from proxy.wire import ChatRequest

_WORD = re.compile(r"\w+|[^\w\s]|\s+")
MESSAGE_TOKENS = 3
BASE_TOKENS = 2


def words(text: str) -> list[str]:
    """The simulated tokens of a text."""
    return _WORD.findall(text)


@dataclass(frozen=True, slots=True)
class Call:
    """One request that reached the engine. Counts are tokens."""

    owner: str
    priority: Priority
    context: Context
    prompt_tokens: int
    cached_tokens: int
    max_tokens: int | None

    @property
    def evaluated(self) -> int:
        return self.prompt_tokens - self.cached_tokens


@dataclass(slots=True, eq=False)
class SimulatedEngine:
    """Engine. `answer(context)` gives the text of a chat answer, `summary(context)` of any other.

    Every prompt stays in the cache for ever, per owner: what is evaluated twice is memory's fault.
    """

    window_tokens: int
    answer: Callable[[Context], str]
    summary: Callable[[Context], str]
    calls: list[Call] = field(default_factory=list)
    resident: dict[str, list[list[str]]] = field(default_factory=dict)
    info: ModelInfo | None = None

    async def start(self) -> None:
        budget = Budget(self.window_tokens, MESSAGE_TOKENS, BASE_TOKENS)
        self.info = ModelInfo("simulated", "words", budget, "")

    async def stop(self) -> None:
        pass

    async def model(self) -> ModelInfo:
        assert self.info is not None
        return self.info

    def ready(self) -> bool:
        return True

    async def forget(self, owner: str) -> None:
        self.resident.pop(owner, None)

    def status(self) -> dict[str, Any]:
        return {"kind": "simulated", "ready": True}

    async def count(self, texts: Sequence[str]) -> list[int]:
        return [len(words(t)) for t in texts]

    @asynccontextmanager
    async def generate(self, request: Generate) -> AsyncIterator[AsyncIterator[Event]]:
        yield self._events(request)

    async def _events(self, request: Generate) -> AsyncIterator[Event]:
        prompt = render(request.context, answer_header=request.max_tokens != 0)
        if len(prompt) >= self.window_tokens:
            raise ContextOverflow(prompt_tokens=len(prompt), window_tokens=self.window_tokens)
        cached = self._match(request.owner, prompt, warm=request.max_tokens == 0)
        call = Call(
            request.owner,
            request.priority,
            request.context,
            len(prompt),
            cached,
            request.max_tokens,
        )
        self.calls.append(call)
        text = self._text(request)
        if request.keep:
            self.resident.setdefault(request.owner, []).append([*prompt, *words(text)])
            del self.resident[request.owner][:-12]
        yield Started(len(prompt), cached)
        if text:
            yield Delta(text)
        yield Finished("stop", len(prompt), cached, len(words(text)), None)

    def _text(self, request: Generate) -> str:
        if request.max_tokens == 0:
            return ""
        make = self.answer if request.priority == Priority.CHAT else self.summary
        room = self.window_tokens - len(render(request.context, answer_header=True))
        most = room if request.max_tokens is None else min(room, request.max_tokens)
        return "".join(words(make(request.context))[:most])

    def _match(self, owner: str, prompt: list[str], *, warm: bool) -> int:
        best = max((_common(r, prompt) for r in self.resident.get(owner, [])), default=0)
        return best if warm else min(best, len(prompt) - 1)


def render(context: Context, *, answer_header: bool) -> list[str]:
    """The prompt as a list of words, with markup as a chat template would write it."""
    out = ["<s>"]
    for i, message in enumerate(context.messages):
        out.append(f"<{message.role}>")
        for part in message.parts:
            out += words(part)
        if not (context.continues and i == len(context.messages) - 1):
            out.append("</>")
    if answer_header and not context.continues:
        out.append("<assistant>")
    return out


def _common(a: list[str], b: list[str]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


@dataclass(slots=True, eq=False)
class House:
    """Store, keeper and chat path around a simulated engine, as the proxy wires them."""

    engine: SimulatedEngine
    store: Store
    keeper: Keeper
    chats: Chats
    events: list[tuple[str, dict[str, object]]]

    @classmethod
    async def open(cls, path: Path, engine: SimulatedEngine, policy: Policy) -> House:
        await engine.start()
        metrics, counter = Metrics(), EngineTokens(engine)
        background = BackgroundModel(engine, metrics)
        store = await Store.open(path)
        events: list[tuple[str, dict[str, object]]] = []
        keeper = Keeper(
            store=store,
            completer=background,
            warmer=background,
            counter=counter,
            policy=policy,
            host=counter.host,
            observe=lambda event, /, **fields: events.append((event, fields)),
        )
        chats = Chats(
            running=Running(),
            engine=engine,
            store=store,
            keeper=keeper,
            counter=counter,
            policy=policy,
            metrics=metrics,
            timeouts=TimeoutsConfig(),
        )
        keeper.start()
        return cls(engine, store, keeper, chats, events)

    async def close(self) -> None:
        await self.keeper.stop()
        await self.store.close()

    async def idle(self) -> None:
        """Until the keeper has nothing left to do."""
        await self.keeper.idle()

    async def ask(
        self,
        owner: str,
        messages: Sequence[Message],
        *,
        system: str = "",
        max_tokens: int | None = None,
        client_id: str | None = None,
    ) -> tuple[str, Plan]:
        """One chat request as the proxy would serve it: the answer and the plan it was made
        from.
        """
        transcript = Transcript(system, tuple(messages))
        request = ChatRequest("any", transcript, Sampling(), max_tokens=max_tokens)
        plan = await self.chats.plan(request, owner, client_id=client_id)
        text = [e.text async for e in self.chats.run(plan) if isinstance(e, Delta)]
        return "".join(text), plan

    def chat_calls(self) -> list[Call]:
        return [c for c in self.engine.calls if c.priority == Priority.CHAT]


def verbatim(context: Context) -> list[tuple[str, str]]:
    """The (role, last part) of every message but the system's: what stands word for word."""
    return [(m.role, m.parts[-1]) for m in context.messages if m.role != "system"]


def length(history: History) -> int:
    """How many messages the history has, sent or re-attached."""
    return len(history.digests)
