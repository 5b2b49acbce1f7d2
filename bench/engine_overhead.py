"""Where the time goes that is not llama.cpp's. No bound: where the model's threads fill the machine
it is theirs, and shows in `bench.engine_speed`.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench.engine_child import TIMES, VARIABLE
from bench.engine_sides import ask, ours, question, story
from proxy.engines.embedded import engine as module

STREAMS = (1, 4, 8)
TOKENS = 128
EDGE_BATCHES = 6
"""First and last batches, where prompts are evaluated and answers end."""
WINDOW_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Overhead:
    """Medians over the batches of some streams at once."""

    streams: int
    decode_us: float
    """In `llama_decode`."""
    between_us: float
    """From its end to its next beginning: sampling, books, text, frames."""
    parent_us_a_token: float
    """The proxy's process: CPU time to read a token and hand it on."""

    @property
    def share(self) -> float:
        return self.between_us / (self.between_us + self.decode_us)

    def row(self) -> str:
        return (
            f"  {self.streams:7} {self.decode_us / 1000:12.2f} {self.between_us / 1000:10.2f} "
            f"{self.share:8.1%} {self.parent_us_a_token:15.0f}"
        )

    def to_json(self) -> dict[str, Any]:
        return {k: round(v, 1) for k, v in asdict(self).items()}


async def overheads() -> list[Overhead]:
    with tempfile.TemporaryDirectory(prefix="chatfold-bench-") as folder:
        times = Path(folder) / "times"
        with _clocked_child(times):
            return await _measure(times)


async def _measure(times: Path) -> list[Overhead]:
    found = []
    async with ours(n_ctx=WINDOW_TOKENS, cache_tokens=WINDOW_TOKENS) as engine:
        await ask(engine, question(story("warm up"), max_tokens=16))
        for streams in STREAMS:
            seen, cpu_s = len(_batches(times)), time.process_time()
            asked = (
                ask(engine, question(story((streams, i)), max_tokens=TOKENS))
                for i in range(streams)
            )
            answers = await asyncio.gather(*asked)
            cpu_s = time.process_time() - cpu_s
            n_tokens = sum(len(a.delta_at) for a in answers)
            found.append(_overhead(streams, _batches(times)[seen:], 1e6 * cpu_s / n_tokens))
    return found


def _batches(times: Path) -> list[tuple[float, ...]]:
    return list(TIMES.iter_unpack(times.read_bytes()))


def _overhead(
    streams: int, batches: Sequence[tuple[float, ...]], parent_us_a_token: float
) -> Overhead:
    settled = batches[EDGE_BATCHES:-EDGE_BATCHES]
    inside = median(ended - began for began, ended in settled)
    between = median(after[0] - before[1] for before, after in pairwise(settled))
    return Overhead(streams, 1e6 * inside, 1e6 * between, parent_us_a_token)


@contextmanager
def _clocked_child(times: Path) -> Iterator[None]:
    own, module.CHILD = module.CHILD, ("-m", "bench.engine_child")
    os.environ[VARIABLE] = str(times)
    try:
        yield
    finally:
        module.CHILD = own
        del os.environ[VARIABLE]


def report(found: Sequence[Overhead]) -> str:
    title = "A batch of one token a stream, medians:"
    head = "  streams  llama_decode    between     share   parent, us a token"
    return "\n".join([title, head, *(o.row() for o in found)])
