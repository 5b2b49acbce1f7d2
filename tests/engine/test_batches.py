"""Who gets how much of a batch and who comes in next: nobody starves, nothing is given twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from proxy.engines.embedded.batches import (
    BACKGROUND_CHUNK,
    SHARED_CHUNK,
    admission_order,
    room_for_prompts,
    shares,
)
from proxy.engines.embedded.request import BACKGROUND, CHAT, SIDE

wants_of = st.lists(st.integers(0, 5000), max_size=64)
rooms = st.integers(0, 600)


def token_by_token(wants: list[int], room: int) -> list[int]:
    """The same as `shares`, one token at a time, in turns."""
    given = [0] * len(wants)
    while room and given != wants:
        for i, want in enumerate(wants):
            if room and given[i] < want:
                given[i] += 1
                room -= 1
    return given


@given(wants_of, rooms)
def test_shares_are_what_turns_of_one_token_would_give(wants: list[int], room: int) -> None:
    assert shares(wants, room) == token_by_token(wants, room)


@given(wants_of, rooms)
def test_all_the_room_is_used_and_no_more_and_nobody_gets_more_than_it_wants(
    wants: list[int], room: int
) -> None:
    given = shares(wants, room)
    assert sum(given) == min(room, sum(wants))
    assert all(0 <= n <= want for n, want in zip(given, wants, strict=True))


@given(wants_of.filter(bool), rooms)
def test_everybody_gets_an_equal_part_or_all_it_wants(wants: list[int], room: int) -> None:
    for n, want in zip(shares(wants, room), wants, strict=True):
        assert n >= min(want, room // len(wants))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(1, 130))
def test_every_prompt_is_in_after_a_bounded_number_of_batches(wants: list[int], room: int) -> None:
    """However long the others are, and also if others come after it all the time."""
    left, batches = list(wants), 0
    while left[0]:
        for i, n in enumerate(shares(left, room)):
            left[i] -= n
        # Whoever is done makes place for a new one, behind those that are there.
        left = [left[0], *(want for want in left[1:] if want)]
        left += [300] * (len(wants) - len(left))
        batches += 1
    least = max(1, room // len(wants))
    assert batches <= -(-wants[0] // least)


@given(st.sampled_from([CHAT, SIDE, BACKGROUND]), st.integers(0, 64), st.integers(1, 512))
def test_answers_never_wait_for_more_than_one_chunk(best: int, beside: int, n_ubatch: int) -> None:
    room = room_for_prompts(best, beside=beside, n_batch=512, n_ubatch=n_ubatch)
    if beside:
        assert room <= SHARED_CHUNK
    if best == BACKGROUND:
        assert room <= BACKGROUND_CHUNK
    assert 0 < room <= 512 - beside


# -- who comes in ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    owner: str
    arrived_at: float


queues = st.lists(st.sampled_from("abcd"), max_size=30).map(
    lambda owners: [Asked(owner, float(i)) for i, owner in enumerate(owners)]
)


@given(queues, queues)
def test_nobody_is_lost_and_an_owners_own_stay_in_order(
    waiting: list[Asked], running: list[Asked]
) -> None:
    order = admission_order(waiting[::-1], running)
    assert Counter(order) == Counter(waiting)
    for owner in "abcd":
        own = [r for r in order if r.owner == owner]
        assert own == sorted(own, key=lambda r: r.arrived_at)


@given(queues, queues)
def test_at_no_point_has_an_owner_two_more_than_one_that_waits(
    waiting: list[Asked], running: list[Asked]
) -> None:
    had = Counter(r.owner for r in running)
    order = admission_order(waiting, running)
    for n, request in enumerate(order):
        had[request.owner] += 1
        for other in order[n + 1 :]:
            assert had[request.owner] <= had[other.owner] + 1


@given(queues)
def test_alone_or_one_each_arrival_decides(waiting: list[Asked]) -> None:
    alone = [Asked("a", r.arrived_at) for r in waiting]
    assert admission_order(alone, []) == alone
    first_of_each = list({r.owner: r for r in reversed(waiting)}.values())
    in_order = sorted(first_of_each, key=lambda r: r.arrived_at)
    assert admission_order(first_of_each, []) == in_order


@given(st.integers(1, 4), st.integers(1, 20), st.lists(st.integers(0, 3), max_size=60))
def test_no_request_starves_while_others_keep_coming(
    places: int, n_own: int, newcomers: list[int]
) -> None:
    """One owner's queue drains although a new owner comes in every round."""
    names, clock = (f"new {i}" for i in count()), count()
    own = [Asked("a", float(next(clock))) for _ in range(n_own)]
    waiting, running, rounds = list(own), list[Asked](), 0
    arrivals = iter(newcomers)
    while any(r in waiting for r in own):
        waiting += [Asked(next(names), float(next(clock))) for _ in range(next(arrivals, 1))]
        for request in admission_order(waiting, running)[: places - len(running)]:
            waiting.remove(request)
            running.append(request)
        running = running[1:]
        rounds += 1
        assert rounds <= n_own * (places + 1) + len(newcomers) * 4
