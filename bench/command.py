"""How a benchmark runs as a command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from bench.locomo import CHAT
from bench.servers import BenchError


def run(measure: Callable[[], int], *, with_chat: bool = False) -> int:
    """The exit status. What cannot go on is told in one line; `with_chat` says that without the
    chat from beside the checkout there is nothing to do."""
    # A plain death would leave the servers behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if with_chat and not CHAT.exists():
        print(f"skipped: {CHAT.name} is not there (shared/data/locomo beside the checkout)")
        return 0
    try:
        return measure()
    except BenchError as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 1
