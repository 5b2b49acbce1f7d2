"""Does the same seed give the same text?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bench.bounds import Check, at_least
from bench.engine_sides import ask, ours, question, story
from proxy.engines.base import Sampling

TIMES = 10
TOKENS = 48
SAMPLING = Sampling(temperature=0.8, seed=11)
WINDOW_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Seeded:
    """How many of the answers to one question, drawn with one seed, are the first one again."""

    evaluated_whole: int
    from_the_cache: int
    """No promise: one token evaluated behind cached ones is another sum than all at once, and a
    draw near a border falls the other way."""
    without_a_seed: int
    """Different texts of as many draws without a seed: that the draw is a draw."""

    def checks(self) -> list[Check]:
        return [
            at_least("same seed, prompt evaluated whole: same texts", self.evaluated_whole, TIMES),
            at_least("no seed: different texts", self.without_a_seed, 2),
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"times": TIMES}


async def seeded() -> Seeded:
    async with ours(n_ctx=WINDOW_TOKENS, cache_tokens=2 * WINDOW_TOKENS) as engine:

        async def texts(sampling: Sampling, *, keep: bool) -> list[str]:
            wanted = question(story("seeds"), max_tokens=TOKENS, sampling=sampling, keep=keep)
            return [(await ask(engine, wanted)).text for _ in range(TIMES)]

        whole = await texts(SAMPLING, keep=False)
        cached = await texts(SAMPLING, keep=True)
        drawn = await texts(Sampling(temperature=0.8), keep=False)
    first = whole[0]
    return Seeded(whole.count(first), cached.count(first), len(set(drawn)))


def report(found: Seeded) -> str:
    return (
        f"One question, one seed, {TIMES} times: {found.evaluated_whole} times the same text when "
        f"the prompt is evaluated whole,\n  {found.from_the_cache} when it comes from the cache; "
        f"without a seed {found.without_a_seed} different texts"
    )
