"""Chats with the simulated engine: the client's side of them, and the books that are kept of it."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from bench.memory_texts import Exchange, careful_summary
from memory.compaction import covered
from memory.context import SYSTEM, Context, ContextMessage, Shape
from memory.policy import Policy
from memory.tokens import TiktokenCounter
from memory.transcript import ASSISTANT, USER, Message, chain
from proxy.chat import Plan
from proxy.engines.base import Generate, Priority
from proxy.tuning.house import House, verbatim
from proxy.tuning.simulation import SimulatedEngine, words

OWNER = "anna"
KIND = "You are kind."
TURN_MARKUP = 3
"""What the simulated template adds to a question: both ends of it and the answer's header."""

LIBRECHAT_WINDOW = 4095
"""LibreChat v0.6 with a model it does not know, cl100k tokens."""
LIBRECHAT_MESSAGE = 4
LIBRECHAT_BASE = 3
"""What LibreChat counts around each message and once."""


@dataclass(slots=True)
class Script:
    """The model's lines: whoever asks sets the next one first."""

    line: str = ""

    def __call__(self, context: Context) -> str:
        return self.line


def simulated(policy: Policy, window_tokens: int) -> tuple[SimulatedEngine, Script]:
    script = Script()
    limits = policy.limits(window_tokens)
    return SimulatedEngine(window_tokens, script, careful_summary(limits.summary_tokens)), script


@asynccontextmanager
async def house(policy: Policy, window_tokens: int) -> AsyncIterator[tuple[House, Script]]:
    """A house on a store of its own, which is gone afterwards."""
    engine, script = simulated(policy, window_tokens)
    with tempfile.TemporaryDirectory(prefix="chatfold-bench-") as directory:
        opened = await House.open(Path(directory) / "store.db", engine, policy)
        try:
            yield opened, script
        finally:
            await opened.close()


# -- windows: what of its history a client sends -------------------------------------------------

Window = Callable[[Sequence[int], int], int]
"""(tokens of each message, where the window began) -> where it begins now."""


def whole(counts: Sequence[int], start: int) -> int:
    return 0


def sliding(limit: int) -> Window:
    """Drops whole messages from the front until the rest fits, whoever spoke them."""

    def begin(counts: Sequence[int], start: int) -> int:
        while start < len(counts) - 1 and sum(counts[start:]) > limit:
            start += 1
        return start

    return begin


def restarting(limit: int) -> Window:
    """Drops everything before the last answer at once: the window begins with the assistant."""

    def begin(counts: Sequence[int], start: int) -> int:
        return len(counts) - 2 if sum(counts[start:]) > limit else start

    return begin


async def librechat(window: Callable[[int], Window], system: str = KIND) -> Window:
    """A window of LIBRECHAT_WINDOW beside this system prompt. `counts` are cl100k tokens."""
    return window(LIBRECHAT_WINDOW - LIBRECHAT_BASE - await _cl100k(system))


async def _cl100k(text: str) -> int:
    """Tokens of a message as LibreChat counts them."""
    (n_tokens,) = await TiktokenCounter(margin=0.0).count([text])
    return n_tokens + LIBRECHAT_MESSAGE


# -- one chat ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn's books. Tokens are the simulated engine's."""

    new_tokens: int
    """The question with its markup, and the system prompt in the first turn."""
    noted_tokens: int
    """What of the system prompt changed since the turn before."""
    prompt_tokens: int
    evaluated: int
    sent_messages: int
    lost: int
    """Messages that neither a summary covers nor the context holds word for word."""

    @property
    def amplification(self) -> float:
        return self.evaluated / self.new_tokens

    @property
    def evaluated_twice(self) -> int:
        """Tokens evaluated though they had been in the cache: none, if the context begins with what
        was warmed."""
        return max(0, self.evaluated - self.new_tokens - self.noted_tokens)


