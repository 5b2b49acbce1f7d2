"""Sequences of the KV cache on disk: what must leave memory, or outlive the process, comes back by
a copy instead of an evaluation.

One file a sequence, in a folder for each owner, readable by the user alone:

    magic | length of the header | header (msgpack) | state as llama_state_seq_get_data gives it

The header holds the tokens and the fingerprint of model and build: a state means nothing without
them. A file that is damaged, foreign or of another version is removed when it is met. Files that
were used least recently go first when all of them together pass the budget.
"""

from __future__ import annotations

import logging
import os
import stat
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from io import RawIOBase
from pathlib import Path

import msgspec

from proxy.engines.embedded.sequences import common_prefix

log = logging.getLogger("chatfold.snapshots")

MAGIC = b"cfKV0001"
LENGTH = struct.Struct("<I")
HEADER_BYTES_MOST = 64 << 20
SUFFIX = ".kv"


class Header(msgspec.Struct, frozen=True):
    """What stands before the state. `checksum` is blake2b-160 of all the rest and the state."""

    fingerprint: str
    owner: str
    tokens: list[int]
    state_bytes: int
    checksum: bytes


@dataclass(slots=True, eq=False)
class Snapshot:
    """A file that was met and looks right; its state is checked when it is loaded."""

    path: Path
    header: Header
    n_bytes: int
    used: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.header.tokens


class Snapshots:
    """All files under one folder. One thread, and one process, only. Never raises for what it finds
    on disk, nor for a full one: without a snapshot the prompt is evaluated, that is all."""

    def __init__(self, folder: Path, *, fingerprint: str, budget_bytes: int) -> None:
        """Makes the folder and looks through it. `fingerprint` names model and build."""
        self._folder = folder
        self._fingerprint = fingerprint
        self._budget_bytes = budget_bytes
        self._clock = 0
        self._held: list[Snapshot] = []
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in _oldest_first([f for home in _listed(folder) for f in _listed(home)]):
            self._meet(path)
        self._trim()

    def __repr__(self) -> str:
        return f"<Snapshots {len(self._held)} held, {self.n_bytes}/{self._budget_bytes} bytes>"

    def __len__(self) -> int:
        return len(self._held)

    @property
    def n_bytes(self) -> int:
        return sum(s.n_bytes for s in self._held)

    def match(
        self,
        owner: str,
        tokens: Sequence[int],
        *,
        reach: Callable[[int, int], bool] = lambda length, n: True,
    ) -> tuple[Snapshot | None, int]:
        """The owner's snapshot with the longest common prefix, and that prefix's length. `reach`
        says whether a state of so many tokens can be cut back to so many; others do not count.
        """
        best, length = None, 0
        for s in self._held:
            if s.header.owner != owner:
                continue
            n = common_prefix(s.tokens, tokens)
            if n > length and reach(len(s.tokens), n):
                best, length = s, n
        return best, length

    def holds(self, owner: str, tokens: Sequence[int]) -> bool:
        """Whether a snapshot begins with all of these tokens."""
        return self.match(owner, tokens)[1] == len(tokens)

    def load(self, snapshot: Snapshot) -> memoryview | None:
        """Its state, or None if it cannot be read or is not what was written; then it is gone."""
        # Somebody waits for this: of 50 MB, each copy takes a tenth of the whole.
        data = bytearray(snapshot.n_bytes)
        try:
            with snapshot.path.open("rb", buffering=0) as file:
                whole = _read_whole(file, memoryview(data))
            os.utime(snapshot.path)
        except OSError as exc:
            self._drop(snapshot, str(exc))
            return None
        state = memoryview(data)[snapshot.n_bytes - snapshot.header.state_bytes :]
        if not whole or _checksum(snapshot.header, state) != snapshot.header.checksum:
            self._drop(snapshot, "damaged")
            return None
        self._use(snapshot)
        return state

    def save(self, owner: str, tokens: Sequence[int], state: bytes) -> bool:
        """Writes it whole or not at all, and removes those that it makes superfluous. False where
        it does not fit the budget or the disk."""
        header = Header(self._fingerprint, owner, list(tokens), len(state), b"")
        header = msgspec.structs.replace(header, checksum=_checksum(header, state))
        head = msgspec.msgpack.encode(header)
        head = b"".join((MAGIC, LENGTH.pack(len(head)), head))
        n_bytes = len(head) + len(state)
        if n_bytes > self._budget_bytes:
            return False
        path = self._path(owner, tokens)
        try:
            _write_atomically(path, head, state)
        except OSError as exc:
            log.warning("a snapshot could not be written: %s", exc)
            return False
        saved = Snapshot(path, header, n_bytes)
        # What it extends is told by it: a conversation keeps one file, not one a turn.
        for old in [s for s in self._held if s.path == path or _extends(header, s.header)]:
            self._held.remove(old)
            if old.path != path:
                _remove(old.path)
        self._held.append(saved)
        self._use(saved)
        self._trim()
        return True

    def discard(self, snapshot: Snapshot, why: str) -> None:
        """For a state that llama.cpp would not take."""
        self._drop(snapshot, why)

    def forget(self, owner: str) -> None:
        """Removes all of the owner's files, those too that could not be removed before."""
        for snapshot in [s for s in self._held if s.header.owner == owner]:
            self._held.remove(snapshot)
            _remove(snapshot.path)
        for path in _oldest_first(_listed(self._folder / _name(owner))):
            _remove(path)

    def _meet(self, path: Path) -> None:
        header, n_bytes = _read_header(path)
        if header is None or header.fingerprint != self._fingerprint:
            log.info("removing %s: not a snapshot of this model and build", path.name)
            _remove(path)
            return
        snapshot = Snapshot(path, header, n_bytes)
        self._held.append(snapshot)
        self._use(snapshot)

    def _path(self, owner: str, tokens: Sequence[int]) -> Path:
        name = blake2b(repr(tuple(tokens)).encode(), digest_size=16).hexdigest()
        return self._folder / _name(owner) / (name + SUFFIX)

    def _use(self, snapshot: Snapshot) -> None:
        self._clock += 1
        snapshot.used = self._clock

    def _trim(self) -> None:
        for snapshot in sorted(self._held, key=lambda s: s.used):
            if self.n_bytes <= self._budget_bytes:
                return
            self._held.remove(snapshot)
            _remove(snapshot.path)

    def _drop(self, snapshot: Snapshot, why: str) -> None:
        if snapshot not in self._held:
            return
        log.warning("removing the snapshot %s: %s", snapshot.path.name, why)
        self._held.remove(snapshot)
        _remove(snapshot.path)


