"""What the child processes of test_store_processes.py do. Run as a script."""

from __future__ import annotations

import asyncio
import resource
import sys
from pathlib import Path

from store_samples import talk

from memory.store import Bounds, Store, StoreUnavailable

PADDING = "so it goes on for a while " * 20


def say(line: str) -> None:
    print(line, flush=True)


async def write_for_ever(path: Path, name: str) -> None:
    """Prints the digest of each turn once it is acknowledged."""
    store = await Store.open(path)
    conversation, last, i = None, None, 0
    while True:
        turn = talk(f"{name} asks {i} {PADDING}", f"{name} hears {i} {PADDING}", after=last)
        conversation = await store.append("ann", turn, conversation=conversation)
        last, i = turn[-1], i + 1
        say(last.digest.hex())


async def open_each(name: str) -> None:
    """For each path on stdin: opens, stores one turn, finds it, closes."""
    for line in sys.stdin:
        store = await Store.open(Path(line.strip()))
        turn = talk(f"{name} here", "welcome")
        await store.append(name, turn, conversation=None)
        assert await store.nodes(name, [node.digest for node in turn]) == turn
        await store.close()
        say("done")


async def run_into_a_limit(path: Path) -> None:
    """A write past the largest file size allowed is an I/O error; raised again, it heals."""
    store = await Store.open(path, bounds=Bounds(busy_s=0.1))
    first, second = talk("one", "two"), talk("x " * 200_000, "y")
    await store.append("ann", first, conversation=None)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        await store.append("ann", second, conversation=None)
        say("stored in spite of the limit")
    except StoreUnavailable:
        say("unavailable" if store.degraded else "not degraded")
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    await store.append("ann", second, conversation=None)
    found = await store.nodes("ann", [node.digest for node in first + second])
    say("healed" if len(found) == 4 and not store.degraded else "still ill")
    await store.close()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", path, name]:
            asyncio.run(write_for_ever(Path(path), name))
        case ["open", name]:
            say("ready")
            asyncio.run(open_each(name))
        case ["limit", path]:
            asyncio.run(run_into_a_limit(Path(path)))
