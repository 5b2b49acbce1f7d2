"""A chat of 60 turns with the default model, through the real proxy, that folded many times.

It has what a real one has: an edited question and an answer that was asked for again, each with
the chat going on from the newer one, and a second user of the same key. `made` makes it once;
`opened_copy` runs the proxy on a copy, so that tests may forget and correct as they like.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.serving import Proxy, serving

KEY = "plum"
USER = "anna"
WINDOW_TOKENS = 768
TURNS = 60
EDITED_AT, AGAIN_AT = 40, 50
SYSTEM = {"role": "system", "content": "You are a friendly travel companion. Be brief."}
SECRET = "My locker code is 48213, nobody else knows it."
SECRET_AT = 59
"""The turn, counted from 1, that holds the secret: one of the last, still word for word."""

PLACES = [
    "Lisbon",
    "Porto",
    "Sintra",
    "Cascais",
    "Evora",
    "Faro",
    "Tomar",
    "Braga",
    "Lagos",
    "Obidos",
]
LINES = [
    "We reach {place} on day {n}.",
    "The room in {place} costs {cost} euros.",
    "In {place} I want to see the old market.",
    "Ida knows a baker in {place}, house {cost}.",
    "Is it far to walk in {place}?",
    "Miso the cat stays behind in {place}.",
]
TEXTS = [
    LINES[i % len(LINES)].format(place=PLACES[i // len(LINES)], n=i // len(LINES) + 1, cost=40 + i)
    for i in range(TURNS)
]
TEXTS[0] = "My name is Hanna and I live in Bergen."
TEXTS[SECRET_AT - 1] = SECRET

Messages = list[dict[str, Any]]


@dataclass
class LongChat:
    """`messages` are the newest branch, as the client knows it; `data` is the proxy's folder."""

    data: Path
    messages: Messages = field(default_factory=list)

    def asking(self, text: str) -> Messages:
        return [*self.messages, {"role": "user", "content": text}]


def made(directory: Path) -> LongChat:
    directory.mkdir(parents=True, exist_ok=True)
    with proxy_on(directory) as proxy:
        messages: Messages = [SYSTEM]
        for number, text in enumerate(TEXTS, start=1):
            if number == EDITED_AT:
                _say(proxy, [*messages, {"role": "user", "content": "And if it rains?"}])
            messages = _say(proxy, [*messages, {"role": "user", "content": text}])
            if number == AGAIN_AT:
                messages = _other_answer(proxy, messages)
        asked = [{"role": "user", "content": "Anna likes apricots."}]
        proxy.chat(asked, max_tokens=4, temperature=0, user=USER)
        proxy.wait_idle()
    return LongChat(directory / "data", messages)


def _say(proxy: Proxy, messages: Messages, *, max_tokens: int = 8) -> Messages:
    answer = proxy.chat(messages, max_tokens=max_tokens, temperature=1.0, seed=len(messages))
    proxy.wait_idle()
    return [*messages, answer["choices"][0]["message"]]


def _other_answer(proxy: Proxy, messages: Messages) -> Messages:
    """The last answer once more, broken off early."""
    again = _say(proxy, messages[:-1], max_tokens=2)
    assert again[-1]["content"] != messages[-1]["content"]
    return again


def proxy_on(directory: Path, *, key: str = KEY) -> Any:
    """The proxy on `directory`/data; without a key where `key` is ""."""
    keyed = {"CHATFOLD_API_KEY": key} if key else {}
    return serving(directory, "--n-ctx", str(WINDOW_TOKENS), key=key, **keyed)


@contextmanager
def opened_copy(chat: LongChat, directory: Path, *, key: str = KEY) -> Iterator[Proxy]:
    """The proxy on a copy of the chat's data, snapshots and all."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copytree(chat.data, directory / "data")
    with proxy_on(directory, key=key) as proxy:
        yield proxy
