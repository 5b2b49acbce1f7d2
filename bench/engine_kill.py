"""kill -9 of the model process under load: `make bench-engine-kill`; exits 1 if a claim is missed.

Four chats stream, each of its own owner, over fewer sequences than chats, so that one waits in line
and what must leave memory is written to disk; a policy with a small window keeps the keeper busy
between them. Again and again the model process is killed at a random instant: while answers run, or
while background work does. Afterwards every snapshot is read and checked.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench import command
from bench.bounds import Check, at_least, at_most
from bench.client import Messages
from bench.load import ENDLESS, TIMEOUT, Ending, sentence, stream
from bench.servers import ROOT, BenchError, Chatfold, wait_until
from proxy.engines.embedded import snapshots

CHATS = 4
WINDOW_TOKENS = 1024
WITHIN_S = 0.4
"""A kill comes at a random instant of so many seconds behind the first word of an answer: some of
the answers have ended by then, some run, some wait."""
BACKGROUND_EVERY = 4
"""Every so many-th kill is left for the keeper's work."""
BACKGROUND_S = 3.0
MAX_TOKENS = 24
LONGEST_CHAT = 12
"""Messages, then the chat begins anew."""
HEALTH_EVERY_S = 0.1

POLICY = """\
name = "tight"
high = 240
low = 100
block = 200
summaries = 200
summary = 24
answer = 64
verbatim_turns = 1
"""

ENVIRON = {
    "CHATFOLD_ENGINE_SEQUENCES": "3",
    "CHATFOLD_ENGINE_CACHE_TOKENS": "1024",
    # Two that wait for each other's share of each token are 20 times slower than one as soon as
    # anything else runs on two cores.
    "CHATFOLD_ENGINE_THREADS": "1",
    "CHATFOLD_CHECK_INTEGRITY": "1",
}


@dataclass
class Found:
    kills: int = 0
    kills_under_background: int = 0
    answered: int = 0
    told: int = 0
    told_after_text: int = 0
    wrong: list[str] = field(default_factory=list)
    """Endings that are neither an answer nor exactly one error."""
    next_failed: list[str] = field(default_factory=list)
    """Requests behind a kill that were not answered."""
    proxy_down: int = 0
    """Health checks that were not answered."""
    restarts: int = 0
    snapshots: int = 0
    damaged: int = 0
    seconds: float = 0.0

    def checks(self) -> list[Check]:
        return [
            at_least("kills", self.kills, 1),
            at_least("restarts seen", self.restarts, self.kills),
            at_most("times that the proxy did not answer", self.proxy_down, 0),
            at_least("running requests that ended in one error", self.told, 1),
            at_least("of them with some text before it", self.told_after_text, 1),
            at_most("requests that ended in anything else", len(self.wrong), 0),
            at_most("next requests that failed", len(self.next_failed), 0),
            at_least("snapshots on disk", self.snapshots, 1),
            at_most("of them damaged", self.damaged, 0),
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="chatfold-bench-") as directory:
        work = Path(options.work or directory)
        return command.run(lambda: _measure(options, work))


def _measure(options: argparse.Namespace, directory: Path) -> int:
    found = measure(options.kills, directory, say=_say)
    checks = found.checks()
    for line in [*map(str, checks), *found.wrong, *found.next_failed]:
        print(line)
    print(f"{found.kills} kills in {found.seconds:.0f} s, {found.answered} answers beside them")
    if options.results:
        text = json.dumps(asdict(found) | {"checks": [c.to_json() for c in checks]}, indent=1)
        options.results.write_text(text + "\n")
    return 0 if all(check.holds for check in checks) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.engine_kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--work", type=Path, help="keep data, logs and the trace there")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/engine_kill.json")
    return parser.parse_args(arguments)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(kills: int, directory: Path, *, say: Any = lambda line: None) -> Found:
    """Raises BenchError when the proxy does not even start."""
    directory.mkdir(parents=True, exist_ok=True)
    policy = directory / "tight.toml"
    policy.write_text(POLICY)
    proxy = Chatfold(
        directory,
        window_tokens=WINDOW_TOKENS,
        arguments=("--policy", str(policy)),
        environ=ENVIRON,
    )
    began = time.monotonic()
    with proxy, ExitStack() as stack, Health(proxy) as health:
        pool = stack.enter_context(ThreadPoolExecutor(CHATS))
        run = Run(proxy, pool)
        stack.callback(run.close)
        for n in range(kills):
            run.round(background=n % BACKGROUND_EVERY == BACKGROUND_EVERY - 1)
            say(f"kill {n + 1}/{kills}: {run.found.told} told, {run.found.answered} answered")
        # What is evicted meanwhile would not be there any more when it is copied.
        proxy.wait_until_idle()
        found = run.found
        found.restarts = proxy.status()["engine"]["restarts"]
        # While it still runs: at its end it would write what is in memory, and hide what was left.
        found.snapshots, found.damaged = _read_all(directory / "data/snapshots", directory / "copy")
    found.proxy_down = health.missed
    found.seconds = time.monotonic() - began
    return found


