"""The three runs: at a reader's pace beside the bare server, without pause, and with a kill -9."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import events
from bench.chats import Chat, Turn
from bench.client import body
from bench.events import Visit
from bench.servers import Bare, Chatfold

STORIES = 2


@dataclass(frozen=True)
class Plan:
    """What every run needs. `lines` are (the user's text, its new tokens)."""

    lines: Sequence[tuple[str, int]]
    directory: Path
    window_tokens: int
    max_tokens: int
    say: Callable[[str], None]

    def chatfold(self, name: str) -> Chatfold:
        return Chatfold(self.directory / name, window_tokens=self.window_tokens)

    def bare(self) -> Bare:
        return Bare(self.directory / "bare", window_tokens=self.window_tokens)


# -- at a reader's pace --------------------------------------------------------------------------


@dataclass(frozen=True)
class Paced:
    ours: list[Turn]
    theirs: list[Turn]
    compactions: int
    made_by: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        counts = {"compactions": self.compactions, "made_by": self.made_by}
        return counts | {"chatfold": _json(self.ours), "bare": _json(self.theirs)}


def paced(plan: Plan) -> Paced:
    """Turn by turn: chatfold once its background work is done, then the bare server likewise."""
    with plan.chatfold("paced") as chatfold, plan.bare() as bare:
        ours = Chat(chatfold.client, plan.max_tokens)
        theirs = Chat(bare.client, plan.max_tokens)
        for text, new_tokens in plan.lines:
            chatfold.wait_until_idle()
            turn = ours.say(text, new_tokens=new_tokens)
            chatfold.wait_until_idle()
            other = theirs.say(text, new_tokens=new_tokens)
            other.evaluated = bare.evaluated_tokens() if other.answer.ok else None
            plan.say(_progress("paced", turn, len(plan.lines)))
        trace = events.read(chatfold.trace)
    made_by = Counter(e["made_by"] for e in trace if e["event"] == "summarised")
    return Paced(ours.turns, theirs.turns, made_by.total(), dict(made_by))


# -- without a pause -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Unpaced:
    turns: list[Turn]
    visits: list[Visit]
    stories: list[list[str]]

    @property
    def background_batches(self) -> int:
        """Started between a chat request's arrival in the model process and its end."""
        return sum(v.background_batches for v in self.visits)

    @property
    def longest_wait_s(self) -> float:
        return max((v.waited_s for v in self.visits), default=0.0)

    @property
    def longest_from_sending_s(self) -> float:
        """The same from the client's sending on: the proxy's own work is in it."""
        pairs = zip(self.turns, self.visits, strict=False)
        return max((v.first_batch_at - t.answer.sent_at for t, v in pairs), default=0.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "background_batches_during_requests": self.background_batches,
            "requests_that_found_background_work": sum(v.found_busy for v in self.visits),
            "longest_wait_s": round(self.longest_wait_s, 4),
            "longest_from_sending_s": round(self.longest_from_sending_s, 4),
            "order_of_events": self.stories,
            "chatfold": _json(self.turns),
        }


def unpaced(plan: Plan) -> Unpaced:
    """The next message the moment the answer has ended: no idle time is left for the keeper."""
    with plan.chatfold("unpaced") as chatfold:
        chat = Chat(chatfold.client, plan.max_tokens)
        for text, new_tokens in plan.lines:
            plan.say(_progress("unpaced", chat.say(text, new_tokens=new_tokens), len(plan.lines)))
        trace = events.read(chatfold.trace)
    visits = events.chat_visits(trace)
    busy = [v for v in visits if v.found_busy]
    return Unpaced(chat.turns, visits, [events.story(trace, v) for v in busy[:STORIES]])


# -- kill -9 -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restarted:
    after_turn: int
    context_before: bytes
    context_after: bytes
    digest_before: str
    digest_after: str
    messages_before: int
    messages_after: int
    next_turn: Turn

    @property
    def same_bytes(self) -> bool:
        return self.context_before == self.context_after

    def to_json(self) -> dict[str, Any]:
        return {
            "after_turn": self.after_turn,
            "same_bytes": self.same_bytes,
            "context_bytes": len(self.context_before),
            "digest_before": self.digest_before,
            "digest_after": self.digest_after,
            "messages_before": self.messages_before,
            "messages_after": self.messages_after,
            "next_turn": self.next_turn.to_json(),
        }


def restarted(plan: Plan, *, after_turn: int) -> Restarted:
    """Kills chatfold with all its processes between two turns and starts it on the same data."""
    *said, (following, new_tokens) = plan.lines[: after_turn + 1]
    with plan.chatfold("restarted") as chatfold:
        chat = Chat(chatfold.client, plan.max_tokens)
        for text, tokens in said:
            plan.say(_progress("restarted", chat.say(text, new_tokens=tokens), len(said)))
            chatfold.wait_until_idle()
        before, messages_before = _context(chat, following), _messages(chatfold)
        chatfold.kill()
        chatfold.start()
        after, messages_after = _context(chat, following), _messages(chatfold)
        next_turn = chat.say(following, new_tokens=new_tokens)
    return Restarted(
        after_turn=len(said),
        context_before=before[0],
        context_after=after[0],
        digest_before=before[1],
        digest_after=after[1],
        messages_before=messages_before,
        messages_after=messages_after,
        next_turn=next_turn,
    )


def _context(chat: Chat, text: str) -> tuple[bytes, str]:
    """The bytes of what the next request would send to the model, and their digest."""
    response = chat.client.post("/api/context", json=body(chat.with_user(text), chat.max_tokens))
    return response.raise_for_status().content, str(response.json()["digest"])


def _messages(chatfold: Chatfold) -> int:
    return int(chatfold.status()["store"]["messages"])


# -- all -----------------------------------------------------------------------------------------


def _json(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [turn.to_json() for turn in turns]


def _progress(run: str, turn: Turn, of: int) -> str:
    verdict = "" if turn.answer.ok else f": {turn.answer.trouble}"
    return (
        f"{run} {turn.number}/{of}  new {turn.new_tokens}, evaluated {turn.evaluated}, "
        f"{turn.answer.total_s:.1f} s{verdict}"
    )
