"""How fast the model is on this machine: measured once in a few seconds, kept in a file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import blake2b
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import msgspec
import platformdirs

from memory.context import Context, ContextMessage, Shape
from memory.transcript import USER
from proxy.config import Config, model_file
from proxy.engines.base import Delta, Engine, Finished, Generate, Priority, Sampling, Started
from proxy.tuning.speeds import Speeds, Timed, line

OWNER = "calibration"
NEAR_TOKENS = 384
FAR_TOKENS = 1408
ANSWER_TOKENS = 24
WINDOW_SHARE = 0.7
"""Of a small window no more is used."""

_WORDS = """the river lantern carried seven quiet letters past a wooden bridge while the old
painter counted boats near the market and wrote each name down with care"""


async def calibrate(engine: Engine) -> Speeds:
    """Takes a few seconds on a small model. Raises EngineError."""
    window = (await engine.model()).budget.window_tokens
    far = min(FAR_TOKENS, int(window * WINDOW_SHARE))
    near = min(NEAR_TOKENS, far // 2)
    await _timed(engine, _text(8), max_tokens=2)  # The first request of a process is slower.
    try:
        once, first = await _timed(engine, _text(near), max_tokens=ANSWER_TOKENS)
        again, second = await _timed(engine, _text(far), max_tokens=ANSWER_TOKENS)
    finally:
        await engine.forget(OWNER)
    prefill, prefill_slope = line(once, again)
    decode, decode_slope = line(first, second)
    return Speeds(prefill, decode, prefill_slope, decode_slope)


async def _timed(engine: Engine, text: str, *, max_tokens: int) -> tuple[Timed, Timed]:
    """How long the prompt took, and how long the answer."""
    context = Context(
        (ContextMessage(USER, (text,)),), "", continues=False, shape=Shape(0, 0, 0, 0, 0, 0)
    )
    request = Generate(
        OWNER,
        context,
        Priority.BACKGROUND,
        max_tokens=max_tokens,
        # Words that no answer ends with at once.
        sampling=Sampling(temperature=1.0, seed=1),
        conversation=OWNER,
    )
    began, started, first, ended = time.monotonic(), 0.0, 0.0, 0.0
    prompt, cached, generated = 1, 0, 1
    async with engine.generate(request) as events:
        async for event in events:
            now = time.monotonic()
            match event:
                case Started():
                    started = now
                case Delta():
                    first = first or now
                case Finished():
                    prompt, cached = event.prompt_tokens, event.cached_tokens
                    generated, ended = event.completion_tokens, now
    evaluated = max(1, prompt - cached)
    return (
        Timed(evaluated, prompt - evaluated, (started or first or ended) - began),
        Timed(max(1, generated), prompt, ended - (started or first or ended)),
    )


def _text(n_tokens: int) -> str:
    """About so many tokens, always the beginning of the same text."""
    return " ".join(islice(cycle(_numbered()), n_tokens * 3 // 4))


def _numbered() -> Iterator[str]:
    for n in range(1, 200):
        yield from _WORDS.split()
        yield f"{n}."


# -- kept ------------------------------------------------------------------------------------------


def key(config: Config) -> str:
    """Names model, settings and machine: anything that changes the speed."""
    if config.upstream:
        named = f"{config.upstream} {config.remote.model}"
    else:
        from proxy.engines.embedded.loading import fingerprint

        named = fingerprint(model_file(config))
    settings = msgspec.json.encode([asdict(config.engine), config.n_ctx, os.cpu_count()])
    return blake2b(named.encode() + settings, digest_size=12).hexdigest()


def default_file() -> Path:
    return Path(platformdirs.user_cache_dir("chatfold")) / "speeds.json"


def known(name: str, *, file: Path) -> Speeds | None:
    """What was measured before; None where nothing can be read."""
    try:
        found = msgspec.json.decode(file.read_bytes(), type=dict[str, Speeds])
    except (OSError, msgspec.MsgspecError):
        return None
    return found.get(name)


def keep(name: str, speeds: Speeds, *, file: Path) -> None:
    """Raises OSError."""
    try:
        found: dict[str, Any] = msgspec.json.decode(file.read_bytes())
    except (OSError, msgspec.MsgspecError):
        found = {}
    found[name] = asdict(speeds)
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    draft.replace(file)