class Health:
    """Asks the proxy whether it is there, all the time."""

    def __init__(self, proxy: Chatfold) -> None:
        self._proxy, self._over = proxy, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.missed = 0

    def __enter__(self) -> Health:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(HEALTH_EVERY_S):
            try:
                self._proxy.client.get("/healthz").raise_for_status()
            except httpx.HTTPError:
                self.missed += 1


class Chat:
    """One owner's chat: it grows, and begins anew before it is long."""

    def __init__(self, proxy: Chatfold, name: str, *, seed: int) -> None:
        self._name, self._chance = name, random.Random(seed)
        self._client = httpx.Client(base_url=proxy.client.base_url, timeout=TIMEOUT)
        self._messages: Messages = []
        self.begun = threading.Event()

    def close(self) -> None:
        self._client.close()

    def turn(self) -> Ending:
        if len(self._messages) >= LONGEST_CHAT:
            self._messages = []
        question = {"role": "user", "content": sentence(self._chance, 30)}
        ending = stream(
            self._client,
            [*self._messages, question],
            user=self._name,
            max_tokens=MAX_TOKENS,
            on_delta=self._on_delta,
            **ENDLESS,
        )
        if ending.answered:
            self._messages += [question, {"role": "assistant", "content": ending.text}]
        return ending

    def _on_delta(self, ending: Ending) -> bool:
        self.begun.set()
        return True


class Run:
    """Rounds of one kill each. `found` is what has been seen so far."""

    def __init__(self, proxy: Chatfold, pool: ThreadPoolExecutor) -> None:
        self._proxy, self._pool, self._chance = proxy, pool, random.Random(5)
        self._chats = [Chat(proxy, f"owner {i}", seed=i) for i in range(CHATS)]
        self.found = Found()

    def close(self) -> None:
        for chat in self._chats:
            chat.close()

    def round(self, *, background: bool) -> None:
        self._turns()
        if background and self._background():
            self.found.kills_under_background += 1
            self._kill()
        else:
            for chat in self._chats:
                chat.begun.clear()
            answers = [self._pool.submit(chat.turn) for chat in self._chats]
            wait_until(lambda: any(c.begun.is_set() for c in self._chats), 60, "a first word")
            time.sleep(self._chance.uniform(0, WITHIN_S))
            self._kill()
            for answer in answers:
                self._book(answer)
        ending = self._chats[0].turn()
        if not ending.answered:
            self.found.next_failed.append(str(ending))

    def _turns(self) -> None:
        """One turn of each chat, undisturbed: they grow by that, and the keeper gets work."""
        for answer in [self._pool.submit(chat.turn) for chat in self._chats]:
            ending = answer.result()
            if not ending.answered:
                self.found.next_failed.append(str(ending))

    def _background(self) -> bool:
        """Whether the keeper came to work within a while."""
        with suppress(BenchError):
            wait_until(self._background_runs, BACKGROUND_S, "background work")
            return True
        return False

    def _background_runs(self) -> bool:
        return bool(self._proxy.status()["engine"]["running"]["background"])

    def _kill(self) -> None:
        restarts = self._proxy.status()["engine"]["restarts"]
        os.kill(self._pid(), signal.SIGKILL)
        self.found.kills += 1
        wait_until(
            lambda: self._proxy.status()["engine"]["restarts"] > restarts, 60, "the process to go"
        )

    def _pid(self) -> int:
        wait_until(lambda: bool(self._proxy.status()["engine"]["pid"]), 60, "a model process")
        return int(self._proxy.status()["engine"]["pid"])

    def _book(self, answer: Future[Ending]) -> None:
        ending = answer.result()
        self.found.answered += ending.answered
        self.found.told += ending.told
        self.found.told_after_text += ending.told and bool(ending.deltas)
        if not (ending.answered or ending.told):
            self.found.wrong.append(str(ending))


def _read_all(folder: Path, copy: Path) -> tuple[int, int]:
    """How many snapshots there are, and how many of them do not load. Only whole ones have the
    name: what a kill cut short has another, and is gone with the next start.
    """
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.part"))
    headers = [snapshots._read_header(path)[0] for path in copy.glob("*/*")]
    return len(headers), sum(header is None or not _loads(copy, header) for header in headers)


def _loads(folder: Path, header: snapshots.Header) -> bool:
    shelf = snapshots.Snapshots(folder, fingerprint=header.fingerprint, budget_bytes=1 << 40)
    snapshot, n = shelf.match(header.owner, header.tokens)
    return snapshot is not None and n == len(header.tokens) and shelf.load(snapshot) is not None


if __name__ == "__main__":
    raise SystemExit(main())
