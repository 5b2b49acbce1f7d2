"""Places of a prompt that can be gone back to where the model's state itself cannot be cut back.

Kept in memory: for a chosen length of a sequence the part of its state that later tokens destroy
(the window of sliding-window layers, the state of recurrent layers), as llama.cpp writes it. The
rest, the cells of full attention, can be cut anywhere and stays in the KV cache: a checkpoint is of
use together with a sequence that holds its tokens, or alone where the part is all there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PER_LINE = 6
"""Checkpoints along one line of a chat: the ends of its last prompts and the places between its
turns. Older ones serve only who edits far back."""


@dataclass(slots=True, eq=False)
class Checkpoint:
    """`part` is the state right behind `tokens`."""

    owner: str
    tokens: list[int]
    part: bytes
    used: int = 0

    @property
    def n_bytes(self) -> int:
        """Memory that it takes: the part, and a pointer for each token."""
        return len(self.part) + 8 * len(self.tokens)


class Checkpoints:
    """Of all owners, under one budget; those not used for longest go first. One thread only."""

    def __init__(self, *, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._held: list[Checkpoint] = []
        self._clock = 0
        self.n_bytes = 0
        self.hits = 0

    def __repr__(self) -> str:
        return f"<Checkpoints {len(self._held)} held, {self.n_bytes}/{self.budget_bytes} bytes>"

    def __len__(self) -> int:
        return len(self._held)

    def match(self, owner: str, tokens: Sequence[int]) -> Checkpoint | None:
        """The owner's longest one whose tokens these begin with."""
        fits = [c for c in self._held if c.owner == owner and _leads(c.tokens, tokens)]
        return max(fits, key=lambda c: len(c.tokens), default=None)

    def add(self, owner: str, tokens: Sequence[int], part: bytes) -> None:
        """Keeps it, in place of an equal one and of the one of its line that was used least
        recently where the line is full. What is larger than the whole budget is not kept.
        """
        new = Checkpoint(owner, list(tokens), part)
        if new.n_bytes > self.budget_bytes:
            return
        line = [c for c in self._held if c.owner == owner and _leads(c.tokens, tokens)]
        for old in [c for c in line if len(c.tokens) == len(tokens)]:
            line.remove(old)
            self._drop(old)
        if len(line) >= PER_LINE:
            self._drop(min(line, key=lambda c: c.used))
        self._held.append(new)
        self.n_bytes += new.n_bytes
        self._touch(new)
        while self.n_bytes > self.budget_bytes:
            self._drop(min(self._held, key=lambda c: c.used))

    def use(self, checkpoint: Checkpoint) -> None:
        """A prompt went on from it."""
        self.hits += 1
        self._touch(checkpoint)

    def forget(self, owner: str) -> None:
        for checkpoint in [c for c in self._held if c.owner == owner]:
            self._drop(checkpoint)

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not balance."""
        assert self.n_bytes == sum(c.n_bytes for c in self._held) <= self.budget_bytes, self

    def _touch(self, checkpoint: Checkpoint) -> None:
        self._clock += 1
        checkpoint.used = self._clock

    def _drop(self, checkpoint: Checkpoint) -> None:
        self._held.remove(checkpoint)
        self.n_bytes -= checkpoint.n_bytes


def _leads(head: list[int], tokens: Sequence[int]) -> bool:
    return list(tokens[: len(head)]) == head
