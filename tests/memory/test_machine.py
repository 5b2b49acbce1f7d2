"""Everything a chat client does, in any order, against a naive twin that keeps whole histories.

Whatever happened before, the messages that reach the model are the client's own, word for word,
from some point on; what lies before that point is covered by summaries of this very history or was
left out by rule; and nothing of one owner ever reaches another.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from memory.context import LEFT_OUT, Context
from memory.policy import Policy
from memory.transcript import ASSISTANT, USER, Message, chain, turn_starts
from proxy.tuning.house import House, verbatim
from proxy.tuning.simulation import SimulatedEngine

# Hundreds of whole requests, each with its commit to disk.
pytestmark = pytest.mark.timeout(600)

WINDOW = 420
_SERIAL = re.compile(r"(?:number|answer|edited) (\d+)")
POLICY = Policy(
    name="machine",
    high=130,
    low=60,
    block=100,
    summaries=90,
    summary=30,
    answer=40,
    verbatim_turns=1,
    method="extractive",
)
OWNERS = ("anna", "bert")
OTHER = {"anna": "bert", "bert": "anna"}


@dataclass
class Twin:
    """A chat as its user sees it. `sent_from` is where the client's window begins now."""

    owner: str
    system: str
    messages: list[Message] = field(default_factory=list)
    sent_from: int = 0
    answered: int = 0
    """How many of the messages the proxy has answered and must know."""


