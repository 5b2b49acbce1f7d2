"""Chats that load a proxy, and how exactly each of their answers ended."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.client import Messages

TIMEOUT = httpx.Timeout(connect=5.0, read=120.0, write=30.0, pool=5.0)
ENDLESS = {"logit_bias": {"2": -100}}
"""Bans SmolLM2's end of turn: an answer is as long as `max_tokens` says."""

VOCABULARY = """tower river train coffee maple lamp bowl guest harbour bakery bicycle boat sail
market permit course captain island anchor bread neighbour winter lighthouse ticket garden"""
WORDS = VOCABULARY.split()


@dataclass
class Ending:
    """What a client saw of one answer, up to its very end."""

    status: int = 0
    text: str = ""
    deltas: int = 0
    errors: list[str] = field(default_factory=list)
    finish_reason: str = ""
    done: bool = False
    behind: int = 0
    """Frames behind the error or behind [DONE]."""
    broken: str = ""
    """Why the connection ended before the answer did."""

    @property
    def answered(self) -> bool:
        clean = self.status == 200 and self.done and not self.errors and not self.broken
        return clean and bool(self.finish_reason) and not self.behind

    @property
    def told(self) -> bool:
        """Ended in exactly one clear error, as a frame or as a response of its own."""
        one = len(self.errors) == 1 and not (self.done or self.broken or self.behind)
        return one and bool(self.errors[0]) and self.status in (200, 429, 503)

    def __str__(self) -> str:
        return (
            f"status {self.status}, {self.deltas} deltas, errors {self.errors}, done {self.done}, "
            f"{self.behind} frames behind the end, {self.broken or 'whole'}"
        )


def stream(
    client: httpx.Client,
    messages: Messages,
    *,
    user: str,
    max_tokens: int,
    on_delta: Callable[[Ending], bool] = lambda ending: True,
    **options: Any,
) -> Ending:
    """One streamed answer, frame by frame. `on_delta` says whether to read on. Never raises for
    what the server does.
    """
    body = {"messages": messages, "user": user, "max_tokens": max_tokens, "stream": True}
    ending = Ending()
    try:
        with client.stream("POST", "/v1/chat/completions", json=body | options) as response:
            ending.status = response.status_code
            if response.status_code != 200:
                ending.errors.append(_message(json.loads(response.read())))
                return ending
            for line in response.iter_lines():
                if line.startswith("data: ") and _take(line[6:], ending) and not on_delta(ending):
                    return ending
    except (httpx.HTTPError, ValueError) as exc:
        ending.broken = f"{type(exc).__name__}: {exc}"
    return ending


def _take(data: str, ending: Ending) -> bool:
    """Whether the frame held some text."""
    if ending.done or ending.errors:
        ending.behind += 1
    if data == "[DONE]":
        ending.done = True
        return False
    frame = json.loads(data)
    if "error" in frame:
        ending.errors.append(_message(frame))
        return False
    text = "".join(c["delta"].get("content") or "" for c in frame["choices"])
    for choice in frame["choices"]:
        ending.finish_reason = choice["finish_reason"] or ending.finish_reason
    ending.text += text
    ending.deltas += bool(text)
    return bool(text)


def _message(body: Any) -> str:
    with suppress(KeyError, TypeError):
        return str(body["error"]["message"])
    return ""


def sentence(chance: random.Random, n_words: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(n_words))
