"""Answers side requests: after the chat, at little cost, and never as a part of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from memory import summarize
from memory.context import Context, ContextMessage, Shape
from memory.conversations import History, context_for, recognise, revisit, room_for
from memory.keeper import Job
from memory.policy import Policy
from memory.ports import TokenCounter
from memory.store import Store, StoreError
from memory.transcript import USER, Message, Transcript
from proxy.answers import content_of
from proxy.config import LibreChatConfig
from proxy.engines.base import (
    Delta,
    Engine,
    EngineError,
    Finished,
    Generate,
    ModelInfo,
    Priority,
    Sampling,
)
from proxy.librechat.quote import instruction_of, shortened
from proxy.librechat.side import Form, Kind, Side
from proxy.librechat.summaries import summary_of, to_summarise, without_instruction
from proxy.librechat.titles import UNTITLED, first_words, language_of, message_in, title_of
from proxy.metrics import SIDE, Metrics
from proxy.running import Running
from proxy.wire import Usage

log = logging.getLogger("chatfold.side")

GRACE_S = 0.05
"""A title is sent 3 to 6 ms before the first chat request that it is about: the chat goes first."""

SAMPLING = Sampling(temperature=0.0, repeat_penalty=1.1)

CHECKPOINT_BLOCKS = 3
"""A checkpoint has at most as many tokens as so many summaries."""

CHARS_PER_TOKEN = 4
"""Estimate for text that is chosen, not evaluated."""


NOTHING = Usage(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Answer:
    """`title` and `language` are "" where they were not asked for, `text` stands for all else."""

    text: str = ""
    title: str = ""
    language: str = ""
    usage: Usage = NOTHING


class Sides:
    """Serves side requests over one engine. What it does is in no store and keeps no cell."""

    def __init__(
        self,
        *,
        engine: Engine,
        store: Store,
        counter: TokenCounter,
        policy: Policy,
        metrics: Metrics,
        settings: LibreChatConfig,
        running: Running,
    ) -> None:
        self._engine = engine
        self._store = store
        self._counter = counter
        self._policy = policy
        self._metrics = metrics
        self._settings = settings
        self._running = running

    async def answer(self, side: Side, transcript: Transcript | None, owner: str) -> Answer | None:
        """None where only the model can answer, from the request's own messages.

        Raises EngineError for summaries only: a title always comes.
        """
        match side.kind:
            case Kind.TITLE:
                return await self._title(side, owner)
            case Kind.LANGUAGE:
                return Answer(language=language_of(side.quote.user))
            case Kind.SUMMARY:
                return Answer(await self._summary(*to_summarise(side.text)))
            case Kind.CHECKPOINT if transcript:
                return await self._checkpoint(transcript, owner)
        return None

    # -- titles ----------------------------------------------------------------------------------

    async def _title(self, side: Side, owner: str) -> Answer:
        spoken = side.quote.user or side.messages[-1][1]
        language, plain = language_of(spoken), first_words(side.quote.user)
        match self._settings.titles:
            case "off":
                return Answer(title=UNTITLED, language=language)
            case "first-words":
                return Answer(title=plain, language=language)
        try:
            async with asyncio.timeout(self._settings.title_s):
                title, usage = await self._ask_for_title(side, owner)
        except (TimeoutError, EngineError, StoreError) as exc:
            log.info("no title from the model, the first words instead: %r", exc)
            return Answer(title=plain, language=language)
        return Answer(title=title or plain, language=language, usage=usage)

    async def _ask_for_title(self, side: Side, owner: str) -> tuple[str, Usage]:
        await asyncio.sleep(GRACE_S)
        await self._running.quiet(owner)
        context = await self._title_context(side, owner)
        generate = Generate(
            owner=owner,
            context=context,
            priority=Priority.SIDE,
            max_tokens=self._settings.title_tokens,
            sampling=SAMPLING,
            keep=False,
            thinks=False,
        )
        text: list[str] = []
        usage = NOTHING
        async with self._engine.generate(generate) as events:
            async for event in events:
                if isinstance(event, Delta):
                    text.append(event.text)
                elif isinstance(event, Finished):
                    usage = self._counted(event)
        return title_of(content_of("".join(text), self._engine.info)), usage

    def _counted(self, finished: Finished) -> Usage:
        usage = Usage(finished.prompt_tokens, finished.cached_tokens, finished.completion_tokens)
        self._metrics.tokens(
            SIDE,
            prompt=usage.prompt_tokens,
            cached=usage.cached_tokens,
            generated=usage.completion_tokens,
        )
        return usage

    async def _title_context(self, side: Side, owner: str) -> Context:
        """The request's own words, or, where that evaluates less, the chat itself with the
        instruction behind it."""
        own = [(role, shortened(text)) for role, text in side.messages]
        job = self._running.first_turn(owner, side.quote.user)
        if job is None:
            return _prompt(own)
        instruction = instruction_of(side.text)
        mine, behind = await self._counter.count(["\n".join(t for _, t in own), instruction])
        if mine <= behind + self._settings.title_tokens:
            return _prompt(own)
        return await self._behind_the_chat(job, instruction)

    async def _behind_the_chat(self, job: Job, instruction: str) -> Context:
        model = await self._engine.model()
        history = await revisit(
            self._store,
            self._counter,
            job.owner,
            job.conversation,
            job.digests,
            system=job.system,
            tools=job.tools,
        )
        context = self._context(history, model)
        asked = (*context.messages, ContextMessage(USER, (instruction,)))
        return replace(context, messages=asked, continues=False)

    def _context(self, history: History, model: ModelInfo) -> Context:
        limits = self._policy.limits(model.budget.window_tokens)
        room = room_for(model.budget, limits, max_tokens=None)
        return context_for(history, self._policy, room, tokenizer=model.fingerprint).context

    # -- summaries -------------------------------------------------------------------------------

    async def _checkpoint(self, transcript: Transcript, owner: str) -> Answer | None:
        """From what is stored of the chat: its summaries, and sentences of the turns behind them.
        None for a chat that is not known."""
        chat = without_instruction(transcript)
        try:
            history = await recognise(
                self._store,
                self._counter,
                owner,
                chat,
                system="",
                told=summary_of(transcript),
                split=False,
            )
        except StoreError as exc:
            log.warning("a checkpoint without memory: %s", exc)
            return None
        if not history.n_stored and not history.written:
            return None
        blocks = "\n\n".join(block.text for block in history.written)
        behind = [Message(n.role, n.text) for n in history.behind(history.written)]
        return Answer(await self._summary(blocks, behind))

    async def _summary(self, current: str, new: Sequence[Message]) -> str:
        """`current` and sentences of `new` behind it, in the room that a few summaries have."""
        model = await self._engine.model()
        summary_tokens = self._policy.limits(model.budget.window_tokens).summary_tokens
        most = max(summary_tokens, CHECKPOINT_BLOCKS * summary_tokens - _estimate(current))
        # Reading a long chat takes a second of pure computation: not on the event loop.
        added = await asyncio.to_thread(summarize.extractive, new, max_tokens=most, count=_estimate)
        return "\n\n".join(filter(None, (current, added)))


def message_for(form: Form, answer: Answer) -> dict[str, Any]:
    """The assistant's message with the answer, in the form that was asked for."""
    if answer.text:
        return {"role": "assistant", "content": answer.text, "refusal": None}
    return message_in(form, title=answer.title, language=answer.language)


def _prompt(messages: Sequence[tuple[str, str]]) -> Context:
    parts = tuple(ContextMessage(role, (text,)) for role, text in messages)
    if all(role != USER for role, _ in messages):
        # A title of 0.6 is one system message; templates want the user to speak.
        parts = tuple(replace(part, role=USER) for part in parts)
    return Context(parts, "", continues=False, shape=Shape(0, 0, 0, 0, 0, 0))


def _estimate(text: str) -> int:
    return ceil(len(text) / CHARS_PER_TOKEN)
