"""A chat of a thousand turns: does every prompt begin with what is in the cache already?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, log2
from typing import Any

from bench.memory_calls import stored
from bench.memory_chats import Chat, house, mean_amplification, total_amplification
from bench.memory_texts import Exchange
from memory.policy import Policy
from memory.records import Summary


@dataclass(frozen=True, slots=True)
class Long:
    turns: int
    cold_requests: int
    """Requests that evaluated more than the turn's own tokens."""
    mean: float
    total: float
    worst: float
    longest_prompt_tokens: int
    window_tokens: int
    lost: int
    compactions: int
    merges: int
    max_rank: int
    most_rewritings: int
    """How often the most rewritten message went from one summary into another."""
    rewritings_bound: int
    """ceil(log2 N) for the N blocks written from turns."""
    made_by: dict[str, int]
    failed_checks: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


async def long_chat(exchanges: Sequence[Exchange], policy: Policy, window_tokens: int) -> Long:
    """With an idle gap after every turn, in which the keeper ends its work."""
    async with house(policy, window_tokens) as (home, script):
        chat = Chat(home, script)
        for exchange in exchanges:
            await chat.say(exchange)
        summaries = await stored(home, chat.messages)
        settled = chat.turns[1:]
        blocks = [s for s in summaries if s.rank == 0]
        return Long(
            turns=len(chat.turns),
            cold_requests=sum(turn.evaluated_twice > 0 for turn in chat.turns),
            mean=mean_amplification(settled),
            total=total_amplification(settled),
            worst=max(turn.amplification for turn in settled),
            longest_prompt_tokens=max(turn.prompt_tokens for turn in settled),
            window_tokens=window_tokens,
            lost=sum(turn.lost > 0 for turn in chat.turns),
            compactions=len(blocks),
            merges=len(summaries) - len(blocks),
            max_rank=max((s.rank for s in summaries), default=0),
            most_rewritings=most_rewritings(summaries),
            rewritings_bound=ceil(log2(max(1, len(blocks)))),
            made_by=dict(Counter(s.made_by for s in summaries)),
            failed_checks=dict(Counter(name for s in summaries for name in s.failed_checks)),
        )


def most_rewritings(summaries: Sequence[Summary]) -> int:
    """Counted message by message, in a chat without branches: merges whose span holds it."""
    held = Counter(
        depth for s in summaries if s.rank > 0 for depth in range(s.first_depth, s.last_depth + 1)
    )
    return max(held.values(), default=0)
