"""How long a model takes for so many tokens. Pure.

Evaluating a token costs the same for the weights, and more with each token before it for the
attention; both are straight lines on every machine that was measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Speeds:
    """Seconds. `prefill_s` to evaluate one token of a prompt, and `prefill_slope_s` more for each
    token before it; the same for generating one."""

    prefill_s: float
    decode_s: float
    prefill_slope_s: float = 0.0
    decode_slope_s: float = 0.0
    request_s: float = 0.0
    """What a request costs besides."""

    def prefill(self, n_tokens: int, *, behind: int) -> float:
        """Seconds to evaluate `n_tokens` behind so many that are in the cache."""
        before = n_tokens * behind + n_tokens * n_tokens / 2
        return self.prefill_s * n_tokens + self.prefill_slope_s * before

    def decode(self, n_tokens: int, *, behind: int) -> float:
        before = n_tokens * behind + n_tokens * n_tokens / 2
        return self.decode_s * n_tokens + self.decode_slope_s * before


@dataclass(frozen=True, slots=True)
class Timed:
    """`n_tokens` behind `behind` others took `seconds`."""

    n_tokens: int
    behind: int
    seconds: float

    @property
    def before(self) -> float:
        return self.n_tokens * self.behind + self.n_tokens * self.n_tokens / 2


def line(near: Timed, far: Timed) -> tuple[float, float]:
    """(seconds a token, seconds more for each token before it) from two measurements; neither is
    below 0: where the far one was no slower, the machine's noise was larger than the slope."""
    # near.seconds = a * near.n + b * near.before, and the same for far.
    determinant = near.n_tokens * far.before - far.n_tokens * near.before
    if determinant > 0:
        a = (near.seconds * far.before - far.seconds * near.before) / determinant
        b = (near.n_tokens * far.seconds - far.n_tokens * near.seconds) / determinant
        if a > 0 and b >= 0:
            return a, b
    return (near.seconds + far.seconds) / (near.n_tokens + far.n_tokens), 0.0
