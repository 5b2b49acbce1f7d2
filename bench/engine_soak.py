"""Mixed load for an hour: is anything growing? `make soak`; exits 1 if something is.

Owners chat, regenerate, cancel, ask for titles, read slowly or not at all, forget what they said
and begin anew; the keeper summarises between them. Every half minute memory, file descriptors,
threads, cells, sequences and snapshots of both processes are written down.

Flat means: with the first tenth left out, and no less than two minutes (caches fill), the median of
the last quarter is at most 1.1 times the median of the first and the slack of that series in
SERIES; and no request ended in anything but an answer, or in what its client did to it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import httpx

from bench import command
from bench.bounds import Check, at_least, at_most
from bench.client import Messages
from bench.load import ENDLESS, TIMEOUT, Ending, sentence, stream
from bench.servers import HOST, ROOT, BenchError, Chatfold, wait_until

OWNERS = 4
WINDOW_TOKENS = 2048
CACHE_TOKENS = 4096
SNAPSHOT_BYTES = 128 * 2**20
LONGEST_CHAT = 40
"""Messages, then a new chat begins."""
FORGETS = 0.3
"""How often an owner's past is deleted before a new chat."""
THINKS_S = 2.5
"""At most, between two requests of an owner: the keeper works then."""
WARM_UP = 0.1
WARM_UP_S = 120.0
GROWTH = 1.1
SETTLES_S = 120.0

MIB = 2**20
SERIES = {
    "proxy_rss": 16 * MIB,
    "model_rss": 16 * MIB,
    "proxy_fds": 8,
    "model_fds": 2,
    "proxy_threads": 2,
    "model_threads": 1,
    "cells_used": CACHE_TOKENS // 4,
    "sequences_used": 2,
    "snapshot_bytes": SNAPSHOT_BYTES // 4,
}
"""What is watched, and by how much it may move besides GROWTH."""

ENVIRON = {
    "CHATFOLD_ENGINE_THREADS": "1",
    "CHATFOLD_ENGINE_CACHE_TOKENS": str(CACHE_TOKENS),
    "CHATFOLD_ENGINE_SNAPSHOT_BYTES": str(SNAPSHOT_BYTES),
    "CHATFOLD_TIMEOUTS_READER_S": "5",
}

TITLE = (
    "Provide a concise, 5-word-or-less title for the conversation, using title case conventions. "
    "Only return the title itself.\n\nConversation:\nUser: {}\nAI: {}"
)

Sample = dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    os.nice(options.nice)
    with tempfile.TemporaryDirectory(prefix="chatfold-soak-") as directory:
        work = Path(options.work or directory)
        return command.run(lambda: _soak(options, work))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.engine_soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two samples")
    parser.add_argument("--kill-every", type=float, default=0.0, help="kill -9 the model process")
    parser.add_argument("--nice", type=int, default=10, help="so that the machine stays usable")
    parser.add_argument("--work", type=Path, help="keep data and logs there")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/engine_soak.json")
    return parser.parse_args(arguments)


def _soak(options: argparse.Namespace, directory: Path) -> int:
    kills = bool(options.kill_every)
    # Without a trace: an hour of it would be all that grows.
    proxy = Chatfold(directory, window_tokens=WINDOW_TOKENS, environ=ENVIRON, traced=False)
    with proxy:
        owners = [Owner(proxy, f"owner {i}", seed=i, may_fail=kills) for i in range(OWNERS)]
        over = threading.Event()
        threads = [threading.Thread(target=o.live, args=(over,), daemon=True) for o in owners]
        for thread in threads:
            thread.start()
        try:
            samples = _watch(proxy, options)
        finally:
            over.set()
        for thread in threads:
            thread.join(SETTLES_S)
        restarts = proxy.status()["engine"]["restarts"]
    counts = sum((o.counts for o in owners), Counter[str]())
    wrong = [w for o in owners for w in o.wrong]
    return _report(options, samples, counts, wrong, restarts)


# -- the load ------------------------------------------------------------------------------------