class Client(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="chatfold-machine-"))
        self.runner = asyncio.Runner()
        self.serial = count()
        self.policy = POLICY
        self.engine = SimulatedEngine(WINDOW, self.answer, lambda context: "")
        self.house: House = self.run(self.open())
        self.chats: list[Twin] = []

    def run(self, coroutine):  # type: ignore[no-untyped-def]
        return self.runner.run(coroutine)

    async def open(self) -> House:
        return await House.open(self.folder / "store.db", self.engine, self.policy)

    def answer(self, context: Context) -> str:
        owner = context.messages[-1].parts[-1].split("-")[0]
        return f"{owner}-answer {next(self.serial)} goes on about the {next(self.serial)} things."

    def text(self, owner: str) -> str:
        n = next(self.serial)
        return f"{owner}-question number {n} is about the matter {n * 7}, and what became of it."

    def teardown(self) -> None:
        self.run(self.house.close())
        self.runner.close()
        shutil.rmtree(self.folder)

    @initialize(compact=st.booleans())
    def choose_policy(self, compact: bool) -> None:
        self.change_policy(130, compact)

    # -- what clients do -------------------------------------------------------------------------

    @rule(owner=st.sampled_from(OWNERS), system=st.sampled_from(["", "Be kind."]))
    def new_chat(self, owner: str, system: str) -> None:
        if len(self.chats) < 4:
            chat = Twin(owner, system and f"{owner}-system. {system}")
            self.chats.append(chat)
            self.turn(chat)

    @precondition(lambda self: self.chats)
    @rule(which=st.integers(0, 9), turns=st.integers(1, 7))
    def go_on(self, which: int, turns: int) -> None:
        for _ in range(turns):
            self.turn(self.pick(which))

    @precondition(lambda self: self.chats)
    @rule(which=st.integers(0, 9))
    def two_questions_in_a_row(self, which: int) -> None:
        chat = self.pick(which)
        chat.messages.append(Message(USER, self.text(chat.owner)))
        self.turn(chat)

    @precondition(lambda self: self.chats)
    @rule(which=st.integers(0, 9))
    def regenerate(self, which: int) -> None:
        chat = self.pick(which)
        if chat.messages and chat.messages[-1].role == ASSISTANT:
            chat.messages.pop()
            self.ask(chat)

    @precondition(lambda self: self.chats)
    @rule(which=st.integers(0, 9), at=st.integers(0, 99))
    def edit_a_question(self, which: int, at: int) -> None:
        chat = self.pick(which)
        # One short answer alone is no evidence of where a window that slid belongs.
        first = chat.sent_from + 2 if chat.sent_from else 0
        places = [i for i, m in enumerate(chat.messages) if m.role == USER and i >= first]
        if places:
            i = places[at % len(places)]
            del chat.messages[i:]
            self.turn(chat)

    @precondition(lambda self: self.chats)
    @rule(which=st.integers(0, 9), at=st.integers(0, 99))
    def edit_an_answer(self, which: int, at: int) -> None:
        chat = self.pick(which)
        places = [
            i for i, m in enumerate(chat.messages) if m.role == ASSISTANT and i > chat.sent_from + 3
        ]
        if places:
            i = places[at % len(places)]
            del chat.messages[i:]
            chat.messages.append(Message(ASSISTANT, f"{chat.owner}-edited {next(self.serial)}"))
            self.turn(chat)

    @precondition(lambda self: self.chats)
    @rule(which=st.integers(0, 9), at=st.integers(0, 99))
    def fork(self, which: int, at: int) -> None:
        chat = self.pick(which)
        ends = [i + 1 for i, m in enumerate(chat.messages) if m.role == ASSISTANT]
        ends = [e for e in ends if e > chat.sent_from + 3]
        if ends and len(self.chats) < 5:
            copy = replace(chat, messages=chat.messages[: ends[at % len(ends)]])
            self.chats.append(copy)
            self.turn(copy)

    @precondition(lambda self: self.chats)
    @rule(which=st.integers(0, 9), by=st.integers(1, 9))
    def slide(self, which: int, by: int) -> None:
        """The client drops its oldest messages, in the middle of a turn too."""
        chat = self.pick(which)
        # What is kept must be recognisable: a window of new messages only belongs nowhere.
        chat.sent_from = min(chat.sent_from + by, max(chat.sent_from, len(chat.messages) - 4))

    # -- what happens to the proxy ---------------------------------------------------------------

    @rule()
    def idle(self) -> None:
        self.run(self.house.idle())

    @rule()
    def restart(self) -> None:
        self.run(self.house.close())
        self.house = self.run(self.open())

    @rule()
    def crash(self) -> None:
        """Nothing is closed in order; what was acknowledged is in the file."""
        self.run(self.house.keeper.stop())
        old = self.house
        self.house = self.run(self.open())
        self.run(old.store.close())

    @rule(high=st.sampled_from([100, 130, 200]), compact=st.booleans())
    def change_policy(self, high: int, compact: bool) -> None:
        self.policy = replace(POLICY, high=high, compact=compact)
        self.restart()

    @precondition(lambda self: self.chats)
    @rule(which=st.integers(0, 9))
    def forget(self, which: int) -> None:
        """A forgotten conversation is as if it had never been, for all its branches."""
        chat = self.chats[which % len(self.chats)]
        self.run(self.house.idle())
        found = self.run(self.house.store.deepest(chat.owner, chain(chat.messages)))
        assert found is not None
        self.run(self.house.store.forget_conversation(chat.owner, found[0]))
        root = chat.messages[0]
        self.chats = [c for c in self.chats if c.messages[0] != root]

    # -- the oracle ------------------------------------------------------------------------------

    def pick(self, which: int) -> Twin:
        return self.chats[which % len(self.chats)]

    def turn(self, chat: Twin) -> None:
        chat.messages.append(Message(USER, self.text(chat.owner)))
        self.ask(chat)

    def ask(self, chat: Twin) -> None:
        sent = chat.messages[chat.sent_from :]
        text, plan = self.run(self.house.ask(chat.owner, sent, system=chat.system, max_tokens=40))
        self.check(chat, plan.context, plan.history.digests)
        chat.messages.append(Message(ASSISTANT, text))

    def check(self, chat: Twin, context: Context, digests: tuple[bytes, ...]) -> None:
        assert digests == chain(chat.messages), "not the history that the client has"
        said = [(m.role, m.text) for m in chat.messages]
        shown = _unmerged(verbatim(context), said)
        assert said[len(said) - len(shown) :] == shown, "not the client's own words"
        head = len(said) - len(shown)
        plan = context.shape
        summarised = head - plan.dropped_messages
        assert summarised >= 0
        assert (summarised > 0) == (plan.summaries > 0) or plan.dropped_messages > 0
        if plan.dropped_messages:
            note = LEFT_OUT.format(n=plan.dropped_messages)
            assert note in context.messages[0].text
        told = set(_SERIAL.findall(context.messages[0].text)) if head else set()
        assert told <= set(_SERIAL.findall(" ".join(text for _, text in said[:head]))), (
            "a summary of what this history does not hold"
        )
        everything = "".join(m.text for m in context.messages)
        assert f"{OTHER[chat.owner]}-" not in everything, "another owner's words"
        if head:
            assert head in turn_starts([r for r, _ in said]) or said[head][0] == USER

    @invariant()
    def no_owner_reaches_another(self) -> None:
        for call in self.engine.calls[-6:]:
            text = "".join(m.text for m in call.context.messages)
            assert f"{OTHER[call.owner]}-" not in text


def _unmerged(shown: list[tuple[str, str]], said: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbours of one role were merged for the template; the twin has them apart."""
    out: list[tuple[str, str]] = []
    rest = list(reversed(said))
    for role, text in reversed(shown):
        out.append((role, text))
        rest.pop(0)
        while rest and rest[0][0] == role and role == USER and len(out) < len(said):
            out.append(rest.pop(0))
    return list(reversed(out))


Client.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestClient = Client.TestCase