@dataclass(slots=True)
class Chat:
    """A client's chat with a house. `system(turn)` gives the system prompt of each turn."""

    house: House
    script: Script
    window: Window = whole
    system: Callable[[int], str] = lambda turn: KIND
    owner: str = OWNER
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    _counts: list[int] = field(default_factory=list)
    _start: int = 0

    async def say(self, exchange: Exchange, *, idle: bool = True) -> Turn:
        await self._append(Message(USER, exchange.question))
        return await self._ask(exchange.answer, idle=idle)

    async def regenerate(self, answer: str) -> Turn:
        """The same question again, for another answer."""
        self.cut(len(self.messages) - 1)
        return await self._ask(answer, idle=True)

    def cut(self, n_messages: int) -> None:
        """Goes back to the first `n_messages`."""
        del self.messages[n_messages:], self._counts[n_messages:]
        self._start = min(self._start, n_messages)

    async def _append(self, message: Message) -> None:
        self.messages.append(message)
        self._counts.append(0 if self.window is whole else await _cl100k(message.text))

    async def _ask(self, answer: str, *, idle: bool) -> Turn:
        self.script.line = answer
        self._start = self.window(self._counts, self._start)
        system = self.system(len(self.turns))
        sent = self.messages[self._start :]
        text, plan = await self.house.ask(self.owner, sent, system=system)
        turn = self._booked(system, sent, plan)
        self.turns.append(turn)
        await self._append(Message(ASSISTANT, text))
        if idle:
            await self.house.idle()
        return turn

    def _booked(self, system: str, sent: Sequence[Message], plan: Plan) -> Turn:
        call = self.house.engine.chat_calls()[-1]
        new = len(words(sent[-1].text)) + TURN_MARKUP
        note = plan.history.nodes[-1].note
        return Turn(
            new_tokens=new if self.turns else call.prompt_tokens,
            noted_tokens=len(words(plan.context.messages[-1].parts[0])) if note else 0,
            prompt_tokens=call.prompt_tokens,
            evaluated=call.evaluated,
            sent_messages=len(sent),
            lost=lost(plan, self.messages),
        )


def lost(plan: Plan, said: Sequence[Message]) -> int:
    """How many messages of the whole chat are neither covered by a summary of this very history nor
    in the context word for word."""
    if plan.history.digests != chain(said):
        return len(said)
    blocks = plan.history.written if plan.assembled.activates else plan.history.active
    behind = covered(blocks) if plan.context.shape.summaries == len(blocks) else 0
    shown = verbatim(plan.context)
    if [(m.role, m.text) for m in said[behind:]] == shown:
        return 0
    return max(1, len(said) - behind - len(shown))


def mean_amplification(turns: Sequence[Turn]) -> float:
    return fmean(turn.amplification for turn in turns)


def total_amplification(turns: Sequence[Turn]) -> float:
    return sum(t.evaluated for t in turns) / sum(t.new_tokens for t in turns)


async def without_chatfold(
    exchanges: Sequence[Exchange], window: Window, *, window_tokens: int, system: str = KIND
) -> list[Turn]:
    """The same client on the same cache, with what it sends as it is."""
    script = Script()
    engine = SimulatedEngine(window_tokens, script, str)
    messages: list[ContextMessage] = []
    counts: list[int] = []
    turns: list[Turn] = []
    start = 0
    for exchange in exchanges:
        messages.append(ContextMessage(USER, (exchange.question,)))
        counts.append(await _cl100k(exchange.question))
        start = window(counts, start)
        script.line = exchange.answer
        sent = (ContextMessage(SYSTEM, (system,)), *messages[start:])
        context = Context(sent, "", continues=False, shape=Shape(0, 0, 0, 0, 0, 0))
        async with engine.generate(Generate(OWNER, context, Priority.CHAT)) as events:
            async for _ in events:
                pass
        call = engine.calls[-1]
        new = len(words(exchange.question)) + TURN_MARKUP if turns else call.prompt_tokens
        turns.append(Turn(new, 0, call.prompt_tokens, call.evaluated, len(sent) - 1, lost=start))
        messages.append(ContextMessage(ASSISTANT, (exchange.answer,)))
        counts.append(await _cl100k(exchange.answer))
    return turns
