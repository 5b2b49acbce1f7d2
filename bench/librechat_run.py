"""One chat of a client of LibreChat's in which a user does everything there is to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import events
from bench.chats import UserTokens
from bench.librechat_client import Chat, Said, Speaks, evaluated

TURNS = 40
LIMIT_TOKENS = 2000
"""What LibreChat sends at most, by its own count."""

SAY, REGENERATE, EDIT, CONTINUE = "say", "regenerate", "edit", "continue"
STOP_IN_PREFILL, STOP_IN_ANSWER = "stop in prefill", "stop in answer"

ACTS: Mapping[int, str] = {
    3: REGENERATE,
    6: EDIT,
    9: CONTINUE,
    12: STOP_IN_PREFILL,
    15: STOP_IN_ANSWER,
    32: REGENERATE,
    33: EDIT,
    35: CONTINUE,
    36: STOP_IN_PREFILL,
    38: STOP_IN_ANSWER,
}
"""What is done in or after which turn: everything before the window slides, and again after."""

EVENT_S = 120.0
ANSWER_TOKENS = 8
SENTENCES = ("calm", "grey", "cold", "wide", "loud")

OPTIONS: Mapping[str, Any] = {
    "instructions": "You are terse.",
    "maxTokens": ANSWER_TOKENS,
    # The end of an answer is banned: each has its full length, whatever the model thinks of it.
    "extra": {"logit_bias": {"2": -100}},
}


def note(n: int, sentences: int) -> str:
    """A message of the same number of tokens for every n below 100."""
    seas = SENTENCES[:sentences]
    return " ".join(f"On watch {n:02} the keeper saw that the sea was {it} again." for it in seas)


def long_note(n: int, sentences: int) -> str:
    """So long that Stop comes while it is evaluated."""
    return note(n, sentences) + "".join(f" lamp {i}," for i in range(40))


@dataclass(frozen=True, slots=True)
class Request:
    """A chat request as LibreChat's client saw it. `new` are the tokens that no earlier request of
    the chat held, `evaluated` those that were not in the cache; both 0 for one that was stopped,
    whose client is not told. `dropped` messages were left out by the client. `stop_ms`: from the
    client's abort to the model being free.
    """

    turn: int
    act: str
    answered: bool
    new: int = 0
    evaluated: int = 0
    prompt: int = 0
    dropped: int = 0
    summarised: bool = False
    stop_ms: float | None = None


@dataclass(slots=True)
class Run:
    """Drives the chat. `settle` returns when the proxy is idle; `trace` is the proxy's. With
    `summarise` LibreChat's own summarisation is on."""

    client: Speaks
    settle: Callable[[], object]
    trace: Path
    limit: int
    summarise: bool
    sentences: int = len(SENTENCES)
    turns: int = TURNS
    acts: Mapping[int, str] = field(default_factory=lambda: ACTS)
    requests: list[Request] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    _chat: Chat = field(init=False)
    _tokens: UserTokens = field(init=False)
    _due: list[str] = field(init=False)

    def __post_init__(self) -> None:
        options = {**OPTIONS, "limit": self.limit, "summarise": self.summarise}
        self._chat = Chat(self.client, options)
        self._tokens = UserTokens()
        self._due = []

    def go(self) -> None:
        for n in range(self.turns):
            self._due += [self.acts[n]] if n in self.acts else []
            self._turn(n, self._due[0] if self._due else "")

    def _turn(self, n: int, act: str) -> None:
        if act in (STOP_IN_PREFILL, STOP_IN_ANSWER):
            self._stop(n, self._due.pop(0))
            return
        title = {"title": "completion"} if n == 0 else {}
        text = note(n, self.sentences)
        self._count(n, SAY, self._with_question(text), self._chat.say(text, **title))
        # Behind LibreChat's own summary the question is gone: then the next turn has its turn.
        if act and self._chat.can_go_back:
            self._go_back(n, self._due.pop(0))

    def _go_back(self, n: int, act: str) -> None:
        text = f"No: {note(n, self.sentences)}" if act == EDIT else ""
        if act == REGENERATE:
            # Another answer: the chat goes on from it, on a branch of its own.
            answer = self._chat.regenerate(temperature=1.5)
        elif act == EDIT:
            answer = self._chat.edit(text)
        else:
            answer = self._chat.go_on()
        self._count(n, act, text, answer)

    def _with_question(self, text: str) -> str:
        """Behind a question that got no answer it joins that."""
        waiting = [said[1] for said in self._chat.history[-1:] if said[0] == "user"]
        return "\n\n".join([*waiting, text])

    def _count(self, n: int, act: str, added: str, answer: Said) -> None:
        """`added` is what the request holds that no earlier one did."""
        self.titles += [answer["title"]] if answer.get("title") else []
        good = "error" not in answer and bool(answer["text"].strip())
        request = Request(
            n,
            act,
            good,
            new=self._tokens.count(added) if added else 0,
            evaluated=evaluated(answer) if good else 0,
            prompt=answer["usage"]["input_tokens"] if good else 0,
            dropped=max(0, answer.get("dropped", 0)),
            summarised=bool(answer.get("summary")),
        )
        self.requests.append(request)
        self.settle()

    def _stop(self, n: int, act: str) -> None:
        since = len(events.read(self.trace))
        if act == STOP_IN_PREFILL:
            text = long_note(n, self.sentences)
            answer = self._chat.say(text, stop_when=lambda: self._wait("batch", since))
        else:
            text = note(n, self.sentences)
            answer = self._chat.say(text, stop="answer", maxTokens=400)
        gone = self._wait("request_cancelled", since)
        # Cut in its prefill there is no text, and cut in the answer there is some.
        right = answer["stopped"] and bool(answer["text"]) == (act == STOP_IN_ANSWER)
        took = round(1000 * (gone["t"] - answer["aborted_s"]), 1) if right else None
        told = bool(answer.get("summary"))
        self.requests.append(Request(n, act, bool(right), summarised=told, stop_ms=took))
        self.settle()

    def _wait(self, name: str, since: int) -> events.Event:
        end = time.monotonic() + EVENT_S
        while time.monotonic() < end:
            for event in events.read(self.trace)[since:]:
                if event["event"] == name and event["cls"] == events.CHAT:
                    return event
            time.sleep(0.002)
        raise TimeoutError(name)


def amplification(requests: Sequence[Request]) -> float:
    """All evaluated tokens / all new tokens; without the first request, whose system prompt is no
    turn's, and those that were stopped."""
    some = [r for r in requests[1:] if r.prompt]
    return sum(r.evaluated for r in some) / sum(r.new for r in some)


def stops_ms(requests: Sequence[Request], act: str) -> list[float]:
    return [r.stop_ms for r in requests if r.act == act and r.stop_ms is not None]


def to_json(request: Request) -> dict[str, Any]:
    """Without what is 0 or not so."""
    return {name: value for name, value in asdict(request).items() if value}
