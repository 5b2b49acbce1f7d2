"""Checkpoints in memory: within the budget, the owner's own, the least recently used go first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.engines.embedded.checkpoints import PER_LINE, Checkpoints

OVERHEAD = 8
"""Bytes that a token counts for."""


def held(checkpoints: Checkpoints) -> list[list[int]]:
    return sorted(c.tokens for c in checkpoints._held)


def test_the_longest_that_the_prompt_begins_with_is_found() -> None:
    checkpoints = Checkpoints(budget_bytes=1000)
    for tokens in ([1], [1, 2], [1, 2, 3], [1, 9]):
        checkpoints.add("a", tokens, b"x")
    found = checkpoints.match("a", [1, 2, 4])
    assert found is not None
    assert found.tokens == [1, 2]
    assert checkpoints.match("a", [2]) is None
    assert checkpoints.match("b", [1, 2, 4]) is None


def test_the_least_recently_used_goes_when_the_budget_is_full() -> None:
    checkpoints = Checkpoints(budget_bytes=3 * (100 + OVERHEAD))
    for token in (1, 2, 3):
        checkpoints.add("a", [token], b"x" * 100)
    first = checkpoints.match("a", [1])
    assert first is not None
    checkpoints.use(first)
    checkpoints.add("a", [4], b"x" * 100)
    assert held(checkpoints) == [[1], [3], [4]]


def test_what_is_larger_than_the_budget_is_not_kept_and_nothing_goes_for_it() -> None:
    checkpoints = Checkpoints(budget_bytes=100)
    checkpoints.add("a", [1], b"x")
    checkpoints.add("a", [2], b"x" * 100)
    assert held(checkpoints) == [[1]]


def test_a_long_chat_does_not_push_out_everybody_elses() -> None:
    checkpoints = Checkpoints(budget_bytes=10**6)
    checkpoints.add("a", [7, 7], b"x")
    for n in range(1, 40):
        checkpoints.add("a", list(range(n)), b"x")
    assert len(checkpoints) == PER_LINE + 1
    assert checkpoints.match("a", [7, 7, 7]) is not None


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.lists(st.integers(0, 2), max_size=4), st.integers(0, 60)
        )
    )
)
def test_the_budget_holds_whatever_comes(added: list[tuple[str, list[int], int]]) -> None:
    checkpoints = Checkpoints(budget_bytes=200)
    for owner, tokens, size in added:
        checkpoints.add(owner, tokens, b"x" * size)
        checkpoints.check_integrity()
        found = checkpoints.match(owner, tokens)
        assert found is not None
        assert (found.tokens, len(found.part)) == (tokens, size)
    checkpoints.forget("a")
    assert all(c.owner == "b" for c in checkpoints._held)
    checkpoints.check_integrity()
