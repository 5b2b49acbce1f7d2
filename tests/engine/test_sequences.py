"""The books of the KV cache, held against a naive twin that copies everything."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from proxy.engines.embedded.sequences import Sequence, SequenceCache, common_prefix


class NaiveKV:
    """What llama.cpp would hold: the tokens of each sequence, by position. No sharing, no books."""

    can_cut = True

    def __init__(self) -> None:
        self.held: dict[int, list[int]] = {}

    def remove(self, sequence: int, start: int) -> None:
        del self.held.setdefault(sequence, [])[start:]

    def copy(self, source: int, target: int, end: int) -> None:
        self.held[target] = self.held[source][:end]

    def end(self, sequence: int) -> int:
        return len(self.held.get(sequence, []))


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix_agrees_with_the_obvious_loop(a: list[int], b: list[int]) -> None:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    assert common_prefix(a, b) == n


class Machine(RuleBasedStateMachine):
    """Requests of two owners come, grow, and are cut; the twin keeps what each should see."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = NaiveKV()
        self.cache = SequenceCache(self.kv, n_sequences=4, n_cells=40)
        self.running: list[tuple[Sequence, list[int]]] = []

    @rule(
        owner=st.sampled_from("ab"),
        tokens=st.lists(st.integers(0, 2), min_size=1, max_size=12),
        in_place=st.booleans(),
    )
    def start(self, owner: str, tokens: list[int], in_place: bool) -> None:
        best = max(
            (
                common_prefix(s.tokens, tokens[:-1])
                for s in self.cache._sequences
                if s.owner == owner
            ),
            default=0,
        )
        busy = {id(s) for s, _ in self.running}
        sequence = self.cache.acquire(owner, tokens, in_place=in_place)
        if sequence is None:
            assert len(self.running) >= 3
            return
        assert id(sequence) not in busy, "a running request's sequence was given away"
        assert sequence.owner == owner
        assert sequence.tokens == tokens[: len(sequence.tokens)]
        assert len(sequence.tokens) == best, "a longer prefix of this owner was in the cache"
        missing = tokens[len(sequence.tokens) :]
        assert missing, "the last token is always evaluated: its logits are wanted"
        if self.cache.make_room(len(missing)):
            self.evaluate(sequence, missing)
            self.running.append((sequence, tokens))
        else:
            self.cache.release(sequence, keep=True)

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
        busy = {id(s) for s, _ in self.running}
        assert not any(
            s.tokens for s in self.cache._sequences if s.owner == owner and id(s) not in busy
        )

    def evaluate(self, sequence: Sequence, tokens: list[int]) -> None:
        self.kv.held.setdefault(sequence.id, []).extend(tokens)
        self.cache.extend(sequence, tokens)

    @invariant()
    def books_balance(self) -> None:
        self.cache.check_integrity()
        for s in self.cache._sequences:
            assert self.kv.held.get(s.id, []) == s.tokens

    @invariant()
    def running_requests_keep_their_tokens(self) -> None:
        for sequence, tokens in self.running:
            assert sequence.tokens == tokens


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBooks = Machine.TestCase


def filled(tokens: list[int], *, n_sequences: int = 4) -> tuple[SequenceCache, NaiveKV]:
    kv = NaiveKV()
    cache = SequenceCache(kv, n_sequences=n_sequences, n_cells=100)
    sequence = cache.acquire("a", tokens, in_place=True)
    assert sequence is not None
    kv.held[sequence.id] = list(tokens)
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
    cache, kv = filled([1, 2, 3])
    kv.can_cut = False
    assert cache.match_prefix("a", [1, 2, 9]) == (None, 0)
    assert cache.match_prefix("a", [1, 2, 3, 9])[1] == 3


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


def test_an_unbalanced_book_is_noticed() -> None:
    cache, kv = filled([1, 2, 3])
    kv.held[0].pop()
    with pytest.raises(AssertionError):
        cache.check_integrity()
