"""What memory promises, in figures, without a model; `make bench-memory`, 1 if a bound is missed.

Summary calls, sliding windows, changing system prompts and a long chat are counted exactly, on a
simulated engine behind the real chat path, keeper and store. Speed is wall time: run it on a quiet
machine. Writers are killed and stores opened in processes of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from bench import memory_calls as calls
from bench import memory_crash as crash
from bench import memory_prefix as prefix
from bench import memory_report as report
from bench import memory_speed as speed
from bench import memory_windows as windows
from bench.bounds import Check, at_least, at_most
from bench.memory_texts import LOCOMO, exchanges
from bench.servers import ROOT
from memory.policy import load_policy

POLICY = load_policy("balanced")
WINDOW_TOKENS = 8192
SMALL_WINDOW_TOKENS = 2048
"""For the counts of summary calls: in it 60 turns make two dozen."""
ROOMY_WINDOW_TOKENS = 32768
"""The client's window slides before the first compaction here."""

CHAT_TURNS = 60
EDITED_TURN = 10
SPEED_MESSAGES = 2000
SPEED_P50_MS = 10.0
CURVE_FLATNESS = 2.0
"""A message of the longest transcript may take this many times that of SPEED_MESSAGES."""
AMPLIFICATION = 1.10

Found = tuple[str, Any, list[Check]]
"""Text for people, values for scripts, and the claims."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    wanted = options.only or list(SECTIONS)
    found: dict[str, Any] = {"machine": _machine()}
    checks: list[Check] = []
    for name in wanted:
        began = time.monotonic()
        text, values, claims = asyncio.run(SECTIONS[name](options))
        found[name], checks = values, [*checks, *claims]
        print(f"{text}\n", flush=True)
        print(f"bench: {name} took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print("\n".join(str(check) for check in checks))
    found["checks"] = [check.to_json() for check in checks]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return 0 if all(check.holds for check in checks) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="some sections alone")
    parser.add_argument("--turns", type=int, default=1000, help="of the long chat")
    parser.add_argument("--window-turns", type=int, default=200, help="of the sliding clients")
    parser.add_argument("--messages", type=int, default=20_000, help="the longest transcript")
    parser.add_argument("--runs", type=int, default=50, help="of each timing")
    parser.add_argument("--kills", type=int, default=200, help="writers killed")
    parser.add_argument("--rounds", type=int, default=50, help="of processes opening at once")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/memory.json")
    return parser.parse_args(arguments)


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    texts = "LoCoMo" if LOCOMO.exists() else "made"
    load = round(os.getloadavg()[0], 1)
    return {"python": platform.python_version(), "cores": cores, "load": load, "texts": texts}


async def _calls(options: argparse.Namespace) -> Found:
    said = exchanges(3 * CHAT_TURNS)
    one, other, third = (said[i : i + CHAT_TURNS] for i in range(0, len(said), CHAT_TURNS))
    setting = POLICY, SMALL_WINDOW_TOKENS
    found = report.Calls(
        one=await calls.alone(one, *setting),
        other=await calls.alone(other, *setting),
        interleaved=await calls.interleaved(one, other, *setting),
        regenerated=await calls.regenerated(one, *setting, every=1),
        edited=await calls.edited(one, third, *setting, turn=EDITED_TURN),
        restarted=await calls.restarted(one, *setting, every=5),
    )
    restarts, edited = found.restarted, found.edited
    return (
        report.calls(found, turns=CHAT_TURNS),
        found.to_json(),
        [
            at_least("summary calls of one chat", found.one, 1),
            at_most("interleaved chats: calls - the sum of each alone", found.extra, 0),
            at_least("interleaved chats: calls - the sum of each alone", found.extra, 0),
            at_most("5 regenerations: more calls", found.regenerated - found.one, 0),
            at_most("edit: spans summarised again though they held", edited.summarised_again, 0),
            at_least("edit: first new block begins at", edited.earliest, edited.kept_messages),
            at_most("restart: calls by it", restarts.calls_by_restart, 0),
            at_most("restart: more calls in all", restarts.calls - found.one, 0),
            at_least("restart: same contexts", restarts.same_contexts, restarts.restarts),
        ],
    )


async def _windows(options: argparse.Namespace) -> Found:
    said = exchanges(options.window_turns)
    found = {
        size: await windows.windows(said, POLICY, size)
        for size in (WINDOW_TOKENS, ROOMY_WINDOW_TOKENS)
    }
    bare = await windows.bare(said)
    checks = [
        check
        for size, (plain, *others) in found.items()
        for run in others
        for check in (
            at_most(f"{run.name}, {size}: turns with a lost message", run.lost, 0),
            at_most(f"{run.name}, {size}: amplification", run.mean, AMPLIFICATION),
            at_most(f"{run.name}, {size}: over the whole history's", run.mean - plain.mean, 0.001),
            at_least(f"{run.name}, {size}: dropped by the client", run.dropped_by_client, 1),
        )
    ]
    values = {str(size): [run.to_json() for run in runs] for size, runs in found.items()}
    return report.windows(found, bare), values | {"bare": bare.to_json()}, checks


async def _dates(options: argparse.Namespace) -> Found:
    split, front = await windows.dates(exchanges(CHAT_TURNS), POLICY, WINDOW_TOKENS)
    checks = [at_most("changing system prompt, split: tokens evaluated again", split.again, 0)]
    return report.dates([split, front]), [split.to_json(), front.to_json()], checks


async def _prefix(options: argparse.Namespace) -> Found:
    found = await prefix.long_chat(exchanges(options.turns), POLICY, WINDOW_TOKENS)
    checks = [
        at_most("long chat: requests that found less than was warmed", found.cold_requests, 0),
        at_most("long chat: amplification", found.mean, AMPLIFICATION),
        at_most("long chat: turns with a lost message", found.lost, 0),
        at_most("long chat: rewritings", found.most_rewritings, found.rewritings_bound),
    ]
    return report.prefix(found), found.to_json(), checks


async def _speed(options: argparse.Namespace) -> Found:
    steps = (200, 500, 1000, SPEED_MESSAGES, 5000, 10_000, 20_000)
    sizes = [n for n in steps if n <= options.messages]
    found = await speed.curve(sizes, POLICY, WINDOW_TOKENS, runs=options.runs)
    by_size = {timed.messages: timed for timed in found}
    held = by_size[SPEED_MESSAGES]
    checks = [
        at_most(f"{SPEED_MESSAGES} messages: p50, ms", held.total_ms, SPEED_P50_MS),
        at_most(
            f"us a message at {sizes[-1]} / at {SPEED_MESSAGES}",
            found[-1].total_us_each / held.total_us_each,
            CURVE_FLATNESS,
        ),
    ]
    return report.speed(found), [timed.to_json() for timed in found], checks


async def _crash(options: argparse.Namespace) -> Found:
    # In a thread: the tests' helpers run event loops of their own.
    killed = await asyncio.to_thread(crash.kills, options.kills)
    opened = [
        await asyncio.to_thread(crash.openings, options.rounds, old=old) for old in (False, True)
    ]
    checks = [
        at_least("kill -9: writers killed", killed.kills, options.kills),
        at_most("kill -9: acknowledged turns lost", killed.lost, 0),
        at_most("kill -9: half turns", killed.half_turns, 0),
        at_most("kill -9: faults of integrity", len(killed.integrity), 0),
        *(at_most(f"opened at once, {o.on}: failures", o.failures, 0) for o in opened),
    ]
    values = {"kills": killed.to_json(), "openings": [o.to_json() for o in opened]}
    return report.crash(killed, opened), values, checks


SECTIONS: dict[str, Callable[[argparse.Namespace], Coroutine[Any, Any, Found]]] = {
    "speed": _speed,
    "calls": _calls,
    "windows": _windows,
    "dates": _dates,
    "prefix": _prefix,
    "crash": _crash,
}


if __name__ == "__main__":
    sys.exit(main())