@dataclass
class Owner:
    """Does one thing after the other, at random. `counts` says how often each."""

    proxy: Chatfold
    name: str
    seed: int
    may_fail: bool
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    messages: Messages = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._client = httpx.Client(base_url=self.proxy.client.base_url, timeout=TIMEOUT)

    def live(self, over: threading.Event) -> None:
        acts = (self.turn, self.again, self.leave, self.slow, self.title, self.never_reads)
        while not over.wait(self._chance.uniform(0, THINKS_S)):
            (act,) = self._chance.choices(acts, weights=(60, 12, 10, 8, 8, 2))
            try:
                act()
            except (httpx.HTTPError, OSError) as exc:
                self._note(act.__name__, f"{type(exc).__name__}: {exc}")
            self.counts[act.__name__] += 1

    def turn(self) -> None:
        if len(self.messages) >= LONGEST_CHAT:
            self.begin()
        question = {"role": "user", "content": sentence(self._chance, self._chance.randint(5, 60))}
        self._answer([*self.messages, question])

    def again(self) -> None:
        """The last answer anew, as with the button."""
        if self.messages:
            self._answer(self.messages[:-1])
        else:
            self.turn()

    def begin(self) -> None:
        self.messages = []
        if self._chance.random() < FORGETS:
            response = self._client.delete("/api/conversations", params={"user": self.name})
            response.raise_for_status()
            self.counts["forgot"] += 1

    def leave(self) -> None:
        """Goes before the answer has ended, or before it has begun."""
        most = self._chance.randint(0, 4)
        self._stream(self._next(), on_delta=lambda ending: ending.deltas < most)

    def slow(self) -> None:
        def dawdles(ending: Ending) -> bool:
            time.sleep(0.1)
            return True

        ending = self._stream(self._next(), on_delta=dawdles)
        self._check("slow", ending)

    def title(self) -> None:
        said = [m["content"][:200] for m in self.messages[:2]] or ["Hello", "Hello"]
        messages = [{"role": "user", "content": TITLE.format(*said)}]
        body = {"messages": messages, "user": self.name, "stream": False}
        response = self._client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            self._note("title", response.text)

    def never_reads(self) -> None:
        """Small buffers and a long name of the model in each frame: they are full in no time."""
        body = self._body(self._next()) | ENDLESS | {"max_tokens": 400, "model": "m" * 4000}
        data = json.dumps(body).encode()
        with socket.socket() as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((HOST, self.proxy.client.base_url.port))
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: soak\r\ncontent-length: %d\r\n\r\n"
            client.sendall(head % len(data) + data)
            time.sleep(15)

    def _answer(self, messages: Messages) -> None:
        ending = self._stream(messages)
        self._check("answer", ending)
        if ending.answered and ending.text:
            self.messages = [*messages, {"role": "assistant", "content": ending.text}]

    def _next(self) -> Messages:
        return [*self.messages, {"role": "user", "content": sentence(self._chance, 20)}]

    def _body(self, messages: Messages) -> dict[str, Any]:
        return {"messages": messages, "user": self.name, "stream": True}

    def _stream(self, messages: Messages, **how: Any) -> Ending:
        most = self._chance.randint(8, 48)
        return stream(self._client, messages, user=self.name, max_tokens=most, **how)

    def _check(self, what: str, ending: Ending) -> None:
        if not (ending.answered or (self.may_fail and ending.told)):
            self._note(what, str(ending))

    def _note(self, what: str, how: str) -> None:
        self.wrong.append(f"{self.name}, {what}: {how}")


# -- what is watched -----------------------------------------------------------------------------


def _watch(proxy: Chatfold, options: argparse.Namespace) -> list[Sample]:
    began, samples, killed_at = time.monotonic(), [], time.monotonic()
    while (at := time.monotonic() - began) < options.seconds:
        time.sleep(min(options.every, options.seconds - at))
        if sample := _sample(proxy):
            samples.append({"t": round(time.monotonic() - began, 1)} | sample)
            _say(samples[-1])
        if proxy.down():
            raise BenchError("the proxy ended")
        if options.kill_every and time.monotonic() - killed_at > options.kill_every:
            killed_at = time.monotonic()
            os.kill(_pid(proxy), signal.SIGKILL)
    return samples


def _pid(proxy: Chatfold) -> int:
    wait_until(lambda: bool(proxy.status()["engine"]["pid"]), 60, "a model process")
    return int(proxy.status()["engine"]["pid"])


