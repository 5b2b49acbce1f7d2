"""Empties what forgetting left in the slots and files of a server, in the background."""

from __future__ import annotations

import asyncio
import logging

from proxy.engines.base import EngineError
from proxy.engines.remote_seats import Seats
from proxy.engines.remote_session import Session

log = logging.getLogger("chatfold.engine")


class Emptying:
    """One task at a time. What it cannot do stays in the session's books: to be called again behind
    each request, and when the server is found."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def at_work(self) -> bool:
        return not all(task.cancelling() for task in self._tasks)

    def go_on(self, session: Session | None) -> None:
        if session and session.server.saves_slots and session.seats.owes and not self.at_work:
            task = asyncio.create_task(_empty(session.seats), name="remote-forget")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def anew(self, session: Session, earlier: Session) -> None:
        """The server was found again: what was asked of the earlier one is asked of this one."""
        session.seats.take_over(earlier.seats)
        for task in self._tasks:
            task.cancel()
        self.go_on(session)

    async def stop(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)


async def _empty(seats: Seats) -> None:
    try:
        await seats.empty()
    except EngineError as exc:
        log.warning("slots were not emptied: %s", exc)