def forget_files(folder: Path, owner: str) -> None:
    """Removes all of the owner's files while no model process works with the folder. Raises
    OSError where one stays, when all that can go has gone.
    """
    home = folder / _name(owner)
    paths = _oldest_first(list(home.iterdir()) if home.is_dir() else [])
    troubles = [trouble for path in paths if (trouble := _unlinked(path))]
    if troubles:
        raise troubles[0]


def _listed(folder: Path) -> list[Path]:
    """What lies in it: nothing where it is no folder, or cannot be read."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _oldest_first(paths: Sequence[Path]) -> list[Path]:
    """Those that are regular files. What else lies there is none of ours, and stays."""
    found = []
    for path in paths:
        with suppress(OSError):
            about = path.lstat()
            if stat.S_ISREG(about.st_mode):
                found.append((about.st_mtime_ns, path))
    return [path for _, path in sorted(found)]


def _unlinked(path: Path) -> OSError | None:
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        return exc
    return None


def _remove(path: Path) -> None:
    """A file that cannot be removed costs nobody an answer."""
    if trouble := _unlinked(path):
        log.warning("a snapshot could not be removed: %s", trouble)


def _extends(new: Header, old: Header) -> bool:
    return new.owner == old.owner and new.tokens[: len(old.tokens)] == old.tokens


def _checksum(header: Header, state: bytes | memoryview) -> bytes:
    rest = msgspec.msgpack.encode(msgspec.structs.replace(header, checksum=b""))
    digest = blake2b(rest, digest_size=20)
    digest.update(state)
    return digest.digest()


def _read_whole(file: RawIOBase, into: memoryview) -> bool:
    """Whether the file has just as many bytes."""
    n = 0
    while n < len(into) and (more := file.readinto(into[n:])):
        n += more
    return n == len(into) and not file.read(1)


def _name(owner: str) -> str:
    return blake2b(owner.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _read_header(path: Path) -> tuple[Header | None, int]:
    """The header, if the file is whole by its own lengths, and the file's size in bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC) + LENGTH.size)
            if len(start) < len(MAGIC) + LENGTH.size or not start.startswith(MAGIC):
                return None, 0
            (length,) = LENGTH.unpack(start[len(MAGIC) :])
            if length > HEADER_BYTES_MOST:
                return None, 0
            header = msgspec.msgpack.decode(file.read(length), type=Header)
            n_bytes = os.fstat(file.fileno()).st_size
    except (OSError, ValueError):  # msgspec's errors are ValueErrors, and so is broken UTF-8
        return None, 0
    whole = n_bytes == len(start) + length + header.state_bytes
    return (header, n_bytes) if whole else (None, 0)


def _write_atomically(path: Path, *data: bytes) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.writelines(data)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
