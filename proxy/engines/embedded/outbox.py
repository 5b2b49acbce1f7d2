"""Frames from the model process to its parent."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from proxy.engines.embedded import protocol
from proxy.engines.embedded.protocol import Reply, Text

TEXT_WAITS_S = 0.04
"""Longest time that a piece of an answer may wait for the next one, to go in one write with it.
Each write wakes the parent, and where the model's threads fill the machine that costs them 0.2 ms:
4 % of a token of a small model. A model that takes longer for a token waits for nothing."""


class Outbox:
    """Frames to the parent, whole ones, from either thread."""

    def __init__(self, fd: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._fd = fd
        self._clock = clock
        self._lock = threading.Lock()
        self._posted: list[bytes] = []
        self.urgent = False
        """Whether anything but text was posted: that does not wait."""
        self._flushed_at = self._stepped_at = clock()

    def send(self, frame: Reply) -> None:
        """Now."""
        self._write(protocol.encode(frame))

    def post(self, frame: Reply) -> None:
        """With the next `flush`; the engine thread only. Eight answers a batch in one write instead
        of eight: each wakes the parent, which takes its time from the model's threads.
        """
        self._posted.append(protocol.encode(frame))
        self.urgent = self.urgent or not isinstance(frame, Text)

    def flush(self) -> None:
        """What was posted, in that order."""
        self.urgent, self._flushed_at = False, self._clock()
        if self._posted:
            data, self._posted = b"".join(self._posted), []
            self._write(data)

    def flush_due(self) -> None:
        """After a step that is followed by another: text waits while the next one will be in time,
        if it takes as long as the last.
        """
        now = self._clock()
        step_s, self._stepped_at = now - self._stepped_at, now
        if self.urgent or now + step_s > self._flushed_at + TEXT_WAITS_S:
            self.flush()

    def _write(self, data: bytes) -> None:
        with self._lock:
            while data:
                data = data[os.write(self._fd, data) :]
