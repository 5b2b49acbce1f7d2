"""Which conversation sits in which of the server's slots: pure.

A conversation keeps its slot. One that has none takes the slot that its name points to if nobody
sits there: two proxies before one server, and one proxy after a restart, then choose the same.
Otherwise it takes the one that was left longest ago.
"""

from __future__ import annotations

from hashlib import blake2b

SIDE = ""
"""The name under which all requests that belong to no conversation sit."""


class Slots:
    """The books of `n` slots. Nobody is asked to leave a slot that is in use."""

    def __init__(self, n: int) -> None:
        self._sitting: list[str | None] = [None] * n
        self._in_use: set[int] = set()
        self._left_at = [0] * n
        self._clock = 0

    def __repr__(self) -> str:
        taken = sum(name is not None for name in self._sitting)
        return f"<Slots taken={taken}/{len(self._sitting)} in_use={len(self._in_use)}>"

    def __len__(self) -> int:
        return len(self._sitting)

    def take(self, conversation: str) -> tuple[int | None, bool]:
        """A slot, and whether the conversation sat there already; (None, False) when all are in
        use. Whoever takes one must `leave` it."""
        slot = self._choose(conversation)
        if slot is None:
            return None, False
        stays = self._sitting[slot] == conversation
        if not stays and conversation in self._sitting:
            # A second request beside one that runs: its own slot keeps the name.
            conversation = SIDE
        self._sitting[slot] = conversation
        self._in_use.add(slot)
        return slot, stays

    def leave(self, slot: int) -> None:
        self._clock += 1
        self._left_at[slot] = self._clock
        self._in_use.discard(slot)

    def hold(self, slot: int) -> None:
        """Takes a free one to empty it: who sat there sits there no more. Whoever holds it must
        `vacate` it."""
        self._sitting[slot] = SIDE
        self._in_use.add(slot)

    def vacate(self, slot: int) -> None:
        self.leave(slot)
        self._sitting[slot] = None

    def clear(self) -> None:
        """Nobody sits anywhere: the server is a new one."""
        self._sitting = [None] * len(self._sitting)

    def free(self, slot: int) -> bool:
        return slot not in self._in_use

    def forget(self, conversation: str) -> None:
        """Nobody sits where it sat; a request that runs there goes on."""
        for slot in self.slots_of(conversation):
            self._sitting[slot] = SIDE if slot in self._in_use else None

    def slots_of(self, conversation: str) -> list[int]:
        """One at most, but for SIDE: several may sit under that name."""
        return [slot for slot, name in enumerate(self._sitting) if name == conversation]

    def slot_of(self, conversation: str) -> int | None:
        return self._sitting.index(conversation) if conversation in self._sitting else None

    def spare(self) -> int | None:
        """A free slot in which nobody sits, else the one that was left longest ago."""
        free = [slot for slot in range(len(self)) if self.free(slot)]
        return self._longest_ago([s for s in free if self._sitting[s] is None] or free)

    def check_integrity(self) -> None:
        """Raises AssertionError when a conversation sits twice or nobody sits in a used slot."""
        named = [name for name in self._sitting if name]
        assert len(named) == len(set(named))
        assert all(self._sitting[slot] is not None for slot in self._in_use)

    def _choose(self, conversation: str) -> int | None:
        free = [slot for slot in range(len(self)) if slot not in self._in_use]
        mine = [slot for slot in free if self._sitting[slot] == conversation]
        empty = [slot for slot in free if self._sitting[slot] is None]
        wanted = preferred(conversation, len(self))
        if mine:
            return mine[0]
        if wanted in empty:
            return wanted
        return self._longest_ago(empty or free)

    def _longest_ago(self, slots: list[int]) -> int | None:
        return min(slots, key=lambda slot: self._left_at[slot], default=None)


def preferred(conversation: str, n: int) -> int:
    digest = blake2b(conversation.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % n
