"""Who is served next by a server that serves one request at a time. No I/O, no clock."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import count

import anyio

from proxy.engines.base import Priority, QueueFull


@dataclass(slots=True, eq=False)
class Ticket:
    """A place in the line. `scope` is the work of the present turn: whoever is interrupted finds it
    cancelled and `interrupted` set, and may enter the line again.

    `held` tickets are interrupted no more: what they gave out cannot be taken back.
    """

    priority: Priority
    number: int
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    held: bool = False
    interrupted: bool = False
    interruptions: int = 0

    @property
    def place(self) -> tuple[Priority, int]:
        return self.priority, self.number

    def hold(self) -> None:
        self.held = True


class Turns:
    """A line with one turn at a time: the best class first, within a class who came first.

    Who comes in a better class interrupts the one whose turn it is, unless that one is `held`.
    """

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._numbers = count()
        self._waiting: list[Ticket] = []
        self._running: Ticket | None = None
        self.interruptions = 0

    def __repr__(self) -> str:
        waiting = {p.name.lower(): n for p, n in zip(Priority, self.waiting(), strict=True)}
        return f"<Turns running={self._running is not None} waiting={waiting}>"

    def enter(self, priority: Priority) -> Ticket:
        """A place in the line; whoever takes one must `leave`. Raises QueueFull."""
        if len(self._waiting) >= self._limit:
            number = len(self._waiting)
            raise QueueFull(f"{number} requests are waiting already; try again shortly.")
        ticket = Ticket(priority, next(self._numbers))
        self._join(ticket)
        return ticket

    def again(self, ticket: Ticket) -> None:
        """Puts one that was interrupted and has left back at its old place."""
        ticket.granted.clear()
        ticket.interrupted = False
        ticket.scope = anyio.CancelScope()
        self._join(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Ends the turn or the wait; a second time does nothing."""
        if ticket is self._running:
            self._running = None
            self._call_next()
        elif ticket in self._waiting:
            self._waiting.remove(ticket)

    def running(self) -> tuple[int, ...]:
        """How many of each class have their turn."""
        return _by_class([self._running] if self._running else [])

    def waiting(self) -> tuple[int, ...]:
        """How many of each class wait."""
        return _by_class(self._waiting)

    def check_integrity(self) -> None:
        """Raises AssertionError when the line is out of order."""
        assert self._running not in self._waiting
        assert self._running is not None or not self._waiting
        assert all(not t.granted.is_set() for t in self._waiting)

    def _join(self, ticket: Ticket) -> None:
        self._waiting.append(ticket)
        if self._running is None:
            self._call_next()
        else:
            self._interrupt_for(self._running, ticket)

    def _call_next(self) -> None:
        if self._waiting:
            self._running = min(self._waiting, key=lambda ticket: ticket.place)
            self._waiting.remove(self._running)
            self._running.granted.set()

    def _interrupt_for(self, running: Ticket, ticket: Ticket) -> None:
        if ticket.priority < running.priority and not (running.held or running.interrupted):
            running.interrupted = True
            running.interruptions += 1
            self.interruptions += 1
            running.scope.cancel()


def _by_class(tickets: list[Ticket]) -> tuple[int, ...]:
    return tuple(sum(t.priority is p for t in tickets) for p in Priority)