def _sample(proxy: Chatfold) -> Sample | None:
    """None while the model process is being started again."""
    engine = proxy.status()["engine"]
    try:
        ours, models = _process(proxy.pid), _process(engine["pid"] or 0)
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = {f"proxy_{k}": v for k, v in ours.items()}
    found |= {f"model_{k}": v for k, v in models.items()}
    names = ("cells_used", "sequences_used", "snapshot_bytes", "snapshots", "cells", "restarts")
    return found | {name: float(engine[name]) for name in names}


def _process(pid: int) -> Sample:
    """Memory in bytes, file descriptors and threads, as the system counts them."""
    folder = Path(f"/proc/{pid}")
    lines = (folder / "status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    return {
        "rss": float(status["VmRSS"].split()[0]) * 1024,
        "fds": float(len(list((folder / "fd").iterdir()))),
        "threads": float(status["Threads"]),
    }


def _say(sample: Sample) -> None:
    shown = (f"{k} {v / MIB:.1f} MiB" if _is_bytes(k) else f"{k} {v:g}" for k, v in sample.items())
    print(", ".join(shown), file=sys.stderr, flush=True)


def _is_bytes(name: str) -> bool:
    return name.endswith(("rss", "bytes"))


# -- the verdict ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One thing that was watched, behind the warm-up. `slope` is per hour."""

    name: str
    first: float
    last: float
    most: float
    slope: float

    @property
    def check(self) -> Check:
        bound = GROWTH * self.first + SERIES[self.name]
        return at_most(f"{self.name}, median of the last quarter", self.last, bound)

    def __str__(self) -> str:
        numbers = {"first": self.first, "last": self.last, "most": self.most, "slope/h": self.slope}
        scale = MIB if _is_bytes(self.name) else 1
        shown = "  ".join(f"{k} {v / scale:10.2f}" for k, v in numbers.items())
        return f"{self.name:16} {shown}{'  MiB' if scale > 1 else ''}"


def series(name: str, samples: Sequence[Sample]) -> Series:
    """First and last are medians of the first and last quarter."""
    end = samples[-1]["t"]
    kept = [s for s in samples if s["t"] >= max(WARM_UP * end, min(WARM_UP_S, end / 2))]
    values, quarter = [s[name] for s in kept], max(1, len(kept) // 4)
    hours = [s["t"] / 3600 for s in kept]
    return Series(
        name,
        first=median(values[:quarter]),
        last=median(values[-quarter:]),
        most=max(values),
        slope=_slope(hours, values),
    )


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the line with the least squares."""
    x, y = fmean(xs), fmean(ys)
    spread = sum((a - x) ** 2 for a in xs)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / spread if spread else 0.0


def _report(
    options: argparse.Namespace,
    samples: list[Sample],
    counts: Counter[str],
    wrong: list[str],
    restarts: int,
) -> int:
    if not samples:
        raise BenchError("there is not a single sample")
    found = [series(name, samples) for name in SERIES]
    checks = [
        *(s.check for s in found),
        at_most("most cells used", max(s["cells_used"] for s in samples), CACHE_TOKENS),
        at_most("most snapshot bytes", max(s["snapshot_bytes"] for s in samples), SNAPSHOT_BYTES),
        at_most("requests that ended in anything but an answer", len(wrong), 0),
        at_least("answers asked for", counts["turn"], 1),
    ]
    if not options.kill_every:
        checks.append(at_most("restarts of the model process", restarts, 0))
    for line in [*map(str, found), *map(str, checks), *wrong[:20]]:
        print(line)
    print(f"{options.seconds:g} s, {len(samples)} samples, {restarts} restarts; {dict(counts)}")
    _write(options.results, found, checks, counts, wrong, samples)
    return 0 if all(check.holds for check in checks) else 1


def _write(
    path: Path,
    found: Sequence[Series],
    checks: Sequence[Check],
    counts: Counter[str],
    wrong: Sequence[str],
    samples: Sequence[Sample],
) -> None:
    result = {
        "checks": [c.to_json() for c in checks],
        "series": {s.name: [s.first, s.last, s.most, s.slope] for s in found},
        "counts": dict(counts),
        "wrong": list(wrong),
        "samples": list(samples),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
