"""What memory promises, in counts: bench.memory in small, on a simulated engine with exact books.

The chats run through the real chat path, keeper and store; no clock is looked at.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import pytest

from bench import memory_calls as calls
from bench.memory_chats import OWNER, Window, house, restarting, sliding
from bench.memory_prefix import long_chat
from bench.memory_speed import grow, talk
from bench.memory_texts import Exchange, exchanges_of, made_lines
from bench.memory_windows import dates, through
from memory import queries
from memory.policy import load_policy
from memory.transcript import USER, Message, Transcript
from proxy.engines.base import Sampling
from proxy.wire import ChatRequest

T = TypeVar("T")

BALANCED = load_policy("balanced")
WINDOW_TOKENS = 2048
TURNS = 60
CLIENT_TOKENS = 700
"""The client's own window: it has dropped most of its messages long before the last turn."""


def chat(n_turns: int, *, seed: int = 7) -> list[Exchange]:
    return exchanges_of(made_lines(2 * n_turns, seed=seed), n_turns)


# Every summary is earned


def test_two_interleaved_chats_cost_the_sum_of_the_two_alone() -> None:
    one, other = chat(40, seed=1), chat(40, seed=2)

    async def run() -> tuple[int, int]:
        apart = [await calls.alone(said, BALANCED, WINDOW_TOKENS) for said in (one, other)]
        return sum(apart), await calls.interleaved(one, other, BALANCED, WINDOW_TOKENS)

    apart, together = asyncio.run(run())
    assert together == apart > 2


def test_five_regenerations_of_any_answer_cost_no_summary() -> None:
    said = chat(TURNS)
    plain = asyncio.run(calls.alone(said, BALANCED, WINDOW_TOKENS))
    assert asyncio.run(calls.regenerated(said, BALANCED, WINDOW_TOKENS, every=3)) == plain


def test_an_edit_costs_nothing_of_what_old_summaries_go_on_to_cover() -> None:
    said, others = chat(TURNS), chat(TURNS, seed=3)
    found = asyncio.run(calls.edited(said, others, BALANCED, WINDOW_TOKENS, turn=10))
    assert found.summarised_again == 0
    assert found.earliest >= found.kept_messages > 0
    assert found.calls_after > 0


def test_a_restart_costs_no_summary_and_changes_no_byte() -> None:
    said = chat(TURNS)
    plain = asyncio.run(calls.alone(said, BALANCED, WINDOW_TOKENS))
    found = asyncio.run(calls.restarted(said, BALANCED, WINDOW_TOKENS, every=7))
    assert found.same_contexts == found.restarts > 0
    assert (found.calls_by_restart, found.calls) == (0, plain)


# Nothing that a client drops is lost


@pytest.mark.parametrize("window_tokens", [WINDOW_TOKENS, 4 * WINDOW_TOKENS])
@pytest.mark.parametrize("drops", [sliding, restarting])
def test_what_a_client_drops_is_covered_by_a_summary_or_there_word_for_word(
    drops: Callable[[int], Window], window_tokens: int
) -> None:
    found = asyncio.run(
        through("", chat(90), BALANCED, window_tokens=window_tokens, window=drops(CLIENT_TOKENS))
    )
    assert found.dropped_by_client > TURNS
    assert found.summary_calls > 0
    assert found.lost == 0
    assert (found.mean, found.worst, found.again) == (1.0, 1.0, 0)


# Nothing is evaluated twice


def test_every_prompt_of_a_long_chat_begins_with_what_was_warmed() -> None:
    found = asyncio.run(long_chat(chat(150), BALANCED, WINDOW_TOKENS))
    assert (found.cold_requests, found.lost) == (0, 0)
    assert found.mean == 1.0
    assert found.merges > 10
    assert 1 < found.most_rewritings <= found.rewritings_bound
    assert found.max_rank <= found.rewritings_bound


def test_a_date_at_the_end_of_the_system_prompt_breaks_the_prefix_once() -> None:
    """In the second turn, when it is first seen to change; each time in front it would always."""
    split, front = asyncio.run(dates(chat(30), BALANCED, WINDOW_TOKENS))
    assert (split.again, split.lost, front.lost) == (0, 0, 0)
    assert 0 < split.settling < 300
    assert front.again > 100 * front.turns


# A request reads what it sends, however long the chat


@pytest.mark.parametrize("n_messages", [200, 800])
def test_a_request_reads_only_the_summaries_and_messages_that_it_sends(
    n_messages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    for name in ("as_node", "as_summary"):
        monkeypatch.setattr(queries, name, _counting(getattr(queries, name), read, name))

    async def run() -> None:
        messages = talk(n_messages)
        async with house(BALANCED, WINDOW_TOKENS) as (home, _):
            await grow(home, messages, 0, n_messages, BALANCED, stub=True)
            transcript = Transcript("", (*messages, Message(USER, "And then?")))
            read.clear()
            plan = await home.chats.plan(ChatRequest("any", transcript, Sampling()), OWNER)
            assert read["as_summary"] == plan.context.shape.summaries > 0
            assert read["as_node"] == len(plan.context.messages) - 2, "all but system and question"

    asyncio.run(run())


def _counting(work: Callable[..., T], read: Counter[str], name: str) -> Callable[..., T]:
    def counted(*arguments: object) -> T:
        read[name] += 1
        return work(*arguments)

    return counted
