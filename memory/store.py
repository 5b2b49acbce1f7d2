"""Where conversations are kept: messages as trees, summaries, and full-text indexes, in SQLite.

The errors (memory.store_errors draws the tree) are StoreError and below it StoreUnavailable,
StoreDamaged, StoreNewer, StoreClosed and NotStored. Every method may raise the first four, and
may be cancelled at any time: a read is given up, a write that was taken on is still carried out,
whole or not at all.

Text is kept as UTF-8, which has no lone surrogates: each is stored as U+FFFD. Digests are those
that the caller computed from the text as it came, so that such a message is still found. An owner
or a conversation id with a surrogate is a ValueError: replaced, two owners could become one.
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlite_utils import Database

from memory import changes, erasure, listing, migrations, queries, rewrites
from memory.backup import copy
from memory.database import open_alone, open_for_reading, open_for_writing
from memory.integrity import integrity
from memory.listing import Entry, Found, OwnerEntry, Twig
from memory.records import Answered, Node, Pin, Rewrite, Standing, Summary
from memory.store_errors import (
    NotStored,
    StoreClosed,
    StoreDamaged,
    StoreError,
    StoreNewer,
    StoreUnavailable,
    translated,
)
from memory.writer import Readers, Writer

__all__ = [
    "Bounds",
    "NotStored",
    "Store",
    "StoreClosed",
    "StoreDamaged",
    "StoreError",
    "StoreNewer",
    "StoreUnavailable",
    "integrity",
]

T = TypeVar("T")
NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long anything may wait, in seconds, and how much."""

    open_s: float = 30.0
    """Creating and migrating while other processes do the same."""
    busy_s: float = 5.0
    """For a lock that another process holds."""
    write_s: float = 10.0
    """For one write, with those before it."""
    alone_s: float = 1.0
    """For a file of one's own: who has it open keeps it, but for one that looks for a moment."""
    read_s: float = 5.0
    upkeep_s: float = 600.0
    """Forgetting, pruning, vacuum and backup."""
    close_s: float = 10.0
    max_waiting_writes: int = 1000
    reader_threads: int = 2


BOUNDS = Bounds()


