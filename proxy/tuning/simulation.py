"""An engine without a model: exact books of a prefix cache over words, scripted answers.

It stands for a model where the question is what reaches it and how much of that is new: hundreds
of turns in a second, with counts as exact as a real engine's. What a model would say is no part of
such a question.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from memory.context import Context
from memory.ports import Budget
from proxy.engines.base import (
    ContextOverflow,
    Delta,
    Embeddings,
    Event,
    Finished,
    Generate,
    ModelInfo,
    Priority,
    RequestRefused,
    Started,
    Warmth,
)
from proxy.engines.embedded.sequences import common_prefix

_WORD = re.compile(r"\w+|[^\w\s]|\s+")
MESSAGE_TOKENS = 3
BASE_TOKENS = 2
RESIDENT_MOST = 12
"""Prompts remembered of each owner: more than any engine keeps of one chat."""


def words(text: str) -> list[str]:
    """The simulated tokens of a text."""
    return _WORD.findall(text)


class Vocabulary(Protocol):
    """What a model would make of texts: a prompt's tokens, in whatever form compares fast."""

    fingerprint: str
    default_system: str
    message_tokens: int
    base_tokens: int

    def prompt(self, context: Context, *, answer_header: bool) -> list[Any]:
        """Every token of the prompt, markup included."""
        ...

    def tokens(self, text: str) -> list[Any]:
        """The tokens of a text by itself."""
        ...

    def ids(self, token_ids: bytes) -> list[Any]:
        """The tokens that these ids stand for."""
        ...


class Words:
    """Vocabulary. A word is a token, and so is each piece of markup."""

    fingerprint = "words"
    default_system = ""
    message_tokens = MESSAGE_TOKENS
    base_tokens = BASE_TOKENS

    def prompt(self, context: Context, *, answer_header: bool) -> list[Any]:
        return render(context, answer_header=answer_header)

    def tokens(self, text: str) -> list[Any]:
        return words(text)

    def ids(self, token_ids: bytes) -> list[Any]:
        raise NotImplementedError("words have no ids")


@dataclass(frozen=True, slots=True)
class Line:
    """What the simulated model says. `token_ids` are the tokens it is generated as, where they are
    known; `n_tokens` what it costs to write, where that is not the text's own length."""

    text: str
    token_ids: bytes | None = None
    n_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One request that reached the engine. Counts are tokens; a warming has `max_tokens` 0."""

    owner: str
    priority: Priority
    context: Context
    prompt_tokens: int
    cached_tokens: int
    max_tokens: int | None
    generated: int = 0
    seconds: float | None = None
    """None where nothing was really evaluated."""

    @property
    def evaluated(self) -> int:
        return self.prompt_tokens - self.cached_tokens


@dataclass(slots=True, eq=False)
class SimulatedEngine:
    """Engine. `answer(context)` gives the text of a chat answer, `summary(context)` of any other.

    The last prompts stay in the cache, per owner: what is evaluated twice is memory's fault.
    """

    window_tokens: int
    answer: Callable[[Context], str | Line]
    summary: Callable[[Context], str | Line]
    vocabulary: Vocabulary = field(default_factory=Words)
    calls: list[Call] = field(default_factory=list)
    resident: dict[str, list[list[Any]]] = field(default_factory=dict)
    info: ModelInfo | None = None

    def chat_calls(self) -> list[Call]:
        return [c for c in self.calls if c.priority == Priority.CHAT]

    async def start(self) -> None:
        known = self.vocabulary
        budget = Budget(self.window_tokens, known.message_tokens, known.base_tokens)
        self.info = ModelInfo("simulated", known.fingerprint, budget, known.default_system)

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

    def check(self, request: Generate) -> None:
        pass

    async def count(self, texts: Sequence[str]) -> list[int]:
        return [len(self.vocabulary.tokens(t)) for t in texts]

    async def count_tools(self, tools: str) -> int:
        return len(self.vocabulary.tokens(tools))

    @property
    def tells_warmth(self) -> bool:
        return True

    async def warmth(self, owner: str, context: Context) -> Warmth:
        whole = replace(context, continues=False)
        prompt = self.vocabulary.prompt(whole, answer_header=False)
        return Warmth(len(prompt), self._match(owner, prompt, warm=True), 0)

    async def embed(self, inputs: Sequence[str | tuple[int, ...]]) -> Embeddings:
        raise RequestRefused("A simulated model makes no embeddings.")

    @asynccontextmanager
    async def generate(self, request: Generate) -> AsyncIterator[AsyncIterator[Event]]:
        yield self._events(request)

    async def _events(self, request: Generate) -> AsyncIterator[Event]:
        warms = request.max_tokens == 0
        prompt = self.vocabulary.prompt(request.context, answer_header=not warms)
        if len(prompt) >= self.window_tokens:
            raise ContextOverflow(prompt_tokens=len(prompt), window_tokens=self.window_tokens)
        cached = self._match(request.owner, prompt, warm=warms)
        line = self._line(request, room=self.window_tokens - len(prompt))
        said = self._said(line)
        generated = len(said) if line.n_tokens is None else line.n_tokens
        call = Call(
            request.owner,
            request.priority,
            request.context,
            len(prompt),
            cached,
            request.max_tokens,
            generated,
        )
        self.calls.append(call)
        if request.keep:
            # The last token of an answer that its limit ended was written and never read.
            read = said[:-1] if said and request.max_tokens == len(said) else said
            kept = self.resident.setdefault(request.owner, [])
            kept.append([*prompt, *read])
            del kept[:-RESIDENT_MOST]
        yield Started(len(prompt), cached)
        if line.text:
            yield Delta(line.text)
        yield Finished("stop", len(prompt), cached, generated, line.token_ids)

    def _said(self, line: Line) -> list[Any]:
        if line.token_ids is not None:
            return self.vocabulary.ids(line.token_ids)
        return self.vocabulary.tokens(line.text)

    def _line(self, request: Generate, *, room: int) -> Line:
        if request.max_tokens == 0:
            return Line("")
        make = self.answer if request.priority == Priority.CHAT else self.summary
        made = make(request.context)
        if isinstance(made, Line):
            return made
        most = room if request.max_tokens is None else min(room, request.max_tokens)
        return Line("".join(words(made)[:most]))

    def _match(self, owner: str, prompt: list[Any], *, warm: bool) -> int:
        best = max((common_prefix(r, prompt) for r in self.resident.get(owner, [])), default=0)
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
