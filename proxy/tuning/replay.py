"""A chat replayed under a policy, through the chat path, the keeper and a store of its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Protocol

from memory.context import Context
from memory.keeper import Job
from memory.policy import Policy
from memory.records import Summary
from memory.scribe import Draft, Redraft, Task, as_written
from memory.transcript import Transcript, chain
from proxy.engines.base import Engine, Priority, Sampling
from proxy.errors import ApiError
from proxy.tuning.chats import Chat, Exchange
from proxy.tuning.house import House
from proxy.tuning.retention import Kept, Reach, Sought, kept, reach, sought
from proxy.tuning.simulation import Call, Line
from proxy.wire import ChatRequest

OWNER = "tune"
"""Of all that a replay's own store holds."""

POINTS = 8
"""At so many moments, evenly over the chat, what was said is looked for in the context."""


class Refused(Exception):
    """The chat cannot go on under this policy. `str()` is one sentence."""


@dataclass(frozen=True, slots=True)
class Work:
    """One request to the model. `seconds` is None where nothing was really evaluated: for a chat
    request to the first token, for others to the end."""

    prompt_tokens: int
    evaluated: int
    generated: int = 0
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn cost: on the user's path, and behind it until all was quiet."""

    chat: Work
    background: tuple[Work, ...]
    summaries: int
    kept: Kept | None = None
    """At one turn in so many."""
    reach: Reach | None = None
    """At the last one."""


@dataclass(slots=True)
class Script:
    """The answers, one after the other: whoever asks sets the next one first."""

    line: Line = field(default_factory=lambda: Line(""))

    def __call__(self, context: Context) -> Line:
        return self.line


class BookedEngine(Engine, Protocol):
    """An engine that keeps books and says what it is told."""

    calls: list[Call]


@dataclass(frozen=True, slots=True)
class Aim:
    """A chat with what is looked for in it, found once for all policies: `points` by number of
    turns behind."""

    chat: Chat
    points: dict[int, Sought]

    @classmethod
    def of(cls, chat: Chat) -> Aim:
        ends = [e.n_messages for e in chat.exchanges]
        marks = {ceil(len(ends) * i / POINTS) for i in range(1, POINTS + 1)}
        return cls(chat, {n: sought(chat.messages[: ends[n - 1] + 1]) for n in sorted(marks)})


@dataclass(frozen=True, slots=True)
class Setting:
    """What all replays of one run share."""

    window_tokens: int
    max_tokens: int | None = None
    """Of an answer, as the client asks for it."""


async def replay(
    aim: Aim,
    policy: Policy,
    engine: BookedEngine,
    script: Script,
    *,
    path: Path,
    setting: Setting,
    done: int = 0,
) -> AsyncGenerator[Turn, None]:
    """The turns behind the first `done`, each when it is over. `path` is the file of the store,
    which holds what an earlier run did. The policy's idle time is left out: nothing waits. Raises
    Refused, EngineError, StoreError."""
    policy = replace(policy, idle_s=0.0)
    redraft = reused(aim.chat.summaries, policy)
    house = await House.open(path, engine, policy, redraft=redraft)
    try:
        if done:
            await _take_up(house, aim.chat, done)
        for number, exchange in enumerate(aim.chat.exchanges[done:], done + 1):
            engine.calls.clear()
            house.events.clear()
            try:
                turn = await _turn(house, aim, exchange, number, script, setting)
            except ApiError as exc:
                what = f"turn {number} of {aim.chat.name!r} is refused under {policy.name}"
                raise Refused(f"{what}: {exc}") from exc
            yield turn
    finally:
        await house.close()


async def _turn(
    house: House[BookedEngine],
    aim: Aim,
    exchange: Exchange,
    number: int,
    script: Script,
    setting: Setting,
) -> Turn:
    chat, engine = aim.chat, house.engine
    script.line = _line(chat, exchange.n_messages, engine)
    asked = chat.messages[: exchange.n_messages]
    await house.ask(OWNER, asked, system=exchange.system, max_tokens=setting.max_tokens)
    await house.idle()
    if any(event == "background_failed" for event, _ in house.events):
        raise Refused(f"the work behind turn {number} of {chat.name!r} failed.")
    context = _standing(engine.calls)
    wanted = aim.points.get(number)
    last = number == len(chat.exchanges)
    return Turn(
        chat=_work(next(c for c in engine.calls if c.priority == Priority.CHAT)),
        background=tuple(_work(c) for c in engine.calls if c.priority == Priority.BACKGROUND),
        summaries=sum(event == "summarised" for event, _ in house.events),
        kept=kept(wanted, context) if wanted else None,
        reach=reach(chat.questions, context) if last and chat.questions else None,
    )


def _line(chat: Chat, place: int, engine: Engine) -> Line:
    text = chat.messages[place].text
    known = engine.info is not None and engine.info.fingerprint == chat.tokenizer
    return Line(text, chat.token_ids.get(place) if known else None)


def _work(call: Call) -> Work:
    return Work(call.prompt_tokens, call.evaluated, call.generated, call.seconds)


def _standing(calls: Sequence[Call]) -> Context:
    """What the next question will be put behind: the last context that was warmed, or else what
    was answered from."""
    warmed = [c.context for c in calls if c.max_tokens == 0]
    return warmed[-1] if warmed else calls[0].context


async def _take_up(house: House[BookedEngine], chat: Chat, done: int) -> None:
    """Ends what the run before left undone, so that the next turn finds what it would have found:
    the cache is empty now."""
    end = chat.exchanges[done - 1].n_messages + 1
    following = chat.exchanges[min(done, len(chat.exchanges) - 1)]
    transcript = Transcript(following.system, chat.messages[: following.n_messages])
    plan = await house.chats.plan(ChatRequest("any", transcript, Sampling()), OWNER)
    history = plan.history
    digests = chain(chat.messages[:end])
    house.keeper.wake(Job(OWNER, history.conversation, digests, history.system.text))
    await house.idle()


# -- summaries that are there ----------------------------------------------------------------------


def reused(summaries: Sequence[Summary], policy: Policy) -> Redraft:
    """Takes a stored summary where one of the same policy stands for the very same messages."""
    known = {(s.first_digest, s.last_digest): s for s in summaries if _same(s, policy)}
    if not known:
        return as_written

    def redraft(task: Task, draft: Draft) -> Draft:
        found = known.get((task.nodes[0].digest, task.nodes[-1].digest))
        return Draft(found.text, found.made_by, found.failed_checks) if found else draft

    return redraft


def _same(summary: Summary, policy: Policy) -> bool:
    return summary.policy_digest in {policy.digest, replace(policy, idle_s=0.0).digest}


def assumed(policy: Policy, window_tokens: int) -> Callable[[Context], Line]:
    """A model whose summaries nobody has: they cost what the policy says, and sentences of the
    source stand in their place, as for a model whose text fails the checks."""
    n_tokens = policy.limits(window_tokens).summary_tokens

    def say(context: Context) -> Line:
        return Line("", n_tokens=n_tokens)

    return say
