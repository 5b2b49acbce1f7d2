"""The path of a chat request, over a real store and a simulated engine, when something fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memory.policy import Policy
from memory.records import MODEL, Summary
from memory.store import StoreError
from memory.transcript import ASSISTANT, USER, Message, chain
from proxy.engines.base import ContextOverflow, Event, Generate, Priority
from proxy.tuning.house import House
from proxy.tuning.simulation import SimulatedEngine

pytestmark = pytest.mark.anyio

WINDOW = 600
POLICY = Policy(
    name="test",
    high=220,
    low=100,
    block=200,
    summaries=120,
    summary=40,
    answer=60,
    verbatim_turns=1,
    method="extractive",
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass(slots=True, eq=False)
class Engine(SimulatedEngine):
    """`over` is by how many tokens the next chat prompt is longer than it was thought to be."""

    over: int = 0

    async def _events(self, request: Generate) -> AsyncIterator[Event]:
        if self.over and request.priority == Priority.CHAT:
            longer, self.over = self.window_tokens + self.over, 0
            raise ContextOverflow(prompt_tokens=longer, window_tokens=self.window_tokens)
        async for event in SimulatedEngine._events(self, request):
            yield event


@pytest.fixture
async def house(tmp_path: Path, anyio_backend: str) -> AsyncIterator[House[Engine]]:
    engine = Engine(WINDOW, answer_of, lambda context: "")
    house = await House.open(tmp_path / "store.db", engine, POLICY)
    yield house
    await house.close()


def answer_of(context) -> str:  # type: ignore[no-untyped-def]
    return f"To {context.messages[-1].parts[-1][:14]!r} I say that it is a good thing, as ever."


async def say(
    house: House[Engine], said: list[Message], *, last: int | None = None, client_id: str = ""
) -> str:
    """One more turn, of which the client sends the `last` messages; its conversation."""
    said.append(Message(USER, f"Question {len(said) // 2} is about the thing number {len(said)}."))
    sent = said[-last:] if last else said
    text, plan = await house.ask("ann", sent, client_id=client_id or None)
    said.append(Message(ASSISTANT, text))
    return plan.history.conversation


async def test_blocks_that_an_overflow_brought_in_are_in_use_from_then_on(
    house: House[Engine],
) -> None:
    await house.keeper.stop()
    said: list[Message] = []
    for _ in range(4):
        conversation = await say(house, said)
    waiting = await house.store.add_summary("ann", block(said[:4], conversation))
    house.engine.over = WINDOW - 200
    await say(house, said)
    assert house.engine.chat_calls()[-1].context.shape.summaries == 1
    (used,) = await house.store.summaries("ann", conversation)
    assert (used.id, used.activated_at is not None) == (waiting.id, True)


@pytest.mark.parametrize("failures", [1, 2])
async def test_a_read_that_fails_does_not_cut_a_slid_chat_off_from_its_past(
    house: House[Engine], monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    said: list[Message] = []
    for _ in range(10):
        conversation = await say(house, said, last=9)
    standing, left = house.store.standing, failures

    async def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise StoreError("disk I/O error")
        return await standing(*args, **kwargs)

    monkeypatch.setattr(house.store, "standing", failing)
    await say(house, said, last=9)
    assert left == 0
    for _ in range(4):
        assert await say(house, said, last=9) == conversation
    kept = await house.store.path("ann", chain(said)[-1])
    assert len(kept) == len(said)


def block(of: list[Message], conversation: str) -> Summary:
    digests = chain(of)
    return Summary(
        id=0,
        conversation=conversation,
        first_depth=0,
        last_depth=len(of) - 1,
        first_digest=digests[0],
        last_digest=digests[-1],
        rank=0,
        parents=(),
        text="They spoke of things.",
        n_tokens=8,
        tokenizer="words",
        made_by=MODEL,
        model="",
        policy_digest="",
        prompt_version="",
        failed_checks=(),
        duration_s=0.0,
        created_at=1.0,
    )
