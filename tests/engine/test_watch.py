"""Who is taken for stuck: on looks alone, without a process and without a clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.engines.embedded.watch import UNANSWERED_S, Watch


def looks(watch: Watch, n: int) -> list[str]:
    return [trouble for _ in range(n) if (trouble := watch.look())]


def test_one_that_answers_nothing_is_stuck_after_a_minute_at_most() -> None:
    watch = Watch(every_s=5, stuck_s=300)
    assert not looks(watch, int(UNANSWERED_S) // 5)
    assert watch.look() == "it answered nothing for 60 seconds"


def test_a_short_patience_holds_for_answers_too() -> None:
    watch = Watch(every_s=1, stuck_s=4)
    assert not looks(watch, 4)
    assert watch.look() == "it answered nothing for 4 seconds"


def test_one_that_answers_and_makes_no_step_is_stuck() -> None:
    watch = Watch(every_s=5, stuck_s=300)
    for _ in range(60):
        watch.answered(7, idle=False)
        assert not watch.look()
    watch.answered(7, idle=False)
    assert watch.look() == "one step took longer than 300 seconds"


@given(st.lists(st.booleans(), max_size=200))
def test_one_that_makes_steps_or_has_nothing_to_do_is_never_stuck(moves: list[bool]) -> None:
    watch, steps = Watch(every_s=5, stuck_s=30), 0
    for moved in moves:
        steps += moved
        watch.answered(steps, idle=not moved)
        assert not watch.look()
