"""Watches a server that may come and go: asked until it is there, looked at again now and then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import anyio

from proxy.engines.base import EngineError, Priority, QueueFull
from proxy.engines.remote_http import Unreachable
from proxy.engines.remote_probe import Found, Probe
from proxy.engines.remote_turns import Turns

log = logging.getLogger("chatfold.engine")

ASK_S = 30.0
"""Longest time for the server to say what it is."""
BACKOFF_FIRST_S = 0.1
BACKOFF_MOST_S = 5.0


class Watch:
    """One task. `on_found` is called with the server each time that it was asked in full: at first,
    after it was lost, and when a look at it showed another one."""

    def __init__(
        self,
        probe: Probe,
        turns: Turns,
        *,
        shown: str,
        recheck_s: float,
        on_found: Callable[[Found], None],
    ) -> None:
        self._probe = probe
        self._turns = turns
        self._shown = shown
        self._recheck_s = recheck_s
        self._on_found = on_found
        self._sight: object = None
        self._lost = asyncio.Event()
        """Set while it is not known whether the server is there, or whether it is the same."""
        self._lost.set()
        self._task: asyncio.Task[None] | None = None
        self.known = asyncio.Event()
        """Set once the server was found for the first time."""
        self._heard = asyncio.Event()
        """Set once it was found, or was not: a first question is over."""
        self.trouble = ""
        self.times_found = 0

    def __repr__(self) -> str:
        return f"<Watch {self._shown} {'there' if self.there else self.trouble or 'asking'}>"

    @property
    def there(self) -> bool:
        return self.known.is_set() and not self._lost.is_set()

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="remote-watch")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def until_known(self, *, within_s: float) -> None:
        """Waits for a server that was never found, so long; and to the end of the first question,
        ASK_S at most: a slow server is at work on its answer."""
        with anyio.move_on_after(within_s):
            await self.known.wait()
        if not self._heard.is_set():
            with anyio.move_on_after(ASK_S):
                await self._heard.wait()

    def take_note(self, exc: EngineError) -> None:
        """Of a request that failed: a server that cannot be reached may come back as another."""
        if isinstance(exc, Unreachable):
            self._lose(str(exc))

    def _lose(self, why: str) -> None:
        if why != self.trouble:
            log.warning("%s", why)
        self.trouble = why
        self._lost.set()
        self._heard.set()

    async def _watch(self) -> None:
        while True:
            with anyio.move_on_after(self._recheck_s):
                await self._lost.wait()
            if not self._lost.is_set():
                await self._look()
            backoff_s = BACKOFF_FIRST_S
            while self._lost.is_set() and not await self._ask():
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, BACKOFF_MOST_S)

    async def _look(self) -> None:
        """A short question, while nobody else asks one."""
        if not any((*self._turns.running(), *self._turns.waiting())):
            await self._in_turn(self._compare)

    async def _compare(self) -> None:
        if await self._probe.sight() != self._sight:
            self._lose(f"The upstream server {self._shown} is not the one that it was.")

    async def _ask(self) -> bool:
        """Whether the server said what it is."""
        await self._in_turn(self._identify)
        return not self._lost.is_set()

    async def _in_turn(self, question: Callable[[], Awaitable[None]]) -> None:
        """Takes a turn like any request: llama_cpp.server breaks off an answer for a question like
        this too. A user's request interrupts it; then it is asked again later."""
        try:
            ticket = self._turns.enter(Priority.BACKGROUND)
        except QueueFull:
            return
        try:
            await ticket.granted.wait()
            with ticket.scope as scope:
                scope.deadline = anyio.current_time() + ASK_S
                await question()
            if scope.cancelled_caught and not ticket.interrupted:
                self._lose("The upstream server does not answer.")
        except EngineError as exc:
            self._lose(str(exc))
        finally:
            self._turns.leave(ticket)

    async def _identify(self) -> None:
        found = await self._probe.found()
        self._sight = await self._probe.sight()
        self._on_found(found)
        self.trouble = ""
        self.times_found += 1
        self._lost.clear()
        self.known.set()
        self._heard.set()
