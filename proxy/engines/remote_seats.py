"""llama-server's slots: who sits where, and the requests that save, restore and empty them."""

from __future__ import annotations

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

    def __repr__(self) -> str:
        return f"<Seats {self.slots!r} files={len(self.files)}>"

    def inherit(self, earlier: Seats) -> None:
        """What outlives a restart of the server: its files."""
        self.files, self._owners = earlier.files, earlier._owners

    @asynccontextmanager
    async def seat(self, conversation: str, owner: str) -> AsyncIterator[int | None]:
        """A slot: the conversation's own, or one that is free, with what was saved of the
        conversation put into it. None when all are in use."""
        self._note_owner(conversation, owner)
        slot, stays = self.slots.take(conversation)
        try:
            if slot is not None and not stays:
                await self._restore(slot, conversation)
            yield slot
        finally:
            if slot is not None:
                self.slots.leave(slot)

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

    async def forget(self, owner: str) -> None:
        """Empties the slots in which this owner's conversations sat, and those of titles and the
        like, and writes emptied ones over what was saved: the server cannot be asked to remove a
        file."""
        for conversation in [SIDE, *(c for c, whose in self._owners.items() if whose == owner)]:
            slots, kept = self.slots.slots_of(conversation), self.files.tokens(conversation)
            if not slots and kept:
                slots = [n for n in range(len(self.slots)) if self.slots.free(n)][:1]
            for slot in slots:
                if self.slots.free(slot):
                    await self._empty(slot, self.files.name(conversation) if kept else "")
            self.slots.forget(conversation)
            self.files.lost(conversation)
            self._owners.pop(conversation, None)

    async def _empty(self, slot: int, file: str) -> None:
        if await self._slot_file(slot, "erase", "") and file:
            await self._slot_file(slot, "save", file)

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
