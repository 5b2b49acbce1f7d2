"""Tokens a second, the engine against the process beside it, turn about."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.bounds import Check, at_least
from bench.engine_sides import Answer, Bare, ask, bare, ours, question, story, text
from bench.servers import BenchError
from proxy.engines.embedded.engine import EmbeddedEngine

WINDOW_TOKENS = 4096
PREFILL_TOKENS = {512: 8, 2000: 4}
"""Length of the prompt: how often each side evaluates one."""

DECODE_TOKENS = 128
DECODE_ROUNDS = 30
STREAMS = {4: 8, 8: 6}
"""How many at once: how often."""
STREAM_TOKENS = 128

ALONE_LEAST = 0.97
TOGETHER_LEAST = 0.95


@dataclass(frozen=True, slots=True)
class Side:
    """Tokens a second, one number a run."""

    rates: tuple[float, ...]

    @property
    def best(self) -> float:
        return max(self.rates)

    @property
    def median(self) -> float:
        return median(self.rates)


@dataclass(frozen=True, slots=True)
class Race:
    """The same work done by both sides, turn about, each time by the other one first.

    The two runs of a round stand side by side in time, so that a machine which is quicker for a
    while is it for both: the median of the rounds' ratios is what holds. One side's best run of all
    may be the other's at another speed of the machine; that ratio stands beside it.
    """

    name: str
    ours: Side
    theirs: Side
    least: float

    @property
    def ratio(self) -> float:
        return median(a / b for a, b in zip(self.ours.rates, self.theirs.rates, strict=True))

    @property
    def ratio_of_best(self) -> float:
        return self.ours.best / self.theirs.best

    def check(self) -> Check:
        return at_least(f"{self.name}: tokens/s / alternative's", self.ratio, self.least)

    def row(self) -> str:
        return (
            f"  {self.name:28} {self.ours.median:8.1f} {self.theirs.median:12.1f} {self.ratio:7.3f}"
            f" {self.ratio_of_best:8.3f} {len(self.ours.rates):6}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ours": [round(r, 2) for r in self.ours.rates],
            "theirs": [round(r, 2) for r in self.theirs.rates],
            "ratio": round(self.ratio, 4),
            "ratio_of_best": round(self.ratio_of_best, 4),
        }


async def races() -> list[Race]:
    sides = ours(n_ctx=WINDOW_TOKENS, cache_tokens=WINDOW_TOKENS), bare(n_ctx=WINDOW_TOKENS)
    async with sides[0] as engine, sides[1] as other:
        await _warm_up(engine, other)
        found = [await _prefill(engine, other, n, rounds) for n, rounds in PREFILL_TOKENS.items()]
        found.append(await _decode(engine, other))
        return found + [await _together(engine, other, n, r) for n, r in STREAMS.items()]


async def _warm_up(engine: EmbeddedEngine, other: Bare) -> None:
    """Both answer alike, token for token, or there is nothing to compare."""
    mine = await ask(engine, question(story("warm up"), max_tokens=16))
    theirs = await other.generate(story("warm up"), n=16)
    if mine.end.prompt_tokens != theirs["prompt_tokens"]:
        raise BenchError("the two sides make different prompts of the same messages")
    if mine.text != theirs["text"]:
        raise BenchError(f"different answers: {mine.text!r} and {theirs['text']!r}")


async def _prefill(engine: EmbeddedEngine, other: Bare, n_tokens: int, rounds: int) -> Race:
    """From the messages to the first token."""

    async def mine(i: int) -> float:
        answer = await ask(engine, question(text(n_tokens, seed=(n_tokens, i)), max_tokens=1))
        return answer.evaluated / (answer.finished_at - answer.sent_at)

    async def theirs(i: int) -> float:
        found = await other.generate(text(n_tokens, seed=(n_tokens, i)), n=1)
        return float(found["prompt_tokens"] / found["prefill_s"])

    return await _race(f"prefill of {n_tokens}", mine, theirs, rounds, ALONE_LEAST)


async def _decode(engine: EmbeddedEngine, other: Bare) -> Race:
    """The tokens behind the first, from when that one can be chosen."""

    async def mine(i: int) -> float:
        answer = await ask(engine, question(story(i), max_tokens=DECODE_TOKENS))
        _whole(answer, DECODE_TOKENS)
        return (DECODE_TOKENS - 1) / (answer.finished_at - answer.started_at)

    async def theirs(i: int) -> float:
        found = await other.generate(story(i), n=DECODE_TOKENS)
        return float((DECODE_TOKENS - 1) / found["decode_s"])

    return await _race("decode, 1 stream", mine, theirs, DECODE_ROUNDS, ALONE_LEAST)


async def _together(engine: EmbeddedEngine, other: Bare, streams: int, rounds: int) -> Race:
    """All of them in the time in which all of them decode."""

    async def mine(i: int) -> float:
        asked = (
            ask(engine, question(story((i, stream)), max_tokens=STREAM_TOKENS))
            for stream in range(streams)
        )
        return _joint_rate(await asyncio.gather(*asked))

    async def theirs(i: int) -> float:
        users = [story((i, stream)) for stream in range(streams)]
        found = await other.together(users, n=STREAM_TOKENS)
        return float(found["tokens"] / found["decode_s"])

    return await _race(f"decode, {streams} streams", mine, theirs, rounds, TOGETHER_LEAST)


def _joint_rate(answers: Sequence[Answer]) -> float:
    """Tokens a second between the last one's first token and the first one's last."""
    for answer in answers:
        _whole(answer, STREAM_TOKENS)
    since = max(a.delta_at[0] for a in answers)
    until = min(a.delta_at[-1] for a in answers)
    n_tokens = sum(since < at <= until for a in answers for at in a.delta_at)
    return n_tokens / (until - since)


def _whole(answer: Answer, n_tokens: int) -> None:
    """As many tokens as asked for, each told by itself: their times are the tokens' times."""
    if answer.end.completion_tokens != n_tokens or len(answer.delta_at) != n_tokens:
        raise BenchError(
            f"{answer.end.completion_tokens} tokens in {len(answer.delta_at)} parts, "
            f"{n_tokens} were asked for"
        )


async def _race(
    name: str,
    mine: Callable[[int], Awaitable[float]],
    theirs: Callable[[int], Awaitable[float]],
    rounds: int,
    least: float,
) -> Race:
    sides = (mine, theirs)
    rates: dict[Any, list[float]] = {mine: [], theirs: []}
    for i in range(rounds):
        for side in sides if i % 2 else sides[::-1]:
            rates[side].append(await side(i))
    return Race(name, Side(tuple(rates[mine])), Side(tuple(rates[theirs])), least)


HEAD = (
    f"  {'tokens/s, medians':28} {'chatfold':>8} {'alternative':>12} {'ratio':>7} "
    f"{'of best':>8} {'rounds':>6}"
)


def report(found: Sequence[Race]) -> str:
    title = "Against llama_cpp.Llama (prefill, 1 stream) and bare llama_decode batches (streams):"
    return "\n".join([title, HEAD, *(race.row() for race in found)])