class Store:
    """One SQLite file. Owned by one event loop; several processes may open the same file."""

    def __init__(
        self,
        path: Path,
        writer: Writer | None,
        readers: Readers,
        *,
        clock: Callable[[], float],
        bounds: Bounds,
    ) -> None:
        """Use open() or open_read_only()."""
        self._path = path
        self._writer = writer
        self._readers = readers
        self._clock = clock
        self._bounds = bounds
        self._failing: dict[str, StoreError] = {}

    def __repr__(self) -> str:
        failing = "; ".join(map(str, self._failing.values()))
        return f"<Store {self._path} {self._writer!r} failing={failing!r}>"

    @classmethod
    async def open(
        cls, path: Path, *, clock: Callable[[], float] = time.time, bounds: Bounds = BOUNDS
    ) -> Store:
        """Creates the directory (0700) and the file (0600) where missing, and migrates.

        A damaged file is set aside as NAME.damaged-TIME, with a warning, and a new one is made.
        Raises StoreNewer for a newer schema and leaves the file as it is.
        """
        connect = partial(open_for_writing, path, open_s=bounds.open_s, busy_s=bounds.busy_s)
        writer = Writer(connect, max_waiting=bounds.max_waiting_writes)
        store = cls(path, writer, _readers(path, bounds), clock=clock, bounds=bounds)
        try:
            await store._write(lambda db: None, bound_s=bounds.open_s + bounds.busy_s)
        except BaseException:
            await store.close()
            raise
        return store

    @classmethod
    async def open_read_only(cls, path: Path, *, bounds: Bounds = BOUNDS) -> Store:
        """For tools beside a running proxy: changes nothing; writing raises StoreClosed.

        Raises StoreError for an older schema, StoreUnavailable where there is no file.
        """
        store = cls(path, None, _readers(path, bounds), clock=time.time, bounds=bounds)
        try:
            await store._read(_require_current)
        except BaseException:
            await store.close()
            raise
        return store

    @classmethod
    async def open_alone(cls, path: Path, *, bounds: Bounds = BOUNDS) -> Store:
        """For changes that no running proxy may miss: until it is closed no other program, and no
        other Store, can open the file, and reading through this one raises StoreUnavailable too.

        Makes and migrates nothing. Raises StoreUnavailable where another program has the file
        open, or where there is none.
        """
        connect = partial(open_alone, path, busy_s=bounds.alone_s)
        writer = Writer(connect, max_waiting=bounds.max_waiting_writes)
        store = cls(path, writer, _readers(path, bounds), clock=time.time, bounds=bounds)
        try:
            await store._write(lambda db: None, bound_s=bounds.alone_s + bounds.busy_s)
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        """Carries out the writes that wait, then closes. Safe to call twice.

        Raises StoreUnavailable if that takes longer than `close_s`.
        """
        done = await asyncio.to_thread(self._close)
        if not done:
            raise StoreUnavailable(f"writes were still waiting after {self._bounds.close_s} s")

    def _close(self) -> bool:
        self._readers.close()
        return self._writer is None or self._writer.close(close_s=self._bounds.close_s)

    @property
    def degraded(self) -> bool:
        """Whether the last read or the last write failed. The next one that succeeds heals it."""
        return bool(self._failing)

    # -- reading ---------------------------------------------------------------------------------

    async def deepest(self, owner: str, digests: Sequence[bytes]) -> tuple[str, int] | None:
        """(conversation, index into `digests`) of the deepest one that is stored.

        `digests` is the chain of a transcript: if one is stored, so are all before it.
        """
        return await self._read(lambda conn: queries.deepest(conn, owner, digests))

    async def standing(self, owner: str, digests: Sequence[bytes]) -> Standing | None:
        """What is stored of the history with this chain, None where nothing is."""
        return await self._read(lambda conn: queries.standing(conn, owner, digests))

    async def nodes(self, owner: str, digests: Sequence[bytes]) -> list[Node]:
        """Those of them that are stored, in order of depth."""
        return await self._read(lambda conn: queries.nodes(conn, owner, digests))

    async def path(self, owner: str, digest: bytes, *, after_depth: int = -1) -> list[Node]:
        """The message and its ancestors deeper than `after_depth`, in order of depth; [] if the
        message is not stored."""
        return await self._read(
            lambda conn: queries.path(conn, owner, digest, after_depth=after_depth)
        )

    async def lineage(self, owner: str, digest: bytes) -> tuple[bytes, ...]:
        """The chain that ends with `digest`, from the root; () if it is not stored."""
        return await self._read(lambda conn: queries.lineage(conn, owner, digest))

    async def conversation_by_client_id(self, owner: str, client_id: str) -> str | None:
        """The conversation that last came under this name of the client's."""
        return await self._read(
            lambda conn: queries.conversation_by_client_id(conn, owner, client_id)
        )

    async def summaries(self, owner: str, conversation: str) -> list[Summary]:
        """In order of first_depth, then id."""
        return await self._read(lambda conn: queries.summaries(conn, owner, conversation))

    async def covering(
        self, owner: str, conversation: str, digests: Sequence[bytes]
    ) -> tuple[tuple[Summary, ...], tuple[Summary, ...]]:
        """(active, written): those of the conversation's summaries that stand for the beginning of
        this history, in use, and in use or waiting to be warm (memory.compaction.cover)."""
        return await self._read(lambda conn: queries.covering(conn, owner, conversation, digests))

    async def longest(self, *, limit: int) -> list[tuple[str, str, bytes, int]]:
        """(owner, conversation, digest of its newest message, messages on the path to it) of the
        longest conversations over all owners: for whoever runs the proxy, never for a client."""
        return await self._read(lambda conn: queries.longest(conn, limit=limit))

    async def by_message_digest(
        self, owner: str, message_digest: bytes, *, limit: int = 50
    ) -> list[tuple[str, Node]]:
        """(conversation, message) for each place where this very message stands, newest first."""
        return await self._read(
            lambda conn: queries.by_message_digest(conn, owner, message_digest, limit=limit)
        )

    async def search(self, owner: str, query: str, *, limit: int = 20) -> list[tuple[str, Node]]:
        """(conversation, message), best first. Any word of the query may match, in any script;
        no query is a syntax error."""
        return await self._read(lambda conn: queries.find(conn, owner, query, limit=limit))

    async def owners(self) -> list[OwnerEntry]:
        """Everybody who has conversations. For the operator alone: no owner may see another."""
        return await self._read(listing.owners)

    async def conversations(self, owner: str, *, limit: int = 50, offset: int = 0) -> list[Entry]:
        """Those that grew last first."""
        return await self._read(
            lambda conn: listing.conversations(conn, owner, limit=limit, offset=offset)
        )

    async def n_conversations(self, owner: str) -> int:
        return await self._read(lambda conn: listing.n_conversations(conn, owner))

    async def conversation(self, owner: str, conversation: str) -> Entry | None:
        return await self._read(lambda conn: listing.conversation(conn, owner, conversation))

    async def tree(self, owner: str, conversation: str) -> list[Twig]:
        """All messages of the conversation without their texts, parents first."""
        return await self._read(lambda conn: listing.tree(conn, owner, conversation))

    async def answers(self, owner: str, digests: Sequence[bytes]) -> dict[bytes, Answered]:
        """What the answers among these messages cost, by their digests."""
        return await self._read(lambda conn: listing.answers(conn, owner, digests))

    async def pins(self, owner: str, conversation: str) -> list[Pin]:
        return await self._read(lambda conn: queries.pins(conn, owner, conversation))

    async def rewrites(self, owner: str, conversation: str) -> list[Rewrite]:
        """Its summaries as written again, with their texts; the newest set first."""
        return await self._read(lambda conn: rewrites.rewrites(conn, owner, conversation))

    async def rewrite(self, owner: str, conversation: str, id_: int) -> Rewrite | None:
        found = await self._read(lambda conn: rewrites.rewrites(conn, owner, conversation, id_))
        return found[0] if found else None

    async def find(self, owner: str, typed: str, *, limit: int = 20) -> Found:
        """As search, while somebody types, and over summaries too."""

        def look(conn: sqlite3.Connection) -> Found:
            messages = queries.find(conn, owner, typed, limit=limit, unfinished=True)
            summaries = listing.find_summaries(conn, owner, typed, limit=limit)
            ids = [*(id_ for id_, _ in messages), *(s.conversation for s in summaries)]
            return Found(messages, summaries, listing.entries(conn, owner, ids))

        return await self._read(look)

    async def status(self) -> dict[str, Any]:
        """Counts over all owners, bytes of the file and its log, and whether it is degraded."""

        def measure(conn: sqlite3.Connection) -> dict[str, Any]:
            return queries.counts(conn) | {"file_bytes": _file_bytes(self._path)}

        found = await self._read(measure)
        return found | {"degraded": self.degraded}

    # -- writing ---------------------------------------------------------------------------------

    async def append(
        self,
        owner: str,
        nodes: Sequence[Node],
        *,
        conversation: str | None,
        client_id: str | None = None,
        answered: Answered | None = None,
    ) -> str:
        """Stores what is not stored yet, in one transaction that survives the loss of power.

        Returns the conversation in which the last node now lies. New nodes go to `conversation`,
        which is created if need be; where it is None, to that of their parent, or for a new root
        to a new one. A stored answer whose token ids are unknown takes them, and its text, from a
        node of the same canonical text. Raises NotStored, a ValueError, for a node whose parent is
        neither ROOT nor stored nor among `nodes`, or if the conversation is another owner's; and
        ValueError for a wrong depth or no nodes. Nothing is written then. `client_id` is what the
        client itself calls the conversation; its newest meaning is kept. `answered` says what the
        answer among the nodes cost.
        """
        now = self._clock()
        add = partial(changes.append, new_id=_new_id, now=now, conversation=conversation)
        add = partial(add, client_id=client_id, answered=answered)
        return await self._write(lambda db: add(db, owner, tuple(nodes)))

    async def add_summary(
        self,
        owner: str,
        summary: Summary,
        *,
        read: Sequence[Node] = (),
        shown: Sequence[int] = (),
    ) -> Summary:
        """Returns it as stored, with its id. `read` are the messages that its text was made of as
        they were then, `shown` the ids of the summaries. Raises NotStored if its conversation is
        not stored, or one of those was forgotten meanwhile."""
        add = partial(changes.add_summary, read=tuple(read), shown=tuple(shown))
        return await self._write(lambda db: add(db, owner, summary))

    async def activate(self, owner: str, ids: Sequence[int]) -> None:
        """Sets activated_at to now where it is not set yet. Unknown ids are ignored."""
        now = self._clock()
        await self._write(lambda db: changes.activate(db, owner, tuple(ids), now=now))

    async def pin(self, owner: str, conversation: str, text: str) -> Pin:
        """Raises NotStored if the conversation is not stored, ValueError if it has too many."""
        now = self._clock()
        return await self._write(lambda db: changes.pin(db, owner, conversation, text, now=now))

    async def unpin(self, owner: str, conversation: str, id_: int) -> bool:
        """Whether there was such a pin."""
        return await self._write(lambda db: changes.unpin(db, owner, conversation, id_))

    async def begin_rewrite(self, owner: str, rewrite: Rewrite) -> Rewrite:
        """As stored, with its id. Raises NotStored if its conversation is not, TooManyRewrites."""
        return await self._write(lambda db: rewrites.begin(db, owner, rewrite))

    async def add_candidate(self, owner: str, rewrite: int, candidate: Summary) -> int:
        """Its id. Raises NotStored where the set is gone or finished."""
        return await self._write(lambda db: rewrites.add_candidate(db, owner, rewrite, candidate))

    async def finish_rewrite(self, owner: str, rewrite: int) -> None:
        """All candidates are there. Unknown ids are ignored."""
        now = self._clock()
        await self._write(lambda db: rewrites.finish(db, owner, rewrite, now=now))

    async def use_rewrite(self, owner: str, conversation: str, id_: int) -> None:
        """Its candidates become summaries that take the place of those that stand there as soon
        as they are activated; nothing is deleted. Raises NotStored unless it is finished and not
        in use yet, Overtaken where what stands before it has changed."""
        now = self._clock()
        await self._write(lambda db: rewrites.use(db, owner, conversation, id_, now=now))

    async def undo_rewrite(self, owner: str, conversation: str, id_: int) -> None:
        """What stood there before a set was taken into use takes its place again, as soon as it is
        activated; the set can be used once more. Raises NotStored where it is not in use or what
        stood there was forgotten, Overtaken."""
        await self._write(lambda db: rewrites.undo(db, owner, conversation, id_))

    async def discard_rewrite(self, owner: str, conversation: str, id_: int) -> bool:
        """Whether there was such a set. Its bytes are overwritten with the rows."""
        return await self._write(lambda db: rewrites.discard(db, owner, conversation, id_))

    # -- upkeep: may hold up writes for as long as it takes, never reads ---------------------------

    async def forget_conversation(self, owner: str, conversation: str) -> int:
        """Returns the number of messages deleted: rows, index and bytes.

        Raises StoreUnavailable if they are deleted but their bytes may remain in the file, as when
        the disk is full or another program keeps reading; calling it again finishes the work.
        """
        return await self._keep_up(lambda db: erasure.forget_conversation(db, owner, conversation))

    async def forget_message(self, owner: str, digest: bytes) -> int:
        """Takes the text out of one message, and every summary over it out of the store; its place
        in the tree stays. Returns 1, or 0 if it is not stored. Raises as forget_conversation."""
        return await self._keep_up(lambda db: erasure.forget_message(db, owner, digest))

    async def forget_owner(self, owner: str) -> int:
        """As forget_conversation, for all of the owner's conversations and the owner's key."""
        return await self._keep_up(lambda db: erasure.forget_owner(db, owner))

    async def prune(
        self,
        *,
        max_age_s: float | None = None,
        max_conversations: int | None = None,
        max_bytes: int | None = None,
    ) -> Counter[str]:
        """Deletes whole conversations, those first that have not grown for longest, until every
        bound given holds. Returns how many of each owner. `max_bytes` bounds the bytes in use: the
        file itself shrinks at the next vacuum."""
        now = self._clock()
        prune = partial(
            erasure.prune,
            now=now,
            max_age_s=max_age_s,
            max_conversations=max_conversations,
            max_bytes=max_bytes,
        )
        return await self._keep_up(prune)

    async def vacuum(self) -> None:
        """Rewrites the file without its free space. Needs as much room again on the disk."""
        await self._keep_up(erasure.wipe)

    async def backup(self, target: Path) -> None:
        """Writes a consistent copy (0600) to `target`, replacing it, while reads and writes go on.

        The copy appears whole or not at all.
        """
        stop = threading.Event()
        try:
            async with asyncio.timeout(self._bounds.upkeep_s):
                await asyncio.to_thread(copy, self._path, target, stop=stop)
        except TimeoutError as exc:
            raise StoreUnavailable(f"no backup within {self._bounds.upkeep_s} s") from exc
        except (sqlite3.Error, OSError) as exc:
            raise translated(exc) from exc
        finally:
            stop.set()

    # -- the border --------------------------------------------------------------------------------

    async def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        future = self._readers.submit(work)
        # Twice read_s: once in the queue, once on the way.
        return await self._settled("read", asyncio.wrap_future(future), 2 * self._bounds.read_s)

    async def _write(self, work: Callable[[Database], T], *, bound_s: float | None = None) -> T:
        if self._writer is None:
            raise StoreClosed("the store was opened read-only")
        try:
            future: Future[T] = self._writer.submit(work)
        except StoreUnavailable as exc:
            raise self._failed("write", exc) from None
        waiting = asyncio.shield(asyncio.wrap_future(future))
        return await self._settled("write", waiting, bound_s or self._bounds.write_s)

    async def _keep_up(self, work: Callable[[Database], T]) -> T:
        return await self._write(work, bound_s=self._bounds.upkeep_s)

    async def _settled(self, kind: str, waiting: asyncio.Future[T], bound_s: float) -> T:
        """The one place where SQLite's errors become ours and where waiting ends."""
        try:
            async with asyncio.timeout(bound_s):
                result = await waiting
        except TimeoutError as exc:
            raise self._failed(kind, StoreUnavailable(f"no {kind} within {bound_s} s")) from exc
        except (sqlite3.Error, OSError) as exc:
            raise self._failed(kind, translated(exc)) from exc
        self._failing.pop(kind, None)
        return result

    def _failed(self, kind: str, error: StoreError) -> StoreError:
        self._failing[kind] = error
        return error


def _readers(path: Path, bounds: Bounds) -> Readers:
    connect = partial(open_for_reading, path, busy_s=bounds.busy_s)
    return Readers(connect, threads=bounds.reader_threads, read_s=bounds.read_s)


def _require_current(conn: sqlite3.Connection) -> None:
    migrations.require_current(Database(conn, execute_plugins=False))


def _new_id() -> str:
    return secrets.token_hex(8)


def _file_bytes(path: Path) -> int:
    files = (path, path.with_name(path.name + "-wal"))
    return sum(file.stat().st_size for file in files if file.exists())
