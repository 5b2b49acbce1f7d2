"""Writes one summary: asks the model, checks what came back, falls back to sentences of the
source.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

from memory import summarize
from memory.context import (
    SYSTEM,
    Context,
    ContextMessage,
    Room,
    Shape,
    assemble,
    block_text,
)
from memory.conversations import History
from memory.policy import Limits, Policy
from memory.ports import Budget, Completer, TokenCounter
from memory.records import EXTRACTIVE, MODEL, Node, Summary
from memory.system import note_text
from memory.transcript import USER, Message

REPLY_FACTOR = 1.5
"""How much longer than a summary may be the model may write before it is cut off."""

INSTRUCTION_TOKENS = 200
"""Room for the built-in instructions around a source in a fresh prompt."""


@dataclass(frozen=True, slots=True)
class Task:
    """What to write: a block for `nodes`, from turns, or in place of the two blocks `merged`."""

    nodes: tuple[Node, ...]
    merged: tuple[Summary, ...] = ()
    at_once: bool = False
    """From sentences of the source, without asking the model."""

    @property
    def rank(self) -> int:
        return max((s.rank for s in self.merged), default=-1) + 1

    @property
    def source(self) -> list[Message]:
        return [Message(n.role, n.text) for n in self.nodes]


@dataclass(frozen=True, slots=True)
class Draft:
    """A finished text and how it came about."""

    text: str
    made_by: str
    failed_checks: tuple[str, ...]


Redraft = Callable[[Task, Draft], Draft]
"""Puts another text in the place of the one that was written for a task."""


def as_written(task: Task, draft: Draft) -> Draft:
    return draft


@dataclass(frozen=True, slots=True)
class Scribe:
    """Knows a policy and a model; holds no state."""

    completer: Completer
    counter: TokenCounter
    policy: Policy
    budget: Budget

    @property
    def limits(self) -> Limits:
        return self.policy.limits(self.budget.window_tokens)

    @property
    def style(self) -> summarize.Style:
        return summarize.Style(
            max_tokens=self.limits.summary_tokens,
            language=self.policy.language,
            prompt=self.policy.prompt,
        )

    async def summary(
        self,
        history: History,
        task: Task,
        *,
        model: str,
        clock: Callable[[], float],
        redraft: Redraft = as_written,
    ) -> Summary:
        """What `write` gives, as it will be stored; its id is 0. Raises ModelGone."""
        started = clock()
        draft = redraft(task, await self.write(history, task))
        (n_tokens,) = await self.counter.count([block_text(draft.text)])
        return Summary(
            id=0,
            conversation=history.conversation,
            first_depth=task.nodes[0].depth,
            last_depth=task.nodes[-1].depth,
            first_digest=task.nodes[0].digest,
            last_digest=task.nodes[-1].digest,
            rank=task.rank,
            parents=tuple(s.id for s in task.merged),
            text=draft.text,
            n_tokens=n_tokens,
            tokenizer=self.counter.tokenizer,
            made_by=draft.made_by,
            model=model,
            policy_digest=self.policy.digest,
            prompt_version=summarize.PROMPT_VERSION,
            failed_checks=draft.failed_checks,
            duration_s=clock() - started,
            created_at=started,
            generation=max((s.generation for s in task.merged), default=0),
        )

    async def write(self, history: History, task: Task) -> Draft:
        """Raises ModelGone; then nothing was written and the same task can be given again."""
        text, failed = "", tuple[str, ...]()
        if self.policy.method == MODEL and not task.at_once:
            text, failed = await self._ask(history, task)
        made_by = MODEL if text and not failed else EXTRACTIVE
        # Reading a long span takes a second of pure computation: not on the event loop.
        text = await asyncio.to_thread(self._polish, text if made_by == MODEL else "", task)
        return Draft(text, made_by, failed)

    def _polish(self, text: str, task: Task) -> str:
        """The model's text, or else sentences of the source, with the list of exact facts."""
        count = _rate(task.nodes)
        if not text:
            most = self.style.max_tokens
            text = summarize.extractive(task.source, max_tokens=most, count=count)
        return summarize.finish(text, task.source, style=self.style, count=count)

    async def _ask(self, history: History, task: Task) -> tuple[str, tuple[str, ...]]:
        """The model's own text and the names of the checks it failed."""
        context = await self._request(history, task)
        reply = await self.completer.complete(
            history.owner,
            context,
            conversation=history.conversation,
            max_tokens=self._reply_tokens,
        )
        text = summarize.clean(reply.text)
        (n_tokens,) = await self.counter.count([text])
        # The model may name whatever it was shown: earlier summaries and the system prompt too.
        shown = [Message(USER, m.text) for m in context.messages[:1] if m.role == SYSTEM]
        check = partial(summarize.check, n_tokens=n_tokens, style=self.style)
        return text, await asyncio.to_thread(check, text, [*shown, *task.source])

    @property
    def _reply_tokens(self) -> int:
        return ceil(self.style.max_tokens * REPLY_FACTOR)

    async def _request(self, history: History, task: Task) -> Context:
        if self.policy.ask_on == "cached" and not task.merged:
            return await self._on_cached_prefix(history, task)
        if task.merged and not (self.policy.merge_from == "originals" and self._fits(task.nodes)):
            return _prompt(*summarize.merge_messages(self.style, [s.text for s in task.merged]))
        return _prompt(*summarize.fresh_messages(self.style, task.source))

    async def _on_cached_prefix(self, history: History, task: Task) -> Context:
        """The conversation's own context up to the end of the span, and the instruction behind it:
        all but the instruction is in the KV cache."""
        sample = "\n".join(m.text for m in task.source[-8:])
        text = summarize.instruction(self.style, sample=sample)
        (n_tokens,) = await self.counter.count([text])
        question = Node(
            digest=b"",
            parent=b"",
            depth=-1,
            role=USER,
            text=text,
            n_tokens=n_tokens,
            tokenizer=self.counter.tokenizer,
        )
        return assemble(
            system=history.system,
            blocks=history.active,
            nodes=(*task.nodes, question),
            room=self._room,
            tokenizer=self.counter.tokenizer,
        )

    @property
    def _room(self) -> Room:
        return Room(
            prompt_tokens=self.budget.window_tokens - self._reply_tokens,
            message_tokens=self.budget.message_tokens,
            base_tokens=self.budget.base_tokens,
            step_tokens=self.limits.step_tokens,
        )

    def _fits(self, nodes: Sequence[Node]) -> bool:
        source = sum(n.n_tokens + self.budget.message_tokens for n in nodes)
        return source + self._reply_tokens + INSTRUCTION_TOKENS <= self.budget.window_tokens


def _prompt(system: str, user: str) -> Context:
    """A prompt of its own, outside every conversation."""
    messages = (ContextMessage(SYSTEM, (system,)), ContextMessage(USER, (user,)))
    return Context(messages, "", continues=False, shape=Shape(0, 0, 0, 0, 0, 0))


def _rate(nodes: Sequence[Node]) -> Callable[[str], int]:
    """Tokens of a text at the rate of tokens per character that the span itself has.

    An estimate, for choosing sentences: a call to the tokenizer for each of them would be exact
    and slow. What is stored is counted exactly afterwards.
    """
    characters = sum(len(note_text(n.note)) + len(n.text) for n in nodes)
    rate = sum(n.n_tokens for n in nodes) / characters if characters else 0.5
    return lambda text: ceil(len(text) * rate)
