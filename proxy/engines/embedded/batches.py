"""Who gets how much of the next batch, and who comes in next: pure arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol, TypeVar

from proxy.engines.embedded.request import BACKGROUND

BACKGROUND_CHUNK = 64
"""Tokens of background prefill a batch: as fast as 512 on a CPU, and at most these are lost when a
chat request breaks in."""

SHARED_CHUNK = 128
"""Tokens of prefill a batch while others decode beside it: bounds how long they pause."""


class Queued(Protocol):
    """What `admission_order` wants to know of a request."""

    @property
    def owner(self) -> str: ...
    @property
    def arrived_at(self) -> float: ...


Q = TypeVar("Q", bound=Queued)


def shares(wants: Sequence[int], room: int) -> list[int]:
    """How many tokens each prompt gets of `room`, in the order of `wants`.

    Like water in vessels of these heights: all get the same, but nobody more than it wants, and
    what the short ones leave goes to the long ones. Single tokens that cannot be split go to those
    in front. So a short prompt is not held up by a long one, and of n prompts each gets at least
    room // n or all it wants.
    """
    level, left = 0, room
    # From the shortest up: whoever wants less than an equal part leaves the rest to the others.
    for n_before, want in enumerate(sorted(wants)):
        level = left // (len(wants) - n_before)
        if want > level:
            break
        left -= want
    given = [min(want, level) for want in wants]
    spare = room - sum(given)
    for i, want in enumerate(wants):
        if spare and want > given[i]:
            given[i] += 1
            spare -= 1
    return given


def admission_order(waiting: Sequence[Q], running: Sequence[Queued]) -> list[Q]:
    """Who comes in next, first one first: owners in turn, each owner's own in order of arrival.

    A request stands behind all that have fewer of their own owner's before them, running ones
    included: twenty requests of one owner do not hold back another's first. Nobody starves: an
    owner without a running request has its oldest one in the first row, where arrival decides.
    """
    before = Counter(r.owner for r in running)
    rows: list[tuple[int, float, int]] = []
    for i, request in sorted(enumerate(waiting), key=lambda pair: pair[1].arrived_at):
        rows.append((before[request.owner], request.arrived_at, i))
        before[request.owner] += 1
    return [waiting[i] for _, _, i in sorted(rows)]


def room_for_prompts(best: int | None, *, beside: int, n_batch: int, n_ubatch: int) -> int:
    """Most prompt tokens in a batch of class `best` with `beside` answers in it."""
    room = n_batch - beside
    if best == BACKGROUND:
        return min(room, BACKGROUND_CHUNK)
    # Alone, a micro-batch: llama.cpp would cut a longer one anyway, and who arrives meanwhile
    # would wait for all of it.
    return min(room, SHARED_CHUNK if beside else max(SHARED_CHUNK, n_ubatch))
