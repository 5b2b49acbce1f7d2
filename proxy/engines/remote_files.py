"""Slots of llama-server that are kept in its files: which conversation is in which. Pure.

The server cannot be asked to remove a file. So there is a fixed number of names, used again and
again: the disk holds at most so many slots.
"""

from __future__ import annotations

from proxy.engines.remote_slots import preferred


class SlotFiles:
    """The books of `n` files. What another proxy wrote over one of them is found by the server,
    which uses of a restored slot what matches the prompt."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._holds: dict[int, tuple[str, int]] = {}

    def __len__(self) -> int:
        return len(self._holds)

    def name(self, conversation: str) -> str:
        return f"chatfold-{preferred(conversation, self._n)}.bin" if self._n else ""

    def saved(self, conversation: str, *, n_tokens: int) -> None:
        self._holds[preferred(conversation, self._n)] = (conversation, n_tokens)

    def tokens(self, conversation: str) -> int:
        """How many tokens of it are kept, 0 where none are."""
        holds, n_tokens = self._holds.get(preferred(conversation, self._n or 1), ("", 0))
        return n_tokens if holds == conversation else 0

    def conversations(self) -> list[str]:
        """Those of which something is kept."""
        return [conversation for conversation, _ in self._holds.values()]

    def lost(self, conversation: str) -> None:
        if self.tokens(conversation):
            del self._holds[preferred(conversation, self._n)]
