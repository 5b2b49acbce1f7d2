"""The books of the KV cache, held against a naive twin that copies everything."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from proxy.engines.embedded.sequences import Sequence, SequenceCache, common_prefix


class NaiveKV:
    """What llama.cpp would hold: the tokens of each sequence, by position. No sharing, no books."""

    keeps_parts = part_is_all = False

    def __init__(self) -> None:
        self.held: dict[int, list[int]] = {}

    def reaches(self, sequence: int, n: int) -> bool:
        return True

    def remove(self, sequence: int, start: int) -> bool:
        del self.held.setdefault(sequence, [])[start:]
        return True

    def copy(self, source: int, target: int, end: int) -> None:
        self.held[target] = self.held[source][:end]

    def end(self, sequence: int) -> int:
        return len(self.held.get(sequence, []))

    def save_part(self, sequence: int) -> bytes:
        raise AssertionError("nothing of this state is ever lost")

    def load_part(self, sequence: int, part: bytes) -> bool:
        raise AssertionError("nothing of this state is ever lost")

    def evaluate(self, sequence: int, tokens: list[int]) -> None:
        self.held.setdefault(sequence, []).extend(tokens)

    def knows(self, sequence: int) -> list[int]:
        """The tokens that the next one would be computed from."""
        return self.held.get(sequence, [])


class NaiveRecurrent(NaiveKV):
    """One state a sequence: all tokens so far, melted together. It has no way back."""

    keeps_parts = part_is_all = True

    def reaches(self, sequence: int, n: int) -> bool:
        return False

    def remove(self, sequence: int, start: int) -> bool:
        if 0 < start < self.end(sequence):
            return False
        return super().remove(sequence, start)

    def copy(self, source: int, target: int, end: int) -> None:
        self.held[target] = list(self.held[source])

    def save_part(self, sequence: int) -> bytes:
        return bytes(self.held[sequence])

    def load_part(self, sequence: int, part: bytes) -> bool:
        self.held[sequence] = list(part)
        return True


class NaiveHybrid(NaiveRecurrent):
    """Beside the recurrent state cells of attention, which can be cut; both must fit."""

    part_is_all = False

    def __init__(self) -> None:
        super().__init__()
        self.cells: dict[int, list[int]] = {}

    def remove(self, sequence: int, start: int) -> bool:
        if not super().remove(sequence, start):
            return False
        del self.cells.setdefault(sequence, [])[start:]
        return True

    def copy(self, source: int, target: int, end: int) -> None:
        super().copy(source, target, end)
        self.cells[target] = self.cells[source][:end]

    def end(self, sequence: int) -> int:
        return min(super().end(sequence), len(self.cells.get(sequence, [])))

    def evaluate(self, sequence: int, tokens: list[int]) -> None:
        super().evaluate(sequence, tokens)
        self.cells.setdefault(sequence, []).extend(tokens)

    def knows(self, sequence: int) -> list[int]:
        assert self.held.get(sequence, []) == self.cells.get(sequence, [])
        return super().knows(sequence)


class NaiveWindow(NaiveKV):
    """Beside cells that can be cut a window of the last ones. What has left it is overwritten
    sooner or later; here as late as possible or at once, in turns.
    """

    keeps_parts = True
    WINDOW = 3

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[int, int] = {}
        self.turn = 0

    def needs(self, n: int) -> int:
        """The first position that a token at position `n` attends to."""
        return max(0, n - self.WINDOW + 1)

    def reaches(self, sequence: int, n: int) -> bool:
        return self.first.get(sequence, 0) <= self.needs(n)

    def remove(self, sequence: int, start: int) -> bool:
        super().remove(sequence, start)
        if start == 0:
            self.first[sequence] = 0
        return True

    def copy(self, source: int, target: int, end: int) -> None:
        super().copy(source, target, end)
        self.first[target] = self.first.get(source, 0)

    def save_part(self, sequence: int) -> bytes:
        end = self.end(sequence)
        first = max(self.first.get(sequence, 0), end - self.WINDOW)
        return bytes([first, *self.held[sequence][first:end]])

    def load_part(self, sequence: int, part: bytes) -> bool:
        first, *tokens = part
        assert self.held[sequence][first : first + len(tokens)] == tokens, "of other tokens"
        del self.held[sequence][first + len(tokens) :]
        self.first[sequence] = first
        return True

    def evaluate(self, sequence: int, tokens: list[int]) -> None:
        for token in tokens:
            assert self.first.get(sequence, 0) <= self.needs(self.end(sequence)), "overwritten"
            super().evaluate(sequence, [token])
            self.turn += 1
            if self.turn % 3:
                self.first[sequence] = max(
                    self.first.get(sequence, 0), self.needs(self.end(sequence))
                )


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix_agrees_with_the_obvious_loop(a: list[int], b: list[int]) -> None:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    assert common_prefix(a, b) == n


class Machine(RuleBasedStateMachine):
    """Requests of two owners come, grow, and are cut; the twin keeps what each should see."""

    kind: type[NaiveKV] = NaiveKV
    n_cells = 40

    def __init__(self) -> None:
        super().__init__()
        self.kv = self.kind()
        self.cache = SequenceCache(
            self.kv, n_sequences=4, n_cells=self.n_cells, checkpoint_bytes=1000
        )
        self.running: list[tuple[Sequence, list[int]]] = []
        self.refused: list[tuple[int, str, list[int]]] = []
        """Who found no room, and after how many openings."""

    @rule(
        owner=st.sampled_from("ab"),
        tokens=st.lists(st.integers(0, 2), min_size=1, max_size=12),
        in_place=st.booleans(),
    )
    def start(self, owner: str, tokens: list[int], in_place: bool) -> None:
        best = self.best(owner, tokens[:-1])
        busy = {id(s) for s, _ in self.running}
        room = self.cache.has_room(owner, tokens[:-1], n_tokens=len(tokens))
        sequence = self.cache.acquire(owner, tokens, in_place=in_place)
        if sequence is None:
            assert len(self.running) >= 3
            assert not room
            return
        assert id(sequence) not in busy, "a running request's sequence was given away"
        assert sequence.owner == owner
        assert sequence.tokens == tokens[: len(sequence.tokens)]
        assert len(sequence.tokens) == best, "more of this owner's could be gone on from"
        missing = tokens[len(sequence.tokens) :]
        assert missing, "the last token is always evaluated: its logits are wanted"
        assert self.cache.make_room(len(missing)) == room
        if room:
            self.evaluate(sequence, missing[:-1])
            if in_place:
                self.cache.checkpoint(sequence)
            self.evaluate(sequence, missing[-1:])
            self.running.append((sequence, tokens))
        else:
            self.cache.release(sequence, keep=True)

    @rule(owner=st.sampled_from("ab"), tokens=st.lists(st.integers(0, 2), min_size=1, max_size=40))
    def ask(self, owner: str, tokens: list[int]) -> None:
        if not self.cache.has_room(owner, tokens[:-1], n_tokens=len(tokens)):
            self.refused.append((self.cache.openings, owner, tokens))

    def best(self, owner: str, tokens: list[int]) -> int:
        """How much can be gone on from, found by trying every length of everything."""
        ours = [s for s in self.cache._sequences if s.owner == owner]
        best = max((self.reach(s, common_prefix(s.tokens, tokens)) for s in ours), default=0)
        if self.kv.part_is_all:
            kept = [c.tokens for c in self.cache.checkpoints._held if c.owner == owner]
            best = max([best, *(len(c) for c in kept if c == tokens[: len(c)])])
        return best

    def reach(self, s: Sequence, most: int) -> int:
        kept = [c.tokens for c in self.cache.checkpoints._held if c.owner == s.owner]
        for n in range(most, 0, -1):
            if n == len(s.tokens) or self.kv.reaches(s.id, n) or s.tokens[:n] in kept:
                return n
        return 0

    @rule(token=st.integers(0, 2))
    def decode(self, token: int) -> None:
        if self.running and self.cache.make_room(1):
            sequence, tokens = self.running[0]
            self.evaluate(sequence, [token])
            tokens.append(token)

    @rule(keep=st.booleans(), which=st.integers(0, 3))
    def end(self, keep: bool, which: int) -> None:
        if self.running:
            sequence, _ = self.running.pop(which % len(self.running))
            self.cache.release(sequence, keep=keep)

    @rule(owner=st.sampled_from("ab"))
    def forget(self, owner: str) -> None:
        self.cache.forget(owner)
        assert not any(c.owner == owner for c in self.cache.checkpoints._held)
        busy = {id(s) for s, _ in self.running}
        ours = [s for s in self.cache._sequences if s.owner == owner]
        assert not any(s.tokens for s in ours if id(s) not in busy)
        assert not any(s.base or s.lasting for s in ours if id(s) in busy)

    @rule(asked=st.integers(0, 12))
    def cut(self, asked: int) -> None:
        if self.running:
            sequence, tokens = self.running[-1]
            expected = self.reach(sequence, min(asked, len(tokens)))
            self.cache.truncate(sequence, asked)
            assert len(sequence.tokens) == expected
            assert sequence.tokens == tokens[: len(sequence.tokens)]
            del tokens[len(sequence.tokens) :]

    @rule(n=st.integers(1, 4))
    def fail(self, n: int) -> None:
        """A batch fails half-way: the cache has tokens that are in nobody's books."""
        if self.running and self.cache.make_room(n):
            sequence, _ = self.running.pop()
            self.kv.evaluate(sequence.id, [1] * n)
            self.cache.release(sequence, keep=False)

    def evaluate(self, sequence: Sequence, tokens: list[int]) -> None:
        assert self.kv.knows(sequence.id) == sequence.tokens, "not the state of these tokens"
        self.kv.evaluate(sequence.id, tokens)
        self.cache.extend(sequence, tokens)

    @invariant()
    def books_balance(self) -> None:
        self.cache.check_integrity()
        for s in self.cache._sequences:
            assert self.kv.knows(s.id) == s.tokens

    @invariant()
    def who_found_no_room_finds_none_before_the_next_opening(self) -> None:
        for openings, owner, tokens in self.refused:
            if openings == self.cache.openings:
                assert not self.cache.has_room(owner, tokens[:-1], n_tokens=len(tokens))

    @invariant()
    def running_requests_keep_their_tokens(self) -> None:
        for sequence, tokens in self.running:
            assert sequence.tokens == tokens


