"""Writers that are killed at random instants, and processes that open one store at once.

The processes and the helpers are those of tests/memory/test_store_processes.py.
"""

from __future__ import annotations

import importlib
import random
import signal
import sqlite3
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sqlite_utils import Database

from memory.database import immediate
from memory.migrations import MIGRATIONS
from memory.search import is_unspaced
from memory.store import integrity
from memory.transcript import ASSISTANT, USER, Message, chain, message_digest

TESTS = Path(__file__).resolve().parents[1] / "tests/memory"
PROCESSES = 8
WRITERS = 4
"""So many write to one store at the same time, and are killed one after the other."""
KILL_WITHIN_S = 0.25

TURN = (Message(USER, "Where is the lighthouse?"), Message(ASSISTANT, "京都駅の近くです"))
LATER_SCHEMAS = ("m0002_search", "m0003_overviews", "m0004_system_prompts_and_client_ids")
"""An old store is one that ends before one of these migrations."""


@dataclass(frozen=True, slots=True)
class Killed:
    kills: int
    acknowledged: int
    lost: int
    half_turns: int
    integrity: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Opened:
    on: str
    rounds: int
    processes: int
    failures: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def kills(n: int, *, seed: int = 9) -> Killed:
    """`n` writers, WRITERS at a time, each killed with SIGKILL at an instant of its own."""
    crash, chance = _test_helpers(), random.Random(seed)
    acknowledged: list[bytes] = []
    with tempfile.TemporaryDirectory(prefix="chatfold-bench-") as directory:
        path = Path(directory) / "store.db"
        for first in range(0, n, WRITERS):
            names = [f"writer {i}" for i in range(first, min(n, first + WRITERS))]
            acknowledged += _killed_writers(crash, path, names, chance)
        found = {node.digest for node in crash.stored(path, "ann", acknowledged)}
        return Killed(
            kills=n,
            acknowledged=len(acknowledged),
            lost=sum(digest not in found for digest in acknowledged),
            half_turns=_half_turns(path),
            integrity=integrity(path),
        )


def _killed_writers(
    crash: ModuleType, path: Path, names: list[str], chance: random.Random
) -> list[bytes]:
    """What they acknowledged. All of them write when the first is killed."""
    lines: list[str] = []
    with ExitStack() as stack:
        writers = [stack.enter_context(crash.child("write", str(path), name)) for name in names]
        lines += [crash.read_line(writer) for writer in writers]
        for writer in writers:
            time.sleep(chance.uniform(0, KILL_WITHIN_S / len(writers)))
            writer.send_signal(signal.SIGKILL)
        for writer in writers:
            # Not communicate(): it passes over what read_line() has read ahead. The last line may
            # be cut off: then it was not acknowledged.
            lines += writer.stdout.read().split("\n")[:-1]
    return [bytes.fromhex(line) for line in lines]


def _half_turns(path: Path) -> int:
    """Questions without their answer: the writers store both at once."""
    with closing(sqlite3.connect(path)) as conn:
        query = (
            "SELECT count(*) FROM messages AS question WHERE role = 'user' AND NOT EXISTS "
            "(SELECT 1 FROM messages AS answer WHERE answer.parent = question.id)"
        )
        return int(conn.execute(query).fetchone()[0])


def openings(rounds: int, *, old: bool) -> Opened:
    """PROCESSES that open, migrate and write one store at the same moment, `rounds` times."""
    crash = _test_helpers()
    failures = 0
    with tempfile.TemporaryDirectory(prefix="chatfold-bench-") as directory, ExitStack() as stack:
        processes = [stack.enter_context(crash.child("open", f"p{i}")) for i in range(PROCESSES)]
        assert [crash.read_line(process) for process in processes] == ["ready"] * PROCESSES
        for i in range(rounds):
            path = Path(directory) / f"{i}.db"
            if old:
                _old_store(path, before=LATER_SCHEMAS[i % len(LATER_SCHEMAS)])
            for process in processes:
                process.stdin.write(f"{path}\n")
                process.stdin.flush()
            failures += sum(crash.read_line(process) != "done" for process in processes)
            failures += len(integrity(path))
    return Opened("old schemas" if old else "empty", rounds, PROCESSES, failures)


def _old_store(path: Path, *, before: str) -> None:
    """A file as it was before this migration, with one turn in it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        db = Database(conn, execute_plugins=False)
        with immediate(db):
            MIGRATIONS.apply(db, stop_before=before)
        with immediate(db):
            conn.execute("INSERT INTO owners (id, key) VALUES (1, 'old')")
            conn.execute("INSERT INTO conversations VALUES ('c', 1, 1.0, 1.0)")
            for depth, (message, digest) in enumerate(zip(TURN, chain(TURN), strict=True)):
                conn.execute(
                    "INSERT INTO messages (id, owner, conversation, parent, depth, role, text,"
                    " n_tokens, tokenizer, digest, message_digest, unspaced, created_at)"
                    " VALUES (?, 1, 'c', ?, ?, ?, ?, 5, 'old', ?, ?, ?, 1.0)",
                    (
                        *(depth + 1, depth or None, depth, message.role, message.text),
                        *(digest, message_digest(message), is_unspaced(message.text)),
                    ),
                )


def _test_helpers() -> ModuleType:
    # The tests are no package: pytest finds them by their directory, and so does this.
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    return importlib.import_module("test_store_processes")
