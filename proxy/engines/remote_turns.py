"""Who is served next by a server that serves few requests at a time. No I/O."""

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

    async def turn(self, *, within_s: float) -> None:
        """Returns when it is this one's turn. Raises QueueFull after `within_s` seconds."""
        with anyio.move_on_after(within_s):
            await self.granted.wait()
        if not self.granted.is_set():
            raise QueueFull(f"The request has waited {within_s:g} seconds for its turn.")


class Turns:
    """A line with `places` turns at a time: the best class first, within a class who came first.

    With `exclusive` a class begins only while no better one runs, for a server whose processor all
    share; who comes in a better class interrupts all others. Without it, only one of them, and only
    when there is no place left. Whoever is `held` is never interrupted.
    """

    def __init__(self, *, limit: int, places: int = 1, exclusive: bool = True) -> None:
        self._limit = limit
        self._places = places
        self._exclusive = exclusive
        self._numbers = count()
        self._waiting: list[Ticket] = []
        self._running: list[Ticket] = []
        self._announced = 0
        self.interruptions = 0

    def __repr__(self) -> str:
        waiting = {p.name.lower(): n for p, n in zip(Priority, self.waiting(), strict=True)}
        return f"<Turns running={len(self._running)}/{self._places} waiting={waiting}>"

    def resize(self, *, places: int, exclusive: bool) -> None:
        """For a server of another kind. Turns that run go on."""
        self._places, self._exclusive = places, exclusive
        self._call_next()

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
        if ticket in self._running:
            self._running.remove(ticket)
        elif ticket in self._waiting:
            self._waiting.remove(ticket)
        self._call_next()

    def announce(self) -> None:
        """A user's request is about to enter: nothing else begins until `arrived`."""
        self._announced += 1

    def arrived(self) -> None:
        """One that was announced has entered, or will not."""
        self._announced -= 1
        self._call_next()

    def would_wait(self, priority: Priority) -> bool:
        """Whether one of this class would have to wait for somebody who is not interrupted."""
        staying = [t for t in self._running if t.held or t.priority <= priority]
        ahead = any(t.priority <= priority for t in self._waiting)
        return ahead or len(staying) >= self._places

    def running(self) -> tuple[int, ...]:
        """How many of each class have their turn."""
        return _by_class(self._running)

    def waiting(self) -> tuple[int, ...]:
        """How many of each class wait."""
        return _by_class(self._waiting)

    def check_integrity(self) -> None:
        """Raises AssertionError when the line is out of order."""
        assert len(set(map(id, self._running + self._waiting))) == sum(
            (*self.running(), *self.waiting())
        )
        assert all(t.granted.is_set() for t in self._running)
        assert all(not t.granted.is_set() for t in self._waiting)
        best = min(self._waiting, key=lambda t: t.place, default=None)
        assert best is None or not self._may_run(best)

    def _join(self, ticket: Ticket) -> None:
        self._waiting.append(ticket)
        self._call_next()
        if self._exclusive or not ticket.granted.is_set():
            self._interrupt_for(ticket)

    def _call_next(self) -> None:
        while self._waiting:
            best = min(self._waiting, key=lambda ticket: ticket.place)
            if not self._may_run(best):
                return
            self._waiting.remove(best)
            self._running.append(best)
            best.granted.set()

    def _may_run(self, ticket: Ticket) -> bool:
        is_room = len(self._running) < self._places
        behind = self._exclusive and any(t.priority < ticket.priority for t in self._running)
        announced = self._announced > 0 and ticket.priority is not Priority.CHAT
        return is_room and not behind and not announced

    def _interrupt_for(self, ticket: Ticket) -> None:
        lower = [t for t in self._running if t.priority > ticket.priority]
        if not self._exclusive:
            # Who came last has lost least.
            lower = sorted(lower, key=lambda t: t.place)[-1:]
        for running in lower:
            if not (running.held or running.interrupted):
                running.interrupted = True
                running.interruptions += 1
                self.interruptions += 1
                running.scope.cancel()


def _by_class(tickets: list[Ticket]) -> tuple[int, ...]:
    return tuple(sum(t.priority is p for t in tickets) for p in Priority)