class RecurrentMachine(Machine):
    kind = NaiveRecurrent
    n_cells = 1000  # A state of any length takes the same room: there are always enough.


class HybridMachine(Machine):
    kind = NaiveHybrid


class WindowMachine(Machine):
    kind = NaiveWindow


for machine in (Machine, RecurrentMachine, HybridMachine, WindowMachine):
    machine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)

TestBooks = Machine.TestCase
TestRecurrentBooks = RecurrentMachine.TestCase
TestHybridBooks = HybridMachine.TestCase
TestWindowBooks = WindowMachine.TestCase


def filled(
    tokens: list[int], *, n_sequences: int = 4, kind: type[NaiveKV] = NaiveKV
) -> tuple[SequenceCache, NaiveKV]:
    kv = kind()
    cache = SequenceCache(kv, n_sequences=n_sequences, n_cells=100, checkpoint_bytes=1000)
    sequence = cache.acquire("a", tokens, in_place=True)
    assert sequence is not None
    kv.evaluate(sequence.id, tokens)
    cache.extend(sequence, tokens)
    cache.release(sequence, keep=True)
    return cache, kv


def test_two_owners_never_share_a_prefix() -> None:
    cache, _ = filled([1, 2, 3])
    other = cache.acquire("b", [1, 2, 3, 4], in_place=True)
    assert other is not None
    assert other.tokens == []


