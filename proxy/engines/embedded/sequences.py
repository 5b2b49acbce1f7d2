"""Who owns which cells of the KV cache: sequences, their shared prefixes, and who goes first.

A cell holds one evaluated token. Sequences that share a prefix share its cells. The class keeps
books in step with llama.cpp, which tells no one how many cells are taken; `check_integrity`
holds the books against themselves and against the cache's own positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol


class KV(Protocol):
    """The part of llama.cpp's memory API that moves sequences about."""

    can_cut: bool
    """Whether a sequence's end can be removed (recurrent states cannot be rolled back)."""

    def remove(self, sequence: int, start: int) -> None: ...
    def copy(self, source: int, target: int, end: int) -> None: ...
    def end(self, sequence: int) -> int:
        """Number of positions held by the sequence."""
        ...


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` are evaluated and in the cache; `cells` are our names for where they lie.

    While it is busy, `lasting` says that it is there to stay, and `base` how many of its tokens
    were somebody else's before: they stay in any case.
    """

    id: int
    owner: str = ""
    tokens: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    last_used: int = 0
    busy: bool = False
    lasting: bool = False
    base: int = 0
    n_saved: int = 0
    """How many of the tokens a snapshot holds."""


class SequenceCache:
    """At most `n_sequences` sequences over `n_cells` cells. One thread only."""

    def __init__(
        self,
        kv: KV,
        *,
        n_sequences: int,
        n_cells: int,
        leaving: Callable[[Sequence], object] = lambda sequence: None,
    ) -> None:
        """`leaving` is told of a sequence right before it is evicted."""
        self._kv = kv
        self._leaving = leaving
        self.n_cells = n_cells
        self._sequences = [Sequence(i) for i in range(n_sequences)]
        self._refs: Counter[int] = Counter()
        self._next_cell = count()
        self._clock = count(1)

    def __repr__(self) -> str:
        busy = sum(s.busy for s in self._sequences)
        held = sum(bool(s.tokens) for s in self._sequences)
        sequences = f"{held}/{len(self._sequences)} held, {busy} busy"
        return f"<SequenceCache {sequences}, {self.cells_used}/{self.n_cells} cells>"

    @property
    def cells_used(self) -> int:
        return len(self._refs)

    @property
    def sequences_used(self) -> int:
        return sum(1 for s in self._sequences if s.tokens or s.busy)

    def match_prefix(self, owner: str, tokens: Seq[int]) -> tuple[Sequence | None, int]:
        """The owner's sequence with the longest common prefix, and that prefix's length."""
        best, length = None, 0
        for s in self._sequences:
            if s.owner != owner or not s.tokens:
                continue
            n = common_prefix(s.tokens, tokens)
            if not self._kv.can_cut and n < len(s.tokens):
                continue
            if n > length or (n == length > 0 and best and best.busy and not s.busy):
                best, length = s, n
        return best, length

    def holds(self, owner: str, tokens: Seq[int]) -> bool:
        """Whether all of it is in the cache and stays there; what is asked for counts as used."""
        for s in self._sequences:
            stays = s.owner == owner and (s.lasting or not s.busy)
            usable = self._kv.can_cut or len(s.tokens) == len(tokens)
            if stays and usable and common_prefix(s.tokens, tokens) == len(tokens):
                s.last_used = next(self._clock)
                return True
        return False

    def acquire(self, owner: str, tokens: Seq[int], *, in_place: bool) -> Sequence | None:
        """A sequence for this prompt with as much of it in the cache as can be found.

        At least the last token is left to evaluate: its logits are wanted. A sequence that the
        prompt extends is taken as it is when `in_place`; else its prefix is shared and it stays.
        None when every sequence is busy. Owners never share. `in_place` is also what `holds` goes
        by: that the sequence will be kept.
        """
        wanted = list(tokens[:-1]) if tokens else []
        source, n = self.match_prefix(owner, wanted)
        if source and in_place and not source.busy and n == len(source.tokens):
            return self._take(source, owner, lasting=True)
        target = self._free(but=source)
        if target is None:
            # Every other sequence is busy: the source itself, cut back, is what there is.
            if source is None or source.busy:
                return None
            self.truncate(source, n)
            base = n if self._kv.can_cut else 0
            return self._take(source, owner, lasting=in_place, base=base)
        if source and n:
            self._share(source, target, n)
        return self._take(target, owner, lasting=in_place)

    def fork(self, source: Sequence) -> Sequence | None:
        """A busy sequence that shares all cells of this busy one; None when none is free."""
        target = self._free(but=source)
        if target is None:
            return None
        self._share(source, target, len(source.tokens))
        return self._take(target, source.owner, lasting=False)

    def release(self, sequence: Sequence, *, keep: bool) -> None:
        """The request is done with it. What is not kept goes, but for what it was lent."""
        base, sequence.base, sequence.busy = sequence.base, 0, False
        if not keep:
            self.truncate(sequence, base)
            # A batch that failed may have left cells behind that are in nobody's books.
            self._kv.remove(sequence.id, len(sequence.tokens))

    def make_room(self, n_tokens: int) -> bool:
        """Evicts idle sequences, least recently used first, until `n_tokens` more cells are
        free. When even all of them would not do, none is touched.
        """
        if self.n_cells - self.cells_used >= n_tokens:
            return True
        if self.n_cells - len({c for s in self._sequences if s.busy for c in s.cells}) < n_tokens:
            return False
        while self.n_cells - self.cells_used < n_tokens:
            idle = [s for s in self._sequences if not s.busy and s.tokens]
            self._evict(min(idle, key=lambda s: s.last_used))
        return True

    def idle(self) -> list[Sequence]:
        """Those that nobody works on, the most recently used first."""
        held = [s for s in self._sequences if not s.busy and s.tokens]
        return sorted(held, key=lambda s: -s.last_used)

    def vacant(self) -> Sequence | None:
        """An empty sequence; the least recently used one that is idle is evicted for it."""
        return self._free(but=None)

    def adopt(self, sequence: Sequence, owner: str, tokens: Seq[int]) -> None:
        """An empty sequence was filled from outside with these tokens, evaluated."""
        sequence.owner, sequence.last_used = owner, next(self._clock)
        self.extend(sequence, tokens)
        sequence.n_saved = len(tokens)

    def extend(self, sequence: Sequence, tokens: Seq[int]) -> None:
        """These tokens were just evaluated behind the sequence."""
        cells = [next(self._next_cell) for _ in tokens]
        sequence.tokens.extend(tokens)
        sequence.cells.extend(cells)
        self._refs.update(cells)

    def truncate(self, sequence: Sequence, n: int) -> None:
        """Forgets all but the first `n` tokens."""
        if n >= len(sequence.tokens):
            return
        self._kv.remove(sequence.id, n)
        for cell in sequence.cells[n:]:
            self._drop(cell)
        del sequence.tokens[n:], sequence.cells[n:]
        sequence.n_saved = min(sequence.n_saved, n)

    def forget(self, owner: str) -> None:
        for s in self._sequences:
            if s.owner == owner and not s.busy:
                self.truncate(s, 0)

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not balance."""
        refs: Counter[int] = Counter()
        for s in self._sequences:
            assert len(s.tokens) == len(s.cells), s
            assert self._kv.end(s.id) == len(s.tokens), (s, self._kv.end(s.id))
            refs.update(s.cells)
        assert refs == self._refs, "cells without an owner, or owners without a cell"
        assert self.cells_used <= self.n_cells, self

    def _take(self, sequence: Sequence, owner: str, *, lasting: bool, base: int = 0) -> Sequence:
        sequence.owner, sequence.busy, sequence.lasting = owner, True, lasting
        sequence.base = base
        sequence.last_used = next(self._clock)
        return sequence

    def _free(self, *, but: Sequence | None) -> Sequence | None:
        idle = [s for s in self._sequences if not s.busy and s is not but]
        if not idle:
            return None
        target = min(idle, key=lambda s: (bool(s.tokens), s.last_used))
        self._evict(target)
        return target

    def _evict(self, sequence: Sequence) -> None:
        if sequence.tokens:
            self._leaving(sequence)
        self.truncate(sequence, 0)

    def _share(self, source: Sequence, target: Sequence, n: int) -> None:
        self._kv.copy(source.id, target.id, n)
        source.last_used = next(self._clock)
        target.tokens, target.cells = source.tokens[:n], source.cells[:n]
        self._refs.update(target.cells)

    def _drop(self, cell: int) -> None:
        self._refs[cell] -= 1
        if not self._refs[cell]:
            del self._refs[cell]


def common_prefix(a: Seq[int], b: Seq[int]) -> int:
    """Length of the longest common prefix. Compares slices, so that the work is done in C."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
