"""Looking after the store while nobody waits: retention and giving free space back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from memory.store import Store, StoreError
from proxy.config import RetentionConfig

log = logging.getLogger("chatfold.upkeep")

DAY_S = 86_400.0
LOOK_AGAIN_S = 5.0
"""How soon to look again when the proxy was not idle."""


class Upkeep:
    """Owns one task. Works only while `idle()` says that no request and no summary is under way."""

    def __init__(
        self,
        *,
        store: Store,
        retention: RetentionConfig,
        idle: Callable[[], bool],
        forget: Callable[[str], Awaitable[None]],
    ) -> None:
        """`forget` is told of each owner of whom something was deleted."""
        self._forget = forget
        self._store = store
        self._retention = retention
        self._idle = idle
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Does nothing where the configuration sets no limit."""
        r = self._retention
        if r.max_age_days or r.max_conversations or r.max_bytes:
            self._task = asyncio.create_task(self._work(), name="upkeep")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def prune(self) -> int:
        """Deletes what is over the limits and gives its space back. Returns how many
        conversations.
        """
        r = self._retention
        pruned = await self._store.prune(
            max_age_s=r.max_age_days * DAY_S or None,
            max_conversations=r.max_conversations or None,
            max_bytes=r.max_bytes or None,
        )
        for owner in pruned:
            await self._forget(owner)
        if pruned:
            await self._store.vacuum()
            log.info("retention: %d conversations deleted", pruned.total())
        return pruned.total()

    async def _work(self) -> None:
        while True:
            pause_s = LOOK_AGAIN_S
            if self._idle():
                pause_s = self._retention.every_s
                try:
                    await self.prune()
                except StoreError as exc:
                    log.warning("retention could not be carried out now: %s", exc)
            await asyncio.sleep(pause_s)
