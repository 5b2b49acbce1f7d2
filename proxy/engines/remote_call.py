"""One request to a remote server on its way: what came of it so far, and who reads it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import anyio

from proxy.engines.base import (
    Delta,
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    Event,
    Finished,
    Generate,
    Priority,
    Started,
)
from proxy.engines.remote_answer import AnswerText
from proxy.engines.remote_stream import Details, Piece, Timings, Usage
from proxy.engines.remote_turns import Ticket

STOPPED_SHORT = ("abort", "error")
"""The finish_reason that vLLM and SGLang give to an answer they gave up."""


class Call:
    """Written by the task that speaks with the server, read by the one that asked.

    Background work is handed out only when it is complete: until then it can be interrupted and
    begun anew. Whatever else has given something out is interrupted no more, and whatever was
    interrupted gives nothing out.
    """

    def __init__(self, request: Generate, ticket: Ticket) -> None:
        self.request = request
        self.ticket = ticket
        self.life = anyio.CancelScope()
        """Cancelled when nobody wants the answer any more."""
        self.finished = False
        self.forgotten = False
        """Whether its owner was forgotten meanwhile: nothing of it is kept for later."""
        self.estimate_tokens = 0
        """How long the prompt is believed to be until the server says it."""
        self._out: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._entered_at = anyio.current_time()
        self.begin(self._entered_at)

    def begin(self, now: float) -> None:
        """A new attempt: what an earlier one had is forgotten."""
        self.finish_reason = ""
        self.usage: Usage | None = None
        self.timings: Timings | None = None
        self.completion_tokens: int | None = None
        """Counted here, where the server does not report it."""
        self._texts: list[str] = []
        self._answer = AnswerText()
        self._held: list[Event] = []
        self._began_at = now
        self._started_at = 0.0
        self._ended_at = 0.0

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def started(self) -> bool:
        return self._started_at > 0

    @property
    def warms(self) -> bool:
        return self.request.max_tokens == 0

    # -- the writer ------------------------------------------------------------------------------

    def take(self, piece: Piece, now: float) -> None:
        """A frame of the answer. Raises EngineCrashed when the server gave it up."""
        if not self.started:
            self._started_at = now
            self._give(Started(self.estimate_tokens, 0))
        if piece.finish_reason in STOPPED_SHORT:
            raise EngineCrashed("The upstream server gave up its answer.")
        text = self._answer.feed(piece) + (self._answer.close() if piece.finish_reason else "")
        # A call is held to its end; that more of it came is told, or it would look like silence.
        if (text or piece.logprobs or piece.calls) and not self.warms:
            self._texts.append(text)
            self._give(Delta(text, logprobs=piece.logprobs))
        if piece.finish_reason:
            self.finish_reason = "length" if piece.finish_reason == "length" else "stop"
            self._ended_at = now
            self.ticket.hold()

    def warmed(self, *, prompt_tokens: int, cached_tokens: int, now: float) -> None:
        """The whole of a warming request, where it was not streamed."""
        details = Details(cached_tokens=cached_tokens)
        usage = Usage(
            prompt_tokens=prompt_tokens, completion_tokens=0, prompt_tokens_details=details
        )
        self.take(Piece(opens=True, finish_reason="length"), now)
        self.usage = usage

    def check_complete(self) -> None:
        """Raises EngineCrashed when the answer has no end: it was cut off."""
        if not self.finish_reason:
            raise EngineCrashed("The upstream server ended its answer before it was complete.")

    def finish(self, *, prompt_tokens: int, completion_tokens: int) -> None:
        """Hands out the last event, and all others before it."""
        finished = Finished(
            finish_reason="length" if self.warms else self.finish_reason,
            prompt_tokens=prompt_tokens,
            cached_tokens=min(self._cached_tokens, prompt_tokens),
            completion_tokens=0 if self.warms else completion_tokens,
            token_ids=None,
            queued_s=self._began_at - self._entered_at,
            prefill_s=self._prefill_s,
            decode_s=self._ended_at - self._started_at,
        )
        for event in (*self._held, finished):
            self._out.put_nowait(event)
        self.finished = True

    @property
    def _cached_tokens(self) -> int:
        reported = self.usage.cached_tokens if self.usage else 0
        return reported or (self.timings.cache_n or 0 if self.timings else 0)

    @property
    def _prefill_s(self) -> float:
        told_ms = self.timings.prompt_ms if self.timings else None
        return self._started_at - self._began_at if told_ms is None else told_ms / 1000

    def fail(self, error: EngineError) -> None:
        self._out.put_nowait(error)

    def end(self, task: asyncio.Task[None]) -> None:
        """For the task that speaks with the server, when it is done: no reader waits for ever."""
        failed = None if task.cancelled() else task.exception()
        self._out.put_nowait(failed or EngineUnavailable("The request was taken back."))

    def _give(self, event: Event) -> None:
        # Whoever was interrupted in the same pass of the loop in which this came is to begin anew.
        if self.request.priority is Priority.BACKGROUND or self.ticket.interrupted:
            self._held.append(event)
        else:
            self.ticket.hold()
            self._out.put_nowait(event)

    # -- the reader ------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[Event, None]:
        """Raises EngineError."""
        while True:
            item = await self._out.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if isinstance(item, Finished):
                return
