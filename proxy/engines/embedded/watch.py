"""Whether the model process is stuck, judged by its pulse: pure, and without a clock.

Time is counted in looks: `every_s` for each that was really taken. Where the whole machine or
container stood still, no look was taken, and nobody is blamed for the time.
"""

from __future__ import annotations

from collections.abc import Sequence

SILENT_S = 60.0
"""A process without a pulse for so long is stuck, whatever it does: it sends one every second."""


class Watch:
    """Over one process, from the moment it has loaded the model."""

    def __init__(self, *, every_s: float, stuck_s: float) -> None:
        """`stuck_s` is the longest that one step of the model may take."""
        self._every_s = every_s
        self._stuck_s = stuck_s
        self._silent_s = min(SILENT_S, stuck_s)
        self._silent = 0
        self._still: list[int] = []
        """For each thread, the looks since it was last seen to move or to have nothing to do."""
        self._steps: list[int] = []

    def __repr__(self) -> str:
        return f"<Watch silent={self._silent} still={self._still} looks, steps {self._steps}>"

    def pulse(self, threads: Sequence[tuple[int, bool]]) -> None:
        """Each thread of the process has taken so many steps so far, and is idle or not."""
        self._silent = 0
        before = self._steps or [-1] * len(threads)
        still = self._still or [0] * len(threads)
        self._still = [
            0 if idle or steps != last else n
            for (steps, idle), last, n in zip(threads, before, still, strict=True)
        ]
        self._steps = [steps for steps, _ in threads]

    def look(self) -> str:
        """Counts one look. Why the process must go, or "" when it may stay."""
        self._silent += 1
        self._still = [n + 1 for n in self._still]
        if self._silent * self._every_s > self._silent_s:
            return f"it gave no sign of life for {self._silent_s:g} seconds"
        if any(n * self._every_s > self._stuck_s for n in self._still):
            return f"one step took longer than {self._stuck_s:g} seconds"
        return ""
