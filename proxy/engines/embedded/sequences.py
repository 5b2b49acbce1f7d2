"""Who owns which cells of the KV cache: sequences, their shared prefixes, and who goes first.

A cell holds one evaluated token. Sequences that share a prefix share its cells. The class keeps
books in step with llama.cpp, which tells no one how many cells are taken; `check_integrity`
holds the books against themselves and against the cache's own positions.

Not every state can be cut back to any length: a recurrent one only knows its end, and a cache of
sliding windows overwrites what has left the window. There a prompt goes on from a whole sequence,
from where the cells of the window are still in place, or from a checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple, Protocol

from proxy.engines.embedded.checkpoints import Checkpoint, Checkpoints


class KV(Protocol):
    """The part of llama.cpp's memory API that moves sequences about."""

    keeps_parts: bool
    """Whether later tokens destroy a part of a sequence's state: checkpoints are worth having."""
    part_is_all: bool
    """Whether that part is the whole state, and needs no cells beside it."""

    def reaches(self, sequence: int, n: int) -> bool:
        """Whether a longer sequence can be cut back to `n` tokens and be as if it had no more."""
        ...

    def remove(self, sequence: int, start: int) -> bool:
        """False where the state cannot be cut there. 0 empties the sequence in any case."""
        ...

    def copy(self, source: int, target: int, end: int) -> None: ...
    def end(self, sequence: int) -> int:
        """Number of positions held by the sequence."""
        ...

    def save_part(self, sequence: int) -> bytes: ...
    def load_part(self, sequence: int, part: bytes) -> bool:
        """Puts it back in place of what is there; False where there is no room, and then nothing
        is left of the sequence's part.
        """
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


class Match(NamedTuple):
    """`n` tokens of a prompt that need not be evaluated: they are in `sequence`, and behind them
    the state is as it should be once `checkpoint`, where there is one, has been put back.
    """

    sequence: Sequence | None = None
    n: int = 0
    checkpoint: Checkpoint | None = None


