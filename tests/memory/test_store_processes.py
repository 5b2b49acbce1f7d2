"""The store under processes that are killed, that start together, and that run into a limit."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from store_samples import old_store, talk

import memory
from memory.records import Node
from memory.store import Store, integrity

HERE = Path(__file__).parent
ROOT_DIRECTORY = Path(memory.__file__).parent.parent
KILLS = int(os.environ.get("CHATFOLD_KILLS", "20"))
ROUNDS = int(os.environ.get("CHATFOLD_OPEN_ROUNDS", "5"))
PROCESSES = 8


@contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(HERE / "store_child.py"), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT_DIRECTORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def stored(path: Path, owner: str, digests: list[bytes]) -> list[Node]:
    async def look() -> list[Node]:
        store = await Store.open_read_only(path)
        try:
            return await store.nodes(owner, digests)
        finally:
            await store.close()

    return asyncio.run(look())


def killed_writer(path: Path, name: str, *, after_lines: int) -> list[bytes]:
    """The digests acknowledged by a writer that was killed in the midst of its work."""
    with child("write", str(path), name) as process:
        lines = [read_line(process) for _ in range(after_lines)]
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
    # The last line may be cut off: then it was not acknowledged.
    return [bytes.fromhex(line) for line in lines + rest.split("\n")[:-1]]


@pytest.mark.timeout(600)
def test_kill_9_loses_no_acknowledged_turn(tmp_path: Path) -> None:
    path, chance = tmp_path / "store.db", random.Random(9)
    acknowledged: list[bytes] = []
    for i in range(KILLS):
        acknowledged += killed_writer(path, f"writer {i}", after_lines=chance.randint(1, 40))
    assert len(acknowledged) >= KILLS
    found = {node.digest for node in stored(path, "ann", acknowledged)}
    assert [digest for digest in acknowledged if digest not in found] == []
    assert integrity(path) == []


def old(path: Path) -> None:
    old_store(path, "old", talk("where is the lighthouse", "京都駅の近くです"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("prepare", [lambda path: None, old], ids=["empty", "old schema"])
def test_processes_that_start_at_once_all_succeed(tmp_path: Path, prepare: object) -> None:
    assert callable(prepare)
    with ExitStack() as stack:
        processes = [stack.enter_context(child("open", f"p{i}")) for i in range(PROCESSES)]
        assert [read_line(process) for process in processes] == ["ready"] * PROCESSES
        for i in range(ROUNDS):
            path = tmp_path / f"{i}.db"
            prepare(path)
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(f"{path}\n")
                process.stdin.flush()
            assert [read_line(process) for process in processes] == ["done"] * PROCESSES
            assert integrity(path) == []


def test_a_damaged_file_is_set_aside_once_by_processes_that_start_at_once(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"this is not a database" * 500)
    with ExitStack() as stack:
        processes = [stack.enter_context(child("open", f"p{i}")) for i in range(4)]
        assert [read_line(process) for process in processes] == ["ready"] * 4
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
        assert [read_line(process) for process in processes] == ["done"] * 4
    (aside,) = tmp_path.glob("store.db.damaged-*")
    assert aside.read_bytes() == b"this is not a database" * 500
    assert integrity(path) == []


def test_an_io_error_is_unavailable_and_heals(tmp_path: Path) -> None:
    with child("limit", str(tmp_path / "store.db")) as process:
        assert [read_line(process), read_line(process)] == ["unavailable", "healed"]
    assert integrity(tmp_path / "store.db") == []
