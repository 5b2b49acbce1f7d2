"""Clients that send less than the whole chat, and system prompts that change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from bench.memory_calls import summary_calls
from bench.memory_chats import (
    KIND,
    LIBRECHAT_WINDOW,
    Chat,
    Turn,
    Window,
    house,
    librechat,
    mean_amplification,
    restarting,
    sliding,
    total_amplification,
    whole,
    without_chatfold,
)
from bench.memory_texts import Exchange
from memory.policy import Policy


@dataclass(frozen=True, slots=True)
class Run:
    """What became of one client's chat, from its second turn on, or from `settled_from` on."""

    name: str
    turns: int
    mean: float
    total: float
    worst: float
    again: int
    """Tokens evaluated besides the question and what changed in the system prompt: they had been
    evaluated before."""
    settling: int
    """The same of the turns after the first that are left out."""
    dropped_by_client: int
    """The most messages of the chat that one request did not send."""
    lost: int
    """Turns in which a message was neither covered by a summary nor in the context."""
    summary_calls: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def booked(
    name: str, turns: Sequence[Turn], *, summary_calls: int = 0, settled_from: int = 1
) -> Run:
    settled = turns[settled_from:]
    return Run(
        name=name,
        turns=len(turns),
        mean=mean_amplification(settled),
        total=total_amplification(settled),
        worst=max(turn.amplification for turn in settled),
        again=sum(turn.evaluated_twice for turn in settled),
        settling=sum(turn.evaluated_twice for turn in turns[1:settled_from]),
        dropped_by_client=max(2 * i + 1 - turn.sent_messages for i, turn in enumerate(turns)),
        lost=sum(turn.lost > 0 for turn in turns),
        summary_calls=summary_calls,
    )


async def through(
    name: str,
    exchanges: Sequence[Exchange],
    policy: Policy,
    *,
    window_tokens: int,
    window: Window = whole,
    system: Callable[[int], str] = lambda turn: KIND,
    settled_from: int = 1,
) -> Run:
    """A chat through chatfold with an idle gap after every turn."""
    async with house(policy, window_tokens) as (home, script):
        chat = Chat(home, script, window=window, system=system)
        for exchange in exchanges:
            await chat.say(exchange)
        calls = summary_calls(home)
        return booked(name, chat.turns, summary_calls=calls, settled_from=settled_from)


async def windows(exchanges: Sequence[Exchange], policy: Policy, window_tokens: int) -> list[Run]:
    """The same chat through chatfold by three clients."""
    slides, restarts = await librechat(sliding), await librechat(restarting)
    clients = {"whole history": whole, "sliding window": slides, "restarting window": restarts}
    return [
        await through(name, exchanges, policy, window_tokens=window_tokens, window=window)
        for name, window in clients.items()
    ]


async def bare(exchanges: Sequence[Exchange]) -> Run:
    """The sliding client without chatfold, on the same cache."""
    # Here the model's window only has to be long enough for what the client sends.
    turns = await without_chatfold(
        exchanges, await librechat(sliding), window_tokens=4 * LIBRECHAT_WINDOW
    )
    return booked("sliding window, without chatfold", turns)


BEGAN = datetime(2024, 5, 6, 9, 0)


def dated(turn: int) -> str:
    """A system prompt that says what time it is, at its end."""
    now = BEGAN + timedelta(minutes=7 * turn)
    return f"You are kind and exact.\nAnswer in plain words.\nIt is {now:%A, %d %B %Y, %H:%M}."


async def dates(exchanges: Sequence[Exchange], policy: Policy, window_tokens: int) -> list[Run]:
    return [
        await through(
            f"system = {how}",
            exchanges,
            replace(policy, system=how),
            window_tokens=window_tokens,
            system=dated,
            # That the end changes is seen in the second turn: the head is divided then, once.
            settled_from=2,
        )
        for how in ("split", "front")
    ]
