"""The order of events in the model process, from the trace that chatfold writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy import trace

Event = dict[str, Any]

CHAT, BACKGROUND = "chat", "background"
ENDS = ("request_done", "request_failed", "request_cancelled")


def read(path: Path) -> list[Event]:
    return sorted(trace.read(path), key=lambda e: e["t"])


def count(events: Iterable[Event], name: str) -> int:
    return sum(e["event"] == name for e in events)


@dataclass(frozen=True)
class Visit:
    """A chat request in the model process: when it came, first ran and ended, and how many batches
    of background work were started in between. `found_busy`: background work was under way when it
    came.
    """

    request: int
    queued_at: float
    first_batch_at: float
    done_at: float
    background_batches: int
    found_busy: bool

    @property
    def waited_s(self) -> float:
        return self.first_batch_at - self.queued_at


def chat_visits(events: Sequence[Event]) -> list[Visit]:
    """Every chat request that was queued and ended, in the order they came."""
    queued = [e for e in events if e["event"] == "request_queued" and e["cls"] == CHAT]
    visits = (_visit(e, events) for e in queued)
    return [v for v in visits if v is not None]


def _visit(queued: Event, events: Sequence[Event]) -> Visit | None:
    request, since = queued["request"], queued["t"]
    done = [e["t"] for e in events if _is_end(e, request) and e["t"] >= since]
    batches = [e for e in events if e["event"] == "batch" and e["t"] >= since]
    own = [e["t"] for e in batches if request in e["requests"]]
    if not done or not own:
        return None
    foreign = [e for e in batches if e["cls"] == BACKGROUND and e["t"] < done[0]]
    return Visit(request, since, own[0], done[0], len(foreign), bool(_underway(events, since)))


def _is_end(event: Event, request: int) -> bool:
    return event["event"] in ENDS and event["request"] == request


def _underway(events: Sequence[Event], at: float) -> set[int]:
    """Background requests that had come and not ended at that time."""
    found: set[int] = set()
    for e in events:
        if e["t"] >= at:
            break
        if e.get("cls") == BACKGROUND and e["event"] == "request_queued":
            found.add(e["request"])
        elif e["event"] in ENDS:
            found.discard(e["request"])
    return found


def story(events: Sequence[Event], visit: Visit, *, before_s: float = 0.05) -> list[str]:
    """The events around one visit, a line each; runs of batches of one class as one line."""
    window = [e for e in events if visit.queued_at - before_s <= e["t"] <= visit.done_at + before_s]
    lines: list[str] = []
    run: list[Event] = []
    for e in window:
        if run and not _same_run(run[-1], e):
            lines.append(_line(run, visit.queued_at))
            run = []
        run.append(e)
    return [*lines, _line(run, visit.queued_at)] if run else lines


def _same_run(one: Event, other: Event) -> bool:
    return bool(one["event"] == other["event"] == "batch" and one["cls"] == other["cls"])


def _line(run: Sequence[Event], zero: float) -> str:
    first = run[0]
    at = f"{(first['t'] - zero) * 1000:+8.1f} ms  "
    if first["event"] == "batch":
        tokens = sum(e["tokens"] for e in run)
        return f"{at}{first['cls']}: {len(run)} batches, {tokens} tokens"
    if "request" in first:
        name = first["event"].removeprefix("request_").replace("_", " ")
        return f"{at}{first['cls']} request {first['request']}: {name}"
    return f"{at}keeper: {first['event']}"
