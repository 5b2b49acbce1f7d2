"""How long chatfold itself takes for one request, by the length of the transcript. Wall time."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import cycle
from statistics import median
from typing import Any
from unittest.mock import patch

from bench.memory_chats import KIND, OWNER, house
from bench.memory_texts import lines
from memory.conversations import context_for, conversation_id, recognise, room_for
from memory.keeper import Job
from memory.policy import Policy
from memory.records import MODEL, Node
from memory.scribe import Draft, Scribe
from memory.transcript import ASSISTANT, ROOT, USER, Message, chain
from proxy.background import EngineTokens
from proxy.tuning.house import House
from proxy.tuning.simulation import words
from proxy.wire import parse_chat

MESSAGE_CHARS = 300
APPENDED = 40
SLID_MESSAGES = 40
WRITTEN_UP_TO = 2000
"""Summaries of longer chats are stubs of the same length: checking and listing the facts of a span
takes minutes in all there, and is no part of what is measured."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Medians in milliseconds. `recognise` is without `chain`, which is a part of it."""

    messages: int
    body_bytes: int
    summaries: int
    blocks: int
    verbatim_messages: int
    total_ms: float
    fastest_ms: float
    cpu_ms: float
    parse_ms: float
    chain_ms: float
    recognise_ms: float
    assemble_ms: float
    slid_ms: float
    """All of it for the last SLID_MESSAGES alone: a window of a client that dropped the rest."""

    @property
    def total_us_each(self) -> float:
        return 1000 * self.total_ms / self.messages

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"total_us_each": self.total_us_each}


async def curve(
    sizes: Sequence[int], policy: Policy, window_tokens: int, *, runs: int
) -> list[Timed]:
    """One chat that grows; measured at each size on a warm store."""
    messages = talk(max(sizes))
    found: list[Timed] = []
    async with house(policy, window_tokens) as (home, _):
        known = 0
        for size in sorted(sizes):
            await grow(home, messages, known, size, policy, stub=size > WRITTEN_UP_TO)
            known = size
            found.append(await _measured(home, messages[:size], policy, runs=runs))
    return found


def talk(n: int) -> list[Message]:
    """`n` messages of MESSAGE_CHARS each."""
    source, messages = cycle(lines()), []
    for i in range(n):
        text = next(source)
        while len(text) < MESSAGE_CHARS:
            text += " " + next(source)
        messages.append(Message(ASSISTANT if i % 2 else USER, text[:MESSAGE_CHARS].strip()))
    return messages


async def grow(
    home: House,
    messages: Sequence[Message],
    known: int,
    size: int,
    policy: Policy,
    *,
    stub: bool,
) -> None:
    """Stores the messages from `known` to `size` and lets the keeper have an idle gap after every
    APPENDED of them. With `stub` the summaries say nothing; all else about them is the keeper's."""
    digests = chain(messages)
    nodes = [
        Node(
            digest=digests[i],
            parent=digests[i - 1] if i else ROOT,
            depth=i,
            role=messages[i].role,
            text=messages[i].text,
            n_tokens=len(words(messages[i].text)),
            tokenizer="words",
            front=KIND if messages[i].role == USER else None,
        )
        for i in range(known, size)
    ]
    conversation = conversation_id(OWNER, digests[0])
    with ExitStack() as stack:
        if stub:
            write = _stub(policy.limits(home.engine.window_tokens).summary_tokens)
            stack.enter_context(patch.object(Scribe, "write", write))
        for start in range(0, len(nodes), APPENDED):
            some = nodes[start : start + APPENDED]
            await home.store.append(OWNER, some, conversation=conversation)
            path = tuple(digests[: some[-1].depth + 1])
            home.keeper.wake(Job(OWNER, conversation, path, KIND))
            await home.idle()


def _stub(n_tokens: int) -> Callable[..., Awaitable[Draft]]:
    text = " ".join(["word"] * (n_tokens // 2))

    async def write(*_: object) -> Draft:
        return Draft(text, MODEL, ())

    return write


async def _measured(
    home: House, messages: Sequence[Message], policy: Policy, *, runs: int
) -> Timed:
    body, slid = _body(messages), _body(messages[-SLID_MESSAGES:])
    request = parse_chat(body)
    transcript = request.transcript
    model = await home.engine.model()
    room = room_for(model.budget, policy.limits(model.budget.window_tokens), max_tokens=None)
    counter = EngineTokens(home.engine)
    plan = await home.chats.plan(request, OWNER)

    async def all_of_it(body: bytes) -> None:
        await home.chats.plan(parse_chat(body), OWNER)

    async def recognised() -> None:
        await recognise(home.store, counter, OWNER, transcript, system=transcript.system)

    async def assembled() -> None:
        context_for(plan.history, policy, room, tokenizer=model.fingerprint)

    async def parsed() -> None:
        parse_chat(body)

    async def chained() -> None:
        chain(transcript.messages)

    total = await _timed(lambda: all_of_it(body), runs)
    chain_ms = median((await _timed(chained, runs)).wall)
    return Timed(
        messages=len(messages),
        body_bytes=len(body),
        summaries=len(await home.store.summaries(OWNER, plan.history.conversation)),
        blocks=len(plan.history.active),
        verbatim_messages=len(plan.history.nodes),
        total_ms=median(total.wall),
        fastest_ms=min(total.wall),
        cpu_ms=median(total.cpu),
        parse_ms=median((await _timed(parsed, runs)).wall),
        chain_ms=chain_ms,
        recognise_ms=max(0.0, median((await _timed(recognised, runs)).wall) - chain_ms),
        assemble_ms=median((await _timed(assembled, runs)).wall),
        slid_ms=median((await _timed(lambda: all_of_it(slid), runs)).wall),
    )


@dataclass(frozen=True, slots=True)
class _Times:
    wall: list[float]
    cpu: list[float]


async def _timed(work: Callable[[], Awaitable[None]], runs: int) -> _Times:
    """Milliseconds of each run, of the clock and of the processor in all threads."""
    wall, cpu = [], []
    for _ in range(runs):
        began_cpu, began = time.process_time(), time.perf_counter()
        await work()
        wall.append(1000 * (time.perf_counter() - began))
        cpu.append(1000 * (time.process_time() - began_cpu))
    return _Times(wall, cpu)


def _body(messages: Sequence[Message]) -> bytes:
    said = [{"role": m.role, "content": m.text} for m in messages]
    ask = {"role": USER, "content": "And what came of it then?"}
    system = {"role": "system", "content": KIND}
    return json.dumps({"model": "any", "stream": True, "messages": [system, *said, ask]}).encode()