def test_a_fork_shares_cells_and_leaves_the_original_whole() -> None:
    cache, _ = filled([1, 2, 3, 4])
    fork = cache.acquire("a", [1, 2, 9], in_place=True)
    assert fork is not None
    assert fork.tokens == [1, 2]
    assert cache.cells_used == 4
    assert cache.match_prefix("a", [1, 2, 3, 4])[1] == 4


def test_an_extended_prompt_takes_its_sequence_as_it_is() -> None:
    cache, _ = filled([1, 2, 3])
    again = cache.acquire("a", [1, 2, 3, 4], in_place=True)
    assert again is not None
    assert again.tokens == [1, 2, 3]
    assert cache.sequences_used == 1


def test_a_state_that_cannot_be_cut_is_reused_only_when_whole() -> None:
    cache, _ = filled([1, 2, 3], kind=NaiveHybrid)
    assert cache.match_prefix("a", [1, 2, 9]).n == 0
    assert cache.match_prefix("a", [1, 2, 3, 9]).n == 3
    assert cache.shared_prefix("a", [1, 2, 9]) == 2


@pytest.mark.parametrize("kind", [NaiveRecurrent, NaiveHybrid, NaiveWindow])
def test_a_prompt_that_parts_behind_a_checkpoint_goes_on_from_there(kind: type[NaiveKV]) -> None:
    cache, kv = filled([1, 2, 3, 4], kind=kind)
    chat = cache.acquire("a", [1, 2, 3, 4, 5], in_place=True)
    assert chat is not None
    cache.checkpoint(chat)
    kv.evaluate(chat.id, [5, 6, 7, 8, 9])
    cache.extend(chat, [5, 6, 7, 8, 9])
    cache.release(chat, keep=True)
    again = cache.acquire("a", [1, 2, 3, 4, 5], in_place=True)
    assert again is not None
    assert again is not chat
    assert again.tokens == kv.knows(again.id) == [1, 2, 3, 4]
    assert cache.checkpoints.hits == 1
    assert chat.tokens == kv.knows(chat.id) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_checkpoint_is_its_owners_alone() -> None:
    cache, _ = filled([1, 2, 3], kind=NaiveRecurrent)
    cache.checkpoint(cache._sequences[0])
    assert cache.match_prefix("b", [1, 2, 3, 4]).n == 0
    cache.forget("b")
    assert len(cache.checkpoints) == 1
    cache.forget("a")
    assert len(cache.checkpoints) == 0


