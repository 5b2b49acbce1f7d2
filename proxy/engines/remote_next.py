"""Makes the chat that is likely to be next ready, on a server with one sequence, while it is
quiet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from memory.context import Context, Shape
from proxy.engines.base import EngineError, Generate, Priority
from proxy.engines.remote_call import Call
from proxy.engines.remote_server import Kind
from proxy.engines.remote_session import Session
from proxy.engines.remote_turns import Turns

AHEAD_S = 1.0
"""Quiet time before it begins: whoever asks a title does so at once."""
NO_CONTEXT = Context((), "", False, Shape(0, 0, 0, 0, 0, 0))


class NextChat:
    """At most one task at a time. `on_failure` is told what went wrong with the server."""

    def __init__(
        self, turns: Turns, *, queue_s: float, on_failure: Callable[[EngineError], None]
    ) -> None:
        self._turns = turns
        self._queue_s = queue_s
        self._on_failure = on_failure
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def at_work(self) -> bool:
        return self._task is not None and not self._task.done()

    def after(self, session: Session | None) -> None:
        """A request has ended, whichever way: the sequence may hold another chat now."""
        if self._stopped or session is None or session.server.kind is not Kind.LLAMA_CPP:
            return
        if not self.at_work:
            self._task = asyncio.create_task(self._make_ready(session), name="remote-next")

    def stop(self) -> None:
        self._stopped = True
        self.drop()

    def drop(self) -> None:
        """Leaves the chat at hand, which may be one to forget; the next request that ends begins
        anew."""
        if self._task:
            self._task.cancel()

    async def _make_ready(self, session: Session) -> None:
        await asyncio.sleep(AHEAD_S)
        try:
            await self._warm(session)
        except EngineError as exc:
            self._on_failure(exc)

    async def _warm(self, session: Session) -> None:
        """Interrupted by any other request; the next one that ends begins it anew."""
        request = Generate(
            owner="", context=NO_CONTEXT, priority=Priority.BACKGROUND, max_tokens=0, keep=False
        )
        call = Call(request, self._turns.enter(Priority.BACKGROUND))
        try:
            await call.ticket.turn(within_s=self._queue_s)
            with call.ticket.scope:
                if messages := session.rotation.next():
                    whose = session.rotation.whose()
                    await session.warm_in_steps(call, messages, whose=whose)
        finally:
            self._turns.leave(call.ticket)
