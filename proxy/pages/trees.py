"""A conversation's tree: its branches, and one path through it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memory.listing import Twig
from memory.transcript import turn_starts


@dataclass(frozen=True, slots=True)
class Turn:
    """Messages `first`..`last` (both included) of a path. `number` counts from 1."""

    number: int
    first: int
    last: int
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Branch:
    """A stretch of the tree without forks. `leaf` is the newest end that it leads to; `indent`
    counts the forks before it. `n_turns` are those that begin in it."""

    leaf: bytes
    first_depth: int
    last_depth: int
    n_turns: int
    created_at: float
    indent: int
    begins_with: bytes
    is_end: bool


class Tree:
    """All messages of one conversation."""

    def __init__(self, twigs: Sequence[Twig]) -> None:
        self._twigs = {twig.digest: twig for twig in twigs}
        self._children: dict[bytes, list[Twig]] = {}
        self._roots = [t for t in twigs if t.parent not in self._twigs]
        for twig in twigs:
            if twig.parent in self._twigs:
                self._children.setdefault(twig.parent, []).append(twig)

    def __len__(self) -> int:
        return len(self._twigs)

    @property
    def n_ends(self) -> int:
        return sum(digest not in self._children for digest in self._twigs)

    def newest_leaf(self) -> bytes | None:
        """The end that was stored last, the deepest of those of one moment."""
        ends = [t for t in self._twigs.values() if t.digest not in self._children]
        found = max(ends, key=lambda t: (t.created_at, t.depth), default=None)
        return None if found is None else found.digest

    def end_below(self, digest: bytes) -> bytes | None:
        """The end that the newest messages below this one lead to; None if it is not in the
        tree."""
        while children := self._children.get(digest):
            digest = max(children, key=lambda t: (t.created_at, t.depth)).digest
        return digest if digest in self._twigs else None

    def path(self, leaf: bytes) -> tuple[Twig, ...]:
        """From the root to `leaf`; () if it is not in the tree."""
        found = []
        twig = self._twigs.get(leaf)
        while twig is not None:
            found.append(twig)
            twig = self._twigs.get(twig.parent)
        return tuple(reversed(found))

    def branches(self) -> list[Branch]:
        """Depth first, so that each stands below the one it forks from."""
        out: list[Branch] = []
        stack = [(root, 0) for root in reversed(self._roots)]
        while stack:
            twig, indent = stack.pop()
            stretch = [twig]
            while len(next_ := self._children.get(stretch[-1].digest, [])) == 1:
                stretch.append(next_[0])
            out.append(self._branch(stretch, indent, is_end=not next_))
            stack += [(child, indent + 1) for child in reversed(next_)]
        return out

    def _branch(self, stretch: Sequence[Twig], indent: int, *, is_end: bool) -> Branch:
        last = stretch[-1]
        return Branch(
            leaf=self.end_below(last.digest) or last.digest,
            first_depth=stretch[0].depth,
            last_depth=last.depth,
            n_turns=len(turn_starts([t.role for t in stretch])),
            created_at=last.created_at,
            indent=indent,
            begins_with=stretch[0].digest,
            is_end=is_end,
        )


def turns_of(path: Sequence[Twig]) -> tuple[Turn, ...]:
    starts = turn_starts([twig.role for twig in path])
    ends = [*starts[1:], len(path)]
    return tuple(
        Turn(number, first, end - 1, sum(max(0, t.n_tokens) for t in path[first:end]))
        for number, (first, end) in enumerate(zip(starts, ends, strict=False), start=1)
    )
