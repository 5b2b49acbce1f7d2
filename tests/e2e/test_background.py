"""Long chats: summaries are written behind the user's back, and never in the user's way."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from .serving import Event, Proxy, idle, serving

pytestmark = pytest.mark.slow

Messages = list[dict[str, Any]]

POLICY = """\
name = "tight"
high = 240
low = 100
block = 200
summaries = 200
summary = 40
answer = 64
verbatim_turns = 1
"""
WINDOW_TOKENS = 1024
MARKUP_TOKENS = 8
"""What ChatML puts around a user message (5) and before the answer (3)."""
SLACK_TOKENS = 8

LINES = (
    "I moved to Bergen in March because my sister Ingrid has a bakery there, near the harbour.",
    "On Mondays I deliver bread with a green cargo bicycle, and it rains nearly every time.",
    "My neighbour Mr Halvorsen builds wooden boats, and he lets me sand the oars on Sundays.",
    "Last week we lost an anchor near the island of Askøy and had to row home in the dark.",
    "I want to save 4,000 crowns for a small sail, but bread deliveries do not pay that well.",
    "Ingrid says I could sell cinnamon buns at the fish market on Saturdays for 35 crowns each.",
    "The market needs a permit, and the woman at the town hall, Ms Berge, wants three forms.",
    "I filled in two of the forms, and the third asks for a food safety course on 12 May.",
    "The course is in Oslo, seven hours by train, and my bicycle is not allowed on board.",
    "Mr Halvorsen offered to sail me down the coast, but his boat leaks at the stern.",
    "We fixed the leak with tar and wool, as his grandfather did, and it held in the harbour.",
    "So the plan is to sail on 9 May, sell buns from the boat, and be back before the 17th.",
)


@dataclass
class Turn:
    prompt: int
    evaluated: int
    new: int
    context: dict[str, int]


@dataclass
class Chat:
    """A chat as a client holds it: everything said so far, sent whole each time."""

    proxy: Proxy
    max_tokens: int = 16
    messages: Messages = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def say(self, line: str) -> Turn:
        self.messages.append({"role": "user", "content": line})
        body = {"messages": self.messages, "max_tokens": self.max_tokens, "temperature": 0}
        response = self.proxy.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        answer = response.json()
        self.messages.append(answer["choices"][0]["message"])
        usage = answer["usage"]
        assert usage["total_tokens"] <= WINDOW_TOKENS
        turn = Turn(
            prompt=usage["prompt_tokens"],
            evaluated=usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"],
            new=_text_tokens(self.proxy, line) + MARKUP_TOKENS,
            context=_shape(response.headers["x-chatfold-context"]),
        )
        self.turns.append(turn)
        return turn


def _text_tokens(proxy: Proxy, text: str) -> int:
    """By a chat of another user, so that nothing of this one is found."""
    body = {"messages": [{"role": "user", "content": text}], "user": "nobody"}
    tokens: int = proxy.post("/api/context", body).json()["shape"]["verbatim_tokens"]
    return tokens


def _shape(header: str) -> dict[str, int]:
    pairs = (item.split("=") for item in header.split("; "))
    return {name: int(value) for name, value in pairs}


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    path: Path = tmp_path_factory.mktemp("background")
    policy = path / "tight.toml"
    policy.write_text(POLICY)
    with serving(path, "--n-ctx", str(WINDOW_TOKENS), "--policy", str(policy)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def paced(proxy: Proxy) -> Chat:
    """A chat of twelve turns that lets the background work end before each."""
    chat = Chat(proxy)
    for line in LINES:
        proxy.wait_idle()
        chat.say(line)
    proxy.wait_idle()
    return chat


def test_older_turns_become_summaries(paced: Chat) -> None:
    last = paced.turns[-1].context
    assert paced.turns[0].context["summaries"] == 0
    assert last["summaries"] >= 1
    assert last["summary_tokens"] > 0
    assert last["verbatim_turns"] < len(LINES)
    assert last["dropped_messages"] == 0
    assert paced.proxy.status()["store"]["summaries"] >= 2


def test_a_compaction_makes_the_context_shorter(paced: Chat) -> None:
    prompts = [turn.prompt for turn in paced.turns]
    assert any(later < earlier for earlier, later in pairwise(prompts))
    assert max(prompts) < WINDOW_TOKENS // 2


def test_a_turn_evaluates_its_new_message_and_nothing_else(paced: Chat) -> None:
    over = {
        i: (turn.evaluated, turn.new)
        for i, turn in enumerate(paced.turns[1:], 2)
        if turn.evaluated > turn.new + SLACK_TOKENS
    }
    assert not over


def test_a_summary_is_warm_before_it_is_used(paced: Chat) -> None:
    """In the order of events: written, evaluated, activated."""
    events = [e["event"] for e in paced.proxy.events()]
    assert "activated" in events
    for i, name in enumerate(events):
        if name == "activated":
            last = max(j for j, n in enumerate(events[:i]) if n == "summarised")
            assert "warmed" in events[last:i]


def test_nothing_that_was_said_is_lost(paced: Chat) -> None:
    stored = paced.proxy.stored()
    for message in paced.messages:
        assert (message["role"], message["content"]) in stored


def test_the_context_of_a_summarised_chat_survives_kill_9(tmp_path: Path) -> None:
    policy = tmp_path / "tight.toml"
    policy.write_text(POLICY)
    arguments = ("--n-ctx", str(WINDOW_TOKENS), "--policy", str(policy))
    with serving(tmp_path, *arguments) as first:
        chat = Chat(first, max_tokens=4)
        for line in LINES[:9]:
            first.wait_idle()
            chat.say(line)
        assert first.wait_idle()["store"]["summaries"] >= 1
        body = {"messages": [*chat.messages, {"role": "user", "content": "And then?"}]}
        before = first.post("/api/context", body).content
        first.kill()
    with serving(tmp_path, *arguments) as second:
        assert second.post("/api/context", body).content == before


def test_a_user_goes_before_background_work(proxy: Proxy) -> None:
    """While a chat request is there, no batch of background work begins; afterwards it goes on."""
    proxy.wait_idle()
    since = len(proxy.events())
    chat = Chat(proxy, max_tokens=4)
    # Without a pause: the keeper is at work behind each answer when the next question comes.
    for line in (*reversed(LINES), *LINES):
        chat.say(line)
        paused = any(e["event"] == "request_paused" for e in proxy.events()[since:])
        if len(chat.turns) >= 10 and paused:
            break
    proxy.wait_idle()
    events = proxy.events()[since:]
    for visit in _chat_visits(events):
        assert not [e for e in visit if e["event"] == "batch" and e["cls"] == "background"]
    names = [e["event"] for e in events]
    assert "request_paused" in names, "no request came while background work was under way"
    assert "request_resumed" in names
    assert "activated" in names


def _chat_visits(events: list[Event]) -> Iterator[list[Event]]:
    """For each chat request the events from its arrival to its end."""
    for i, event in enumerate(events):
        if event["event"] == "request_queued" and event["cls"] == "chat":
            rest = events[i:]
            ends = (
                j
                for j, e in enumerate(rest)
                if e["event"] == "request_done" and e["request"] == event["request"]
            )
            yield rest[: next(ends)]


def test_two_chats_are_answered_side_by_side(proxy: Proxy) -> None:
    proxy.wait_idle()
    since = len(proxy.events())
    one, other = Chat(proxy, max_tokens=160), Chat(proxy, max_tokens=4)
    first = threading.Thread(target=one.say, args=("Tell me everything about bread.",))
    first.start()
    begun = proxy.wait_for_event(
        "begun", lambda e: e["event"] == "first_token" and e["cls"] == "chat", since=since
    )
    other.say("And boats?")
    first.join(100)
    events = proxy.events()[since:]
    assert any(e["event"] == "batch" and len(e["requests"]) == 2 for e in events)
    done = [e["request"] for e in events if e["event"] == "request_done" and e["cls"] == "chat"]
    assert done.index(begun["request"]) == 1, "the short answer waited for the long one"
    assert len(one.messages) == len(other.messages) == 2


def test_two_chats_at_once_do_not_mix_and_do_not_evict_each_other(proxy: Proxy) -> None:
    chats = [Chat(proxy, max_tokens=4), Chat(proxy, max_tokens=4)]

    def talk(chat: Chat, name: str) -> None:
        for i, line in enumerate(LINES[:4]):
            chat.say(f"{name}, part {i}: {line}")

    names = ("Anna", "Bruno")
    threads = [threading.Thread(target=talk, args=pair) for pair in zip(chats, names, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    for chat, name in zip(chats, names, strict=True):
        assert len(chat.turns) == 4
        said = [m["content"] for m in chat.messages if m["role"] == "user"]
        context = proxy.post("/api/context", {"messages": chat.messages}).json()["context"]
        assert all(line.startswith(name) for line in said)
        assert not any(other in m["text"] for m in context for other in names if other != name)
        assert all(turn.evaluated < turn.prompt - 20 for turn in chat.turns[1:])
    proxy.wait_idle()


def test_a_summary_that_a_crash_interrupted_is_written_afterwards(proxy: Proxy) -> None:
    proxy.wait_idle()
    since, chat = len(proxy.events()), Chat(proxy, max_tokens=4)
    killed_at = _kill_while_a_summary_is_written(proxy, chat, since)
    proxy.wait_for_event(
        "summarised after the crash", lambda e: e["event"] == "summarised", since=killed_at
    )
    assert proxy.wait_idle()["engine"]["restarts"] == 1
    chat.say(LINES[-1])


def _kill_while_a_summary_is_written(proxy: Proxy, chat: Chat, since: int) -> int:
    """How many events there were by then. The process is looked at while it is stopped: it cannot
    come to the end of the summary meanwhile."""
    pid = proxy.status()["engine"]["pid"]
    for line in LINES:
        chat.say(line)
        while not idle(proxy.status()):
            os.kill(pid, signal.SIGSTOP)
            events = proxy.events()
            if _summaries_under_way(events[since:]):
                os.kill(pid, signal.SIGKILL)
                return len(events)
            os.kill(pid, signal.SIGCONT)
    raise AssertionError("no summary was seen while it was written")


def _summaries_under_way(events: list[Event]) -> set[int]:
    """Background requests that have begun and not ended, but for those that only warm."""

    def named(*names: str) -> set[int]:
        return {e["request"] for e in events if e["event"] in names}

    warming = {e["request"] for e in events if e.get("most") == 0}
    background = {e["request"] for e in events if e.get("cls") == "background" and "request" in e}
    begun = background & named("request_started")
    return begun - warming - named("request_done", "request_cancelled", "request_failed")
