"""One request to a remote server on its way: what came of it so far, and who reads it."""

from __future__ import annotations

import asyncio

import anyio

from proxy.engines.base import (
    Event,
    Generate,
)
from proxy.engines.remote_stream import Usage
from proxy.engines.remote_turns import Ticket

STOPPED_SHORT = ("abort", "error")
"""A finish_reason of vLLM and SGLang for an answer that they gave up."""


class Call:
    """Written by the task that speaks with the server, read by the one that asked.

    Background work is handed out only when it is complete: until then it can be interrupted and
    begun anew. Whatever else has given something out is interrupted no more.
    """

    def __init__(self, request: Generate, ticket: Ticket) -> None:
        self.request = request
        self.ticket = ticket
        self.life = anyio.CancelScope()
        """Cancelled when nobody wants the answer any more."""
        self.finished = False
        self._entered_at = anyio.current_time()
        self._out: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self.begin(self._entered_at)

    def begin(self, now: float) -> None:
        """A new attempt: what an earlier one had is forgotten."""
        self.finish_reason = ""
        self.usage: Usage | None = None
        self.text = ""
        self._texts: list[str] = []
        self._held: list[Event] = []
        self._began_at = now
        self._started_at = 0.0
        self._ended_at = now

    @property
    def warms(self) -> bool:
        return self.request.max_tokens == 0