def test_a_fork_has_a_window_of_its_own() -> None:
    cache, kv = filled([1, 2, 3, 4, 5], kind=NaiveWindow)
    loads: list[int] = []
    load_part = kv.load_part
    kv.load_part = lambda s, part: loads.append(s) or load_part(s, part)  # type: ignore
    fork = cache.acquire("a", [1, 2, 3, 4, 5, 6], in_place=False)
    assert fork is not None
    assert loads == [fork.id]


def test_a_part_that_finds_no_room_costs_the_fork_its_prefix_and_nothing_else() -> None:
    cache, kv = filled([1, 2, 3], kind=NaiveHybrid)

    def no_room(sequence: int, part: bytes) -> bool:
        kv.held[sequence] = []
        return False

    kv.load_part = no_room  # type: ignore[method-assign]
    fork = cache.acquire("a", [1, 2, 3, 4], in_place=False)
    assert fork is not None
    assert fork.tokens == kv.knows(fork.id) == []
    assert cache.holds("a", [1, 2, 3])
    cache.check_integrity()


def test_a_checkpoint_alone_takes_cells_too() -> None:
    cache, kv = filled([1] * 60, kind=NaiveRecurrent)
    cache.checkpoint(cache._sequences[0])
    cache.truncate(cache._sequences[0], 0)
    others = cache.acquire("b", [2] * 50, in_place=True)
    assert others is not None
    kv.evaluate(others.id, [2] * 50)
    cache.extend(others, [2] * 50)
    again = cache.acquire("a", [1] * 61, in_place=True)
    assert again is not None
    assert again.tokens == []
    cache.check_integrity()


def test_warming_what_is_there_whole_makes_sure_that_it_can_be_come_back_to() -> None:
    cache, _ = filled([1, 2, 3], kind=NaiveRecurrent)
    assert cache.holds("a", [1, 2, 3])
    assert [c.tokens for c in cache.checkpoints._held] == [[1, 2, 3]]


def test_what_a_passing_request_holds_does_not_count_as_there_to_stay() -> None:
    cache, kv = filled([1, 2, 3])
    passing = cache.acquire("a", [1, 2, 3, 4, 5], in_place=False)
    assert passing is not None
    kv.held[passing.id] += [4]
    cache.extend(passing, [4])
    assert not cache.holds("a", [1, 2, 3, 4])
    assert cache.holds("a", [1, 2, 3])
    assert not cache.holds("b", [1, 2, 3])
    cache.release(passing, keep=True)
    assert cache.holds("a", [1, 2, 3, 4])


def test_a_passing_request_gives_back_the_prefix_it_was_lent() -> None:
    cache, kv = filled([1, 2, 3, 4], n_sequences=1)
    lent = cache.acquire("a", [1, 2, 9, 9], in_place=False)
    assert lent is not None
    assert lent.tokens == [1, 2]
    kv.held[lent.id] += [9]
    cache.extend(lent, [9])
    cache.release(lent, keep=False)
    assert lent.tokens == [1, 2]
    cache.check_integrity()


def test_cells_that_a_failed_batch_left_behind_go_with_its_request() -> None:
    cache, kv = filled([1, 2, 3])
    fresh = cache.acquire("b", [7, 8, 9], in_place=True)
    assert fresh is not None
    kv.held[fresh.id] = [7, 8]
    cache.release(fresh, keep=False)
    cache.check_integrity()


def test_nothing_is_evicted_in_vain() -> None:
    cache, kv = filled([1, 2, 3])
    busy = cache.acquire("b", [9] * 96, in_place=True)
    assert busy is not None
    kv.held[busy.id] = [9] * 95
    cache.extend(busy, [9] * 95)
    assert not cache.make_room(6)
    assert cache.holds("a", [1, 2, 3])
    assert cache.make_room(5)
    assert not cache.holds("a", [1, 2, 3])


def test_a_look_for_room_moves_nothing() -> None:
    cache, kv = filled([1, 2, 3, 4])
    busy = cache.acquire("b", [9] * 91, in_place=True)
    assert busy is not None
    kv.evaluate(busy.id, [9] * 90)
    cache.extend(busy, [9] * 90)
    held = [list(s.tokens) for s in cache._sequences]
    assert not cache.has_room("a", [1, 2, 7], n_tokens=11)
    assert cache.has_room("a", [1, 2, 7], n_tokens=10)
    assert cache.has_room("b", [9] * 90, n_tokens=100)
    assert [s.tokens for s in cache._sequences] == held
    cache.check_integrity()


def test_an_unbalanced_book_is_noticed() -> None:
    cache, kv = filled([1, 2, 3])
    kv.held[0].pop()
    with pytest.raises(AssertionError):
        cache.check_integrity()
