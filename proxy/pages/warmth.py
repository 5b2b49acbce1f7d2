"""What of a conversation's context is warm, and which of its messages that are."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from memory.context import DoesNotFit
from memory.policy import Policy
from memory.store import Store
from proxy.background import EngineTokens
from proxy.engines.base import Engine, EngineError, KeepsPlaces, Place, Warmth
from proxy.pages.chats import Chat, context_now

LOOK_S = 1.0
"""Longest time that a page waits for the answer: a batch of a long prompt takes longer."""


@dataclass(frozen=True, slots=True)
class Warm:
    """`in_memory` and `on_disk` count messages from the first of the path; those that a summary
    tells count as it does."""

    tokens: Warmth
    in_memory: int
    on_disk: int


async def warmth_now(store: Store, engine: Engine, policy: Policy, chat: Chat) -> Warm | None:
    """Of what stands before the next message on this path, without tools; None where it is not
    known in time. Raises StoreError."""
    info = engine.info
    if info is None or not (engine.tells_warmth and engine.ready()):
        return None
    try:
        async with asyncio.timeout(LOOK_S):
            context = await context_now(store, EngineTokens(engine), policy, info, chat)
            tokens = await engine.warmth(chat.owner, context)
    except (TimeoutError, EngineError, DoesNotFit):
        return None
    n_hidden = chat.n_covered + context.shape.dropped_messages
    each = info.budget.message_tokens
    costs = [max(0, twig.n_tokens) + each for twig in chat.path[n_hidden:]]
    lengths = (tokens.in_memory, tokens.on_disk)
    n_warm = [warm_messages(costs, of=tokens.of, n_tokens=n, slack=each) for n in lengths]
    in_memory, on_disk = (0 if n is None else n_hidden + n for n in n_warm)
    return Warm(tokens, in_memory, on_disk)


def left_at(engine: Engine, chat: Chat) -> str:
    """Where a server that is another program's was left with it: slot, file, sequence or elsewhere;
    "" where that is not known."""
    if not (isinstance(engine, KeepsPlaces) and engine.ready()):
        return ""
    place = engine.place(chat.owner, chat.entry.id)
    return "elsewhere" if place is Place.COLD else place or ""


def warm_messages(costs: Sequence[int], *, of: int, n_tokens: int, slack: int) -> int | None:
    """How many of a prompt's last messages, with these costs, lie whole within its first
    `n_tokens` of `of`; None where not even all before them does. Counted from the end, where the
    markup is known best; `slack` tokens may be missing."""
    end = of - sum(costs)
    if n_tokens == 0 or n_tokens + slack < end:
        return None
    for i, cost in enumerate(costs):
        end += cost
        if n_tokens + slack < end:
            return i
    return len(costs)