class SequenceCache:
    """At most `n_sequences` sequences over `n_cells` cells. One thread only."""

    def __init__(
        self,
        kv: KV,
        *,
        n_sequences: int,
        n_cells: int,
        leaving: Callable[[Sequence], object] = lambda sequence: None,
        checkpoint_bytes: int = 0,
    ) -> None:
        """`leaving` is told of a sequence right before it is evicted."""
        self._kv = kv
        self.checkpoints = Checkpoints(budget_bytes=checkpoint_bytes)
        self._leaving = leaving
        self.n_cells = n_cells
        self._sequences = [Sequence(i) for i in range(n_sequences)]
        self._refs: Counter[int] = Counter()
        self._next_cell = count()
        self._clock = count(1)
        self.openings = 0
        """How often something happened that can make `has_room` true where it was false."""

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

    def match_prefix(self, owner: str, tokens: Seq[int]) -> Match:
        """What is in the cache of the owner's that saves evaluating most of these tokens."""
        best = Match()
        for s in self._sequences:
            if s.owner == owner and s.tokens:
                found = self._reach(s, common_prefix(s.tokens, tokens))
                if found.n and _rank(found) > _rank(best):
                    best = found
        if self._kv.part_is_all and (c := self.checkpoints.match(owner, tokens)):
            best = max(best, Match(None, len(c.tokens), c), key=lambda m: m.n)
        return best

    def shared_prefix(self, owner: str, tokens: Seq[int]) -> int:
        """How far the owner's sequences agree with these tokens, whether their state can be gone
        on from there or not.
        """
        ours = (s for s in self._sequences if s.owner == owner)
        return max((common_prefix(s.tokens, tokens) for s in ours), default=0)

    def holds(self, owner: str, tokens: Seq[int]) -> bool:
        """Whether all of it is in the cache and stays there; what is asked for counts as used, and
        can be come back to when more has followed it.
        """
        for s in self._sequences:
            stays = s.owner == owner and (s.lasting or not s.busy)
            if (
                stays
                and common_prefix(s.tokens, tokens) == len(tokens) == self._reach(s, len(tokens)).n
            ):
                s.last_used = next(self._clock)
                if len(s.tokens) == len(tokens):
                    self.checkpoint(s)
                return True
        return False

    def has_room(self, owner: str, prefix: Seq[int], *, n_tokens: int) -> bool:
        """Whether there is a sequence that nobody works on, and cells for `n_tokens`, the first of
        which are `prefix`, once all that is idle has been evicted. Evicts nothing.
        """
        if all(s.busy for s in self._sequences):
            return False
        source, n, _ = self.match_prefix(owner, prefix)
        shared = source.cells[:n] if source else []
        return self.n_cells - len(self._busy_cells().union(shared)) >= n_tokens - len(shared)

    def acquire(self, owner: str, tokens: Seq[int], *, in_place: bool) -> Sequence | None:
        """A sequence for this prompt with as much of it in the cache as can be found.

        At least the last token is left to evaluate: its logits are wanted. A sequence that the
        prompt extends is taken as it is when `in_place`; else its prefix is shared and it stays.
        None when every sequence is busy. Owners never share. `in_place` is also what `holds` goes
        by: that the sequence will be kept.
        """
        match = self.match_prefix(owner, list(tokens[:-1]) if tokens else [])
        source, n, _ = match
        if source and in_place and not source.busy and n == len(source.tokens):
            return self._take(source, owner, lasting=True)
        target = self._free(but=source)
        if target is None:
            # Every other sequence is busy: the source itself, cut back, is what there is.
            if source is None or source.busy:
                return None
            self.truncate(source, n)
            return self._take(source, owner, lasting=in_place, base=len(source.tokens))
        if match.n:
            self._fork(match, target)
        return self._take(target, owner, lasting=in_place)

    def fork(self, source: Sequence) -> Sequence | None:
        """A busy sequence that begins with all of this busy one; None when none is free."""
        target = self._free(but=source)
        if target is None:
            return None
        self._fork(Match(source, len(source.tokens)), target)
        if len(target.tokens) < len(source.tokens):
            return None
        return self._take(target, source.owner, lasting=False)

    def checkpoint(self, sequence: Sequence) -> None:
        """Makes sure that a later prompt can go on from the sequence's end as it is now."""
        if not self._kv.keeps_parts or not sequence.tokens:
            return
        known = self.checkpoints.match(sequence.owner, sequence.tokens)
        if known is None or len(known.tokens) < len(sequence.tokens):
            part = self._kv.save_part(sequence.id)
            self.checkpoints.add(sequence.owner, sequence.tokens, part)
            self.openings += 1

    def release(self, sequence: Sequence, *, keep: bool) -> None:
        """The request is done with it. What is not kept goes, but for what it was lent."""
        base, sequence.base, sequence.busy = sequence.base, 0, False
        self.openings += 1
        if not keep:
            self.truncate(sequence, base)

    def make_room(self, n_tokens: int) -> bool:
        """Evicts idle sequences, least recently used first, until `n_tokens` more cells are
        free. When even all of them would not do, none is touched.
        """
        if self.n_cells - self.cells_used >= n_tokens:
            return True
        if self.n_cells - len(self._busy_cells()) < n_tokens:
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
        sequence.tokens.extend(tokens)
        for _ in tokens:
            cell = next(self._next_cell)
            sequence.cells.append(cell)
            self._refs[cell] = 1

    def truncate(self, sequence: Sequence, n: int) -> None:
        """Forgets all but the first `n` tokens. Where the state cannot be cut there, what a
        checkpoint holds of them stays, or nothing.
        """
        n = min(n, len(sequence.tokens))
        self.openings += sequence.busy
        # A batch that failed may have left cells behind that are in nobody's books.
        if self._kv.end(sequence.id) > n:
            n = self._cut(sequence, n)
        for cell in sequence.cells[n:]:
            self._drop(cell)
        del sequence.tokens[n:], sequence.cells[n:]
        sequence.n_saved = min(sequence.n_saved, n)

    def clear(self) -> None:
        """Empties all that is idle."""
        for s in self._sequences:
            if not s.busy:
                self.truncate(s, 0)

    def forget(self, owner: str) -> None:
        """Of a busy sequence nothing stays behind its request, unless that one keeps it."""
        self.checkpoints.forget(owner)
        for s in self._sequences:
            if s.owner == owner and s.busy:
                s.base, s.lasting = 0, False
            elif s.owner == owner:
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
        self.checkpoints.check_integrity()

    def _take(self, sequence: Sequence, owner: str, *, lasting: bool, base: int = 0) -> Sequence:
        sequence.owner, sequence.busy, sequence.lasting = owner, True, lasting
        sequence.base = base
        sequence.last_used = next(self._clock)
        return sequence

    def _busy_cells(self) -> set[int]:
        return set[int]().union(*(s.cells for s in self._sequences if s.busy))

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

    def _reach(self, s: Sequence, n: int) -> Match:
        """The most of the sequence's first `n` tokens that can be gone on from."""
        if n == 0 or n == self._kv.end(s.id) or self._kv.reaches(s.id, n):
            return Match(s, n)
        c = self.checkpoints.match(s.owner, s.tokens[:n])
        return Match(s, len(c.tokens), c) if c else Match()

    def _cut(self, sequence: Sequence, n: int) -> int:
        """Cuts llama.cpp's side to `n` tokens or, where that cannot be, to fewer. Returns how
        many.
        """
        _, n, checkpoint = self._reach(sequence, n)
        if n and self._put_back(sequence, checkpoint) and self._kv.remove(sequence.id, n):
            return n
        self._kv.remove(sequence.id, 0)
        return 0

    def _put_back(self, sequence: Sequence, checkpoint: Checkpoint | None) -> bool:
        if checkpoint is None:
            return True
        self.checkpoints.use(checkpoint)
        return self._kv.load_part(sequence.id, checkpoint.part)

    def _fork(self, match: Match, target: Sequence) -> None:
        """Lets an empty sequence begin with what was matched; that stays where it is, too."""
        source, n, checkpoint = match
        if source is None and not self.make_room(n):
            return
        if source:
            self._kv.copy(source.id, target.id, n)
            source.last_used = next(self._clock)
        if checkpoint:
            whole = self._put_back(target, checkpoint)
        else:
            # A part is never shared: cells of a window that two sequences have both left behind
            # could not be overwritten, and the small cache they lie in would run full.
            whole = not self._kv.keeps_parts or self._kv.load_part(
                target.id, self._kv.save_part(target.id)
            )
        if not whole:
            self._kv.remove(target.id, 0)
        elif source:
            target.tokens, target.cells = source.tokens[:n], source.cells[:n]
            self._refs.update(target.cells)
        elif checkpoint:
            self.extend(target, checkpoint.tokens)

    def _drop(self, cell: int) -> None:
        self._refs[cell] -= 1
        if not self._refs[cell]:
            del self._refs[cell]


def _rank(match: Match) -> tuple[int, bool, bool]:
    """The longer the better; then one that is idle, then one that needs nothing put back."""
    idle = match.sequence is not None and not match.sequence.busy
    return match.n, idle, match.checkpoint is None


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
