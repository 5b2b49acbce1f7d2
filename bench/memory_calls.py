"""How many summaries a chat costs, whatever its user does: each is earned once."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.memory_chats import KIND, OWNER, Chat, house, simulated
from bench.memory_texts import Exchange
from memory.compaction import cover, covered
from memory.context import Context
from memory.policy import Policy
from memory.records import Summary
from memory.transcript import USER, Message, Transcript, chain
from proxy.engines.base import Priority, Sampling
from proxy.tuning.house import House
from proxy.wire import ChatRequest

REGENERATIONS = 5


def summary_calls(home: House) -> int:
    """Calls that asked the model for a text in the background."""
    return sum(
        call.priority == Priority.BACKGROUND and call.max_tokens != 0 for call in home.engine.calls
    )


def summaries_written(home: House) -> int:
    return sum(event == "summarised" for event, _ in home.events)


async def stored(home: House, messages: Sequence[Message]) -> list[Summary]:
    """All summaries of the conversation that this chat belongs to."""
    found = await home.store.deepest(OWNER, chain(messages))
    return await home.store.summaries(OWNER, found[0]) if found else []


async def alone(exchanges: Sequence[Exchange], policy: Policy, window_tokens: int) -> int:
    """Summary calls of one chat from its first turn to its last."""
    async with house(policy, window_tokens) as (home, script):
        chat = Chat(home, script)
        for exchange in exchanges:
            await chat.say(exchange)
        assert summaries_written(home) == summary_calls(home), "a call for each, a summary of each"
        return summary_calls(home)


async def interleaved(
    one: Sequence[Exchange], other: Sequence[Exchange], policy: Policy, window_tokens: int
) -> int:
    """Summary calls of two chats of one owner with the same system prompt, turn about."""
    async with house(policy, window_tokens) as (home, script):
        chats = Chat(home, script), Chat(home, script)
        for pair in zip(one, other, strict=True):
            for chat, exchange in zip(chats, pair, strict=True):
                await chat.say(exchange)
        return summary_calls(home)


async def regenerated(
    exchanges: Sequence[Exchange], policy: Policy, window_tokens: int, *, every: int
) -> int:
    """Summary calls of a chat in which every so manieth answer is made REGENERATIONS times more.

    The other answers are as long as the one that is kept, so that it alone could make a difference.
    """
    async with house(policy, window_tokens) as (home, script):
        chat = Chat(home, script)
        for number, exchange in enumerate(exchanges, 1):
            await chat.say(exchange)
            if number % every == 0:
                for i in range(1, REGENERATIONS):
                    await chat.regenerate(_turned(exchange.answer, i))
                await chat.regenerate(exchange.answer)
        return summary_calls(home)


def _turned(text: str, by: int) -> str:
    """Another text of the same words."""
    parts = text.split(" ")
    by %= len(parts)
    return " ".join([*parts[by:], *parts[:by]])


@dataclass(frozen=True, slots=True)
class Edited:
    """A question edited long after, and the chat gone on from there for as long again."""

    edited_turn: int
    calls_before: int
    calls_after: int
    messages_before_edit: int
    kept_messages: int
    """Of them, those that old summaries still stand for. The rest was in the one block that holds
    the edited turn too, and is word for word again."""
    earliest: int
    """Where the earliest new block of turns begins."""
    summarised_again: int
    """New summaries of nothing but what old ones stand for: none is needed."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


async def edited(
    exchanges: Sequence[Exchange],
    others: Sequence[Exchange],
    policy: Policy,
    window_tokens: int,
    *,
    turn: int,
) -> Edited:
    async with house(policy, window_tokens) as (home, script):
        chat = Chat(home, script)
        for exchange in exchanges:
            await chat.say(exchange)
        calls, known = summary_calls(home), await stored(home, chat.messages)
        fork = 2 * (turn - 1)
        chat.cut(fork)
        for exchange in others:
            await chat.say(exchange)
        kept = covered(cover(known, chain(chat.messages[:fork])))
        old = {summary.id for summary in known}
        new = [s for s in await stored(home, chat.messages) if s.id not in old]
        return Edited(
            edited_turn=turn,
            calls_before=calls,
            calls_after=summary_calls(home) - calls,
            messages_before_edit=fork,
            kept_messages=kept,
            earliest=min(s.first_depth for s in new if s.rank == 0),
            summarised_again=sum(s.last_depth < kept for s in new),
        )


@dataclass(frozen=True, slots=True)
class Restarted:
    """A house closed and opened again on its file, several times in one chat."""

    restarts: int
    calls_by_restart: int
    """Summary calls between opening and the next question."""
    same_contexts: int
    """How often the next request's context had the same bytes before and after."""
    calls: int
    """In all. Without a restart there are as many."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


async def restarted(
    exchanges: Sequence[Exchange], policy: Policy, window_tokens: int, *, every: int
) -> Restarted:
    engine, script = simulated(policy, window_tokens)
    with tempfile.TemporaryDirectory(prefix="chatfold-bench-") as directory:
        path = Path(directory) / "store.db"
        home = await House.open(path, engine, policy)
        chat = Chat(home, script)
        restarts = called = same = 0
        for number, exchange in enumerate(exchanges, 1):
            if number % every == 0:
                calls, before = summary_calls(home), await planned(chat, exchange)
                await home.close()
                home = chat.house = await House.open(path, engine, policy)
                after = await planned(chat, exchange)
                await home.idle()
                restarts, same = restarts + 1, same + (before == after)
                called += summary_calls(home) - calls
            await chat.say(exchange)
        await home.close()
        return Restarted(restarts, called, same, summary_calls(home))


async def planned(chat: Chat, exchange: Exchange) -> Context:
    """What the model would be sent for this question now. Changes nothing."""
    messages = (*chat.messages, Message(USER, exchange.question))
    request = ChatRequest("any", Transcript(KIND, messages), Sampling())
    return (await chat.house.chats.plan(request, chat.owner)).context
