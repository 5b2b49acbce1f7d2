"""40 turns with everything a user does. LibreChat's own current client: its window at its default
or at 2,000 tokens, its own summarisation off or on. Versions 0.6 and 0.7: at 2,000 tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from bench.bounds import Check, at_least, at_most
from bench.librechat_client import Speaks, librechat, missing
from bench.librechat_older import V0_6, V0_7, OlderClient, Version
from bench.librechat_run import (
    ACTS,
    LIMIT_TOKENS,
    SAY,
    STOP_IN_ANSWER,
    STOP_IN_PREFILL,
    TURNS,
    Request,
    Run,
    amplification,
    stops_ms,
    to_json,
)
from bench.servers import BenchError, Chatfold

DEFAULT_LIMIT_TOKENS = 30_400
"""Of LibreChat, for a model whose name it does not know."""

AMPLIFICATION_MOST = 1.10
STOP_MS_MOST = 100
N_STOPS = sum(act in (STOP_IN_PREFILL, STOP_IN_ANSWER) for act in ACTS.values())


@dataclass(frozen=True, slots=True)
class Setting:
    """`older` is a version before today's; None stands for the real client."""

    limit: int
    summarise: bool = False
    older: Version | None = None

    @property
    def name(self) -> str:
        version = f"{self.older.name}: " if self.older else ""
        summaries = "" if self.older else f", summarisation {'on' if self.summarise else 'off'}"
        return f"{version}limit {self.limit:,}{summaries}"


SETTINGS: Mapping[str, Setting] = {
    "whole": Setting(DEFAULT_LIMIT_TOKENS),
    "whole_summarised": Setting(DEFAULT_LIMIT_TOKENS, summarise=True),
    "whole_sliding": Setting(LIMIT_TOKENS),
    "whole_sliding_summarised": Setting(LIMIT_TOKENS, summarise=True),
    "whole_0_6": Setting(LIMIT_TOKENS, older=V0_6),
    "whole_0_7": Setting(LIMIT_TOKENS, older=V0_7),
}


@contextmanager
def _client(chatfold: Chatfold, setting: Setting) -> Iterator[Speaks]:
    if setting.older:
        yield OlderClient(setting.older, f"{chatfold.url}/v1")
        return
    if why := missing():
        raise BenchError(why)
    with librechat(chatfold) as client:
        yield client


def _measure(chatfold: Chatfold, *, setting: Setting) -> tuple[dict[str, Any], list[Check]]:
    limit, summarise = setting.limit, setting.summarise
    with _client(chatfold, setting) as client:
        run = Run(client, chatfold.wait_until_idle, chatfold.trace, limit, summarise)
        run.go()
    figures = _figures(setting, run)
    return figures, list(_checks(setting, run.requests, figures))


def _figures(setting: Setting, run: Run) -> dict[str, Any]:
    requests = run.requests
    stops = {act: stops_ms(requests, act) for act in (STOP_IN_PREFILL, STOP_IN_ANSWER)}
    return {
        "client": setting.older.name if setting.older else "now",
        "limit_tokens": setting.limit,
        "summarise": setting.summarise,
        "turns": len({r.turn for r in requests}),
        "requests": len(requests),
        "answered": sum(r.answered for r in requests),
        "acts": sum(r.act != SAY for r in requests),
        "titles": run.titles,
        "requests_with_a_window_that_slid": sum(bool(r.dropped) for r in requests),
        "summaries_by_librechat": sum(r.summarised for r in requests),
        "amplification": round(amplification(requests), 4),
        "most_beyond_new": max(r.evaluated - r.new for r in requests[1:]),
        "longest_prompt": max(r.prompt for r in requests),
        "stop_ms": stops,
        "other_than_messages": [to_json(r) for r in requests if r.act != SAY],
    }


def _checks(
    setting: Setting, requests: Sequence[Request], figures: Mapping[str, Any]
) -> Iterator[Check]:
    name, unanswered = setting.name, len(requests) - figures["answered"]
    cut = [ms for found in figures["stop_ms"].values() for ms in found]
    yield at_least(f"{name}: turns", figures["turns"], TURNS)
    yield at_most(f"{name}: requests without their answer", unanswered, 0)
    yield at_least(f"{name}: acts", figures["acts"], len(ACTS))
    yield at_least(f"{name}: titles", len(figures["titles"]), 1)
    yield at_most(f"{name}: evaluated / new", amplification(requests), AMPLIFICATION_MOST)
    yield at_least(f"{name}: Stops that were timed", len(cut), N_STOPS)
    yield at_most(f"{name}: ms from Stop to a free model, most", max(cut), STOP_MS_MOST)
    if setting.limit == LIMIT_TOKENS and setting.summarise:
        yield at_least(f"{name}: its summaries", figures["summaries_by_librechat"], 1)
    elif setting.limit == LIMIT_TOKENS:
        slid = figures["requests_with_a_window_that_slid"]
        yield at_least(f"{name}: requests with a window that slid", slid, 10)


PARTS: Mapping[str, Callable[[Chatfold], tuple[dict[str, Any], list[Check]]]] = {
    name: partial(_measure, setting=setting) for name, setting in SETTINGS.items()
}


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Of those that were measured, by this run or before."""
    head = ("LibreChat", "its limit", "its summaries", "answered", "slid", "evaluated / new")
    yield " | ".join((*head, "Stop in prefill, ms", "in answer, ms"))
    for name in SETTINGS:
        if name in found:
            yield " | ".join(_cells(found[name]))


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    yield row["client"]
    yield f"{row['limit_tokens']:,}"
    yield f"{row['summaries_by_librechat']}" if row["summarise"] else "off"
    yield f"{row['answered']}/{row['requests']}"
    yield f"{row['requests_with_a_window_that_slid']}"
    yield f"{row['amplification']:.3f}"
    for found in row["stop_ms"].values():
        yield f"{median(found):.1f} (most {max(found):.1f})"
