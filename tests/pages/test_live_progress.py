"""Progress of background work in words, told to the owner alone."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from served import TEXTS, Served

from proxy.background import Doing
from proxy.engines.base import Delta, Event, Finished, Generate, Priority, Reading, Started
from proxy.headers import owner_of
from proxy.pages.live import progress_words
from proxy.pages.words import LANGUAGES, teller

pytestmark = pytest.mark.timeout(120)


def test_the_words_follow_the_work() -> None:
    t, doing = teller("en"), Doing("ann", "c", most=120)
    assert progress_words(t, doing, None) == "summarising: waits for the model"
    doing.read, doing.of = 340, 1200
    assert progress_words(t, doing, (11, 29)) == (
        "summarising messages 12-30: 340 of 1,200 tokens read"
    )
    doing.read, doing.written = 1200, 25
    assert progress_words(t, doing, (11, 29)) == (
        "summarising messages 12-30: 1,200 of 1,200 tokens read, 25 of 120 written"
    )
    warming = Doing("ann", "c", most=0, read=5, of=9)
    assert progress_words(t, warming, None) == "reading the next context: 5 of 9 tokens read"
    assert all(progress_words(teller(code), warming, None) for code in LANGUAGES)


def test_the_live_page_tells_it_to_the_owner_and_to_nobody_else(
    fresh: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A summary stands still in the middle of its prompt until both have looked."""
    gates: list[Any] = []
    reached = threading.Event()
    real = fresh.engine._events

    async def held(request: Generate) -> AsyncIterator[Event]:
        yield Reading(34, 120)
        gates.append(anyio.Event())
        reached.set()
        await gates[-1].wait()
        yield Started(120, 0)
        yield Delta("They spoke of ferries.")
        yield Finished("stop", 120, 0, 5, None)

    @asynccontextmanager
    async def generate(self: Any, request: Generate) -> AsyncIterator[AsyncIterator[Event]]:
        summarises = request.priority is Priority.BACKGROUND and request.max_tokens
        yield held(request) if summarises and not gates else real(request)

    fresh.say(["Mine too."], user="bert")
    fresh.wait_idle()
    monkeypatch.setattr(type(fresh.engine), "generate", generate)
    fresh.say(TEXTS[:14], user="anna")

    assert reached.wait(60)
    seen = {}
    for user in ("anna", "bert"):
        token = fresh.token("/inspect/owners")
        fresh.act("/inspect/owner", {"token": token, "owner": owner_of({}, user)})
        seen[user] = fresh.page("/inspect/live").text
    fresh.app.state.loop.call_soon_threadsafe(gates[0].set)
    fresh.wait_idle()
    assert "summarising messages 1-" in seen["anna"] and "34 of 120 tokens read" in seen["anna"]
    assert "summarising messages" not in seen["bert"]
    assert "summarising messages" not in fresh.page("/inspect/live").text
