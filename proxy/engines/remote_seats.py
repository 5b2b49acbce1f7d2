"""llama-server's slots: who sits where, and the requests that save, restore and empty them."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import msgspec

from proxy.engines.base import Place
from proxy.engines.remote_errors import failure
from proxy.engines.remote_files import SlotFiles
from proxy.engines.remote_http import Http
from proxy.engines.remote_slots import SIDE, Slots

log = logging.getLogger("chatfold.engine")

OWNERS_MOST = 4096
SLOT_FILE_S = 10.0
"""For the server to write or read a slot."""


class Seats:
    """`n` slots, and up to `n_files` files to keep them in; 0 where none may be."""

    def __init__(self, http: Http, root: str, *, n: int, n_files: int) -> None:
        self._http = http
        self._root = root
        self.slots = Slots(n)
        self.files = SlotFiles(n_files)
        self._owners: OrderedDict[str, str] = OrderedDict()
        """Whose each conversation is that sat in a slot of late."""
        self._owed: dict[int | str, None] = {}
        """Slots and files that are still to be emptied for who was forgotten."""
        self._emptying = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<Seats {self.slots!r} files={len(self.files)} owed={len(self._owed)}>"

    def inherit(self, earlier: Seats) -> None:
        """What outlives a restart of the server: its files."""
        self.files, self._owners = earlier.files, earlier._owners

    @asynccontextmanager
    async def seat(self, conversation: str, owner: str) -> AsyncIterator[int | None]:
        """A slot: the conversation's own, or one that is free, with what was saved of the
        conversation put into it. None when all are in use."""
        self._note_owner(conversation, owner)
        slot, stays = self.slots.take(conversation)
        if slot is None:
            # One may be held for a moment, to be emptied.
            async with self._emptying:
                slot, stays = self.slots.take(conversation)
        seated = stays
        try:
            if slot is not None and not stays:
                await self._restore(slot, conversation)
            seated = True
            yield slot
        finally:
            # A restore that was broken off: what is in there now, nobody knows.
            if slot is not None:
                (self.slots.leave if seated else self.slots.vacate)(slot)

    def place(self, owner: str, conversation: str) -> Place:
        if self._owners.get(conversation) != owner:
            return Place.COLD
        if self.slots.slot_of(conversation) is not None:
            return Place.SLOT
        return Place.FILE if self.files.tokens(conversation) else Place.COLD

    async def save(self, slot: int, conversation: str, *, n_tokens: int) -> None:
        """Keeps the slot in a file, where the file would hold less of the conversation."""
        name = self.files.name(conversation)
        if not name or not conversation or n_tokens == self.files.tokens(conversation):
            return
        if await self._slot_file(slot, "save", name):
            self.files.saved(conversation, n_tokens=n_tokens)
            self._owed.pop(name, None)

    def forget(self, owner: str) -> None:
        """Takes out of the books what this owner's conversations left in slots and files, and all
        that titles and the like left: `empty` has to be called for it."""
        for conversation in [SIDE, *(c for c, whose in self._owners.items() if whose == owner)]:
            self._owe(conversation)

    def left_behind(self, conversation: str, slot: int) -> None:
        """For a request that was forgotten while it ran, in this slot."""
        self._owed[slot] = None
        self._owe(conversation)

    @property
    def owes(self) -> bool:
        return bool(self._owed)

    def take_over(self, earlier: Seats) -> None:
        """What is still to be emptied: it may be the same server, or another one over its files."""
        slots = range(len(self.slots))
        self._owed |= {one: None for one in earlier._owed if isinstance(one, str) or one in slots}

    async def empty(self) -> None:
        """Empties what is to be emptied, and writes empty slots over files: the server cannot be
        asked to remove one. What is in use or cannot be done now is left for the next time. Raises
        EngineUnavailable."""
        tried: set[int | str] = set()
        while (slot := self._to_empty(tried)) is not None:
            tried.add(slot)
            async with self._emptying:
                if self.slots.free(slot) and not await self._empty(slot, tried):
                    return

    def _to_empty(self, tried: set[int | str]) -> int | None:
        """A free slot that is to be emptied, or one that files can be written over from."""
        left = [one for one in self._owed if one not in tried]
        slots = [one for one in left if isinstance(one, int)]
        free = [slot for slot in slots if self.slots.free(slot)]
        return next(iter(free), self.slots.spare() if len(left) > len(slots) else None)

    async def _empty(self, slot: int, tried: set[int | str]) -> bool:
        """With the slot held: between the two nobody may come in, whose chat would be in the file.
        False where something failed."""
        self.slots.hold(slot)
        try:
            if not await self._settled(slot, slot, "erase"):
                return False
            for file in [one for one in self._owed if isinstance(one, str) and one not in tried]:
                tried.add(file)
                if not await self._settled(file, slot, "save", file):
                    return False
            return True
        finally:
            self.slots.vacate(slot)

    async def _settled(self, one: int | str, slot: int, action: str, file: str = "") -> bool:
        if one in self._owed:
            # Behind all others, so that none of them waits for one that can never be done.
            self._owed[one] = self._owed.pop(one)
        if done := await self._slot_file(slot, action, file):
            self._owed.pop(one, None)
        return done

    def _owe(self, conversation: str) -> None:
        self._owed |= dict.fromkeys(self.slots.slots_of(conversation))
        if self.files.tokens(conversation):
            self._owed[self.files.name(conversation)] = None
        self.slots.forget(conversation)
        self.files.lost(conversation)
        self._owners.pop(conversation, None)

    def _note_owner(self, conversation: str, owner: str) -> None:
        if conversation:
            self._owners[conversation] = owner
            self._owners.move_to_end(conversation)
            while len(self._owners) > OWNERS_MOST:
                self._owners.popitem(last=False)

    async def _restore(self, slot: int, conversation: str) -> None:
        if not self.files.tokens(conversation):
            return
        if not await self._slot_file(slot, "restore", self.files.name(conversation)):
            self.files.lost(conversation)

    async def _slot_file(self, slot: int, action: str, name: str) -> bool:
        """Whether it was done. What is not saved or restored is evaluated again, no more."""
        url = f"{self._root}/slots/{slot}?action={action}"
        body = msgspec.json.encode({"filename": name} if name else {})
        with anyio.move_on_after(SLOT_FILE_S):
            async with self._http.exchange("POST", url, body) as answer:
                received = await answer.body()
            if answer.status == 200:
                return True
            log.warning("slot %d: %s failed: %s", slot, action, failure(answer.status, received))
        return False
