"""Whether the model process is stuck, judged by what it answers: pure, and without a clock.

Time is counted in looks: `every_s` for each that was really taken. Where the whole machine or
container stood still, no look was taken, and nobody is blamed for the time.
"""

from __future__ import annotations

UNANSWERED_S = 60.0
"""A process that answers nothing for so long is stuck, whatever it does: the thread that answers
does nothing else but tokenize."""


class Watch:
    """Over one process, from the moment it has loaded the model."""

    def __init__(self, *, every_s: float, stuck_s: float) -> None:
        """`stuck_s` is the longest that one step of the model may take."""
        self._every_s = every_s
        self._stuck_s = stuck_s
        self._unanswered_s = min(UNANSWERED_S, stuck_s)
        self._silent = 0
        self._still = 0
        self._steps = -1

    def __repr__(self) -> str:
        return f"<Watch silent={self._silent} still={self._still} looks, step {self._steps}>"

    def answered(self, steps: int, *, idle: bool) -> None:
        """The process has taken `steps` steps so far; `idle` says that it has nothing to do."""
        self._silent = 0
        if idle or steps != self._steps:
            self._still = 0
        self._steps = steps

    def look(self) -> str:
        """Counts one look. Why the process must go, or "" when it may stay."""
        self._silent += 1
        self._still += 1
        if self._silent * self._every_s > self._unanswered_s:
            return f"it answered nothing for {self._unanswered_s:g} seconds"
        if self._still * self._every_s > self._stuck_s:
            return f"one step took longer than {self._stuck_s:g} seconds"
        return ""
