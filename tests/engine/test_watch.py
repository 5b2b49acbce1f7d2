"""Who is taken for stuck: on looks alone, without a process and without a clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.engines.embedded.watch import SILENT_S, Watch

IDLE = (0, True)


def looks(watch: Watch, n: int) -> list[str]:
    return [trouble for _ in range(n) if (trouble := watch.look())]


def test_one_without_a_pulse_is_stuck_after_a_minute_at_most() -> None:
    watch = Watch(every_s=5, stuck_s=300)
    assert not looks(watch, int(SILENT_S) // 5)
    assert watch.look() == "it gave no sign of life for 60 seconds"


def test_a_short_patience_holds_for_the_pulse_too() -> None:
    watch = Watch(every_s=1, stuck_s=4)
    assert not looks(watch, 4)
    assert watch.look() == "it gave no sign of life for 4 seconds"


def test_one_with_a_pulse_that_makes_no_step_is_stuck_whichever_thread_it_is() -> None:
    for threads in ([(7, False), IDLE], [IDLE, (7, False)]):
        watch = Watch(every_s=5, stuck_s=300)
        for _ in range(60):
            watch.pulse(threads)
            assert not watch.look()
        watch.pulse(threads)
        assert watch.look() == "one step took longer than 300 seconds"


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=200))
def test_one_that_makes_steps_or_has_nothing_to_do_is_never_stuck(
    moves: list[tuple[bool, bool]],
) -> None:
    watch, steps = Watch(every_s=5, stuck_s=30), [0, 0]
    for moved in moves:
        steps = [n + m for n, m in zip(steps, moved, strict=True)]
        watch.pulse([(n, not m) for n, m in zip(steps, moved, strict=True)])
        assert not watch.look()
