"""The order of events as JSON lines, for benchmarks and tests. Off unless CHATFOLD_TRACE names a
file.

Every line is `{"t": monotonic seconds, "event": name, ...}`. The model process writes to the same
file: lines are appended whole, and the clock is the machine's.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class Trace:
    def __init__(self, path: str) -> None:
        """Opens the file for appending; "" switches the trace off."""
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if path else -1

    def __bool__(self) -> bool:
        """Whether anybody listens."""
        return self._fd >= 0

    def __call__(self, event: str, /, **fields: object) -> None:
        if self._fd >= 0:
            line = {"t": round(time.monotonic(), 6), "event": event, **fields}
            os.write(self._fd, (json.dumps(line) + "\n").encode())

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read(path: Path) -> list[dict[str, Any]]:
    """What happened so far, in the order of the file; nothing where there is none yet.

    A line counts once its end is there: the file may be read while it is written.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines]
