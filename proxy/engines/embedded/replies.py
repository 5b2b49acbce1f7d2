"""What the model process says, read as it comes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from proxy.engines.embedded import protocol

log = logging.getLogger("chatfold.engine")


class Replies(asyncio.Protocol):
    """Hands each whole frame to `dispatch`, in the very turn of the event loop that read it.

    A stream would take three turns more for each token, and where the model's threads fill the
    machine the parent's time is theirs. `ended` is done when nothing more will come: the process
    closed its end, or wrote what is no frame.
    """

    def __init__(self, dispatch: Callable[[protocol.Reply], None]) -> None:
        self._dispatch = dispatch
        self._frames = protocol.Frames()
        self._transport: asyncio.BaseTransport | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self.ended.done():
            return
        try:
            for body in self._frames.feed(data):
                self._dispatch(protocol.reply(body))
        except (ValueError, msgspec.MsgspecError) as exc:
            # The two no longer understand each other: as good as dead.
            log.error("the model process wrote what is no frame: %s", exc)
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def close(self) -> None:
        """For when the process is gone: it would die of writing to a closed pipe."""
        if self._transport:
            self._transport.close()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
