"""A real proxy in a process of its own, on a real socket, for the tests here."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from proxy import trace
from proxy.app import DATABASE

Event = dict[str, Any]

ROOT = Path(__file__).parent.parent.parent
START_S = 120.0
IDLE_S = 120.0
STOP_S = 60.0
STORED_S = 60.0

GREETING = re.compile(rb"OPENAI_REVERSE_PROXY=(http://127\.0\.0\.1:\d+)/v1")
"""What a proxy says once it listens: on a port that the system chose and nobody else has."""


@dataclass(slots=True)
class Proxy:
    """A running `chatfold serve`. `kill` is kill -9 of the proxy and all its children."""

    process: subprocess.Popen[bytes]
    url: str
    data: Path
    trace_path: Path
    log_path: Path
    key: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        options = {"headers": self.headers} | kwargs
        return httpx.get(self.url + path, timeout=60, trust_env=False, **options)

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        """`body` is sent as JSON, or as it is when it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        options = {"headers": self.headers} | kwargs
        return httpx.post(self.url + path, content=data, timeout=120, trust_env=False, **options)

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """One answer, not streamed; fails the test unless it is a 200."""
        response = self.post("/v1/chat/completions", {"messages": messages, **options})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/api/status").json()
        return found

    def wait(self, what: str, done: Any) -> dict[str, Any]:
        """The first status for which `done(status)` holds. Bounded."""
        end = time.monotonic() + IDLE_S
        while time.monotonic() < end:
            status = self.status()
            if done(status):
                return status
            time.sleep(0.02)
        raise AssertionError(f"never {what}: {self.status()}")

    def wait_idle(self) -> dict[str, Any]:
        return self.wait("idle", idle)

    def events(self) -> list[Event]:
        """What happened so far, in the order of the trace."""
        return trace.read(self.trace_path)

    def wait_for_event(
        self, what: str, wanted: Callable[[Event], bool], *, since: int = 0
    ) -> Event:
        """The first event of the trace's events[since:] that is `wanted`. Bounded."""
        end = time.monotonic() + IDLE_S
        while time.monotonic() < end:
            for event in self.events()[since:]:
                if wanted(event):
                    return event
            time.sleep(0.005)
        raise AssertionError(f"never {what}: {self.events()[since:]}")

    def stored(self) -> list[tuple[str, str]]:
        """(role, text) of every message in the store, in the order they were stored."""
        with closing(sqlite3.connect(f"file:{self.data / DATABASE}?mode=ro", uri=True)) as db:
            return db.execute("SELECT role, text FROM messages ORDER BY id").fetchall()

    def wait_stored(self, role: str, text: str) -> str:
        """The first stored message of this role whose text begins so. Bounded."""
        end = time.monotonic() + STORED_S
        while time.monotonic() < end:
            for its_role, its_text in self.stored():
                if its_role == role and its_text.startswith(text):
                    return its_text
            time.sleep(0.01)
        raise AssertionError(f"never stored: {role} {text!r}")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(STOP_S)

    def stop(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the proxy did not stop:\n{self.log_path.read_text()}") from None


def idle(status: dict[str, Any]) -> bool:
    """No background work waits or runs, and no request either."""
    engine = status["engine"]
    return (
        status["background"] == {"running": 0, "pending": 0}
        and not any(engine["running"].values())
        and not any(engine["waiting"].values())
    )


@contextmanager
def serving(
    tmp_path: Path, *arguments: str, key: str = "", ready: bool = True, **environ: str
) -> Iterator[Proxy]:
    """Starts the proxy on `tmp_path`/data and waits until the model is loaded, or until it listens
    where no model will be.

    `key` is the API key that the test uses from then on, where the proxy asks for one.
    """
    events, log = tmp_path / "trace.jsonl", tmp_path / "proxy.log"
    with log.open("ab") as stderr:
        said = stderr.tell()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "proxy", "serve", "--port", "0"),
                *("--data", str(tmp_path / "data"), *arguments),
            ],
            cwd=ROOT,
            env=_environment(events) | environ,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            start_new_session=True,
        )
    proxy = Proxy(process, "", tmp_path / "data", events, log, key)
    try:
        proxy.url = _wait_for_url(proxy, said)
        _wait_for(proxy, "/readyz" if ready else "/healthz")
        yield proxy
    finally:
        if process.poll() is None:
            assert proxy.stop() == 0, log.read_text()


def _environment(trace: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CHATFOLD_")}
    return kept | {
        "CHATFOLD_TRACE": str(trace),
        "CHATFOLD_CHECK_INTEGRITY": "1",
        # Two that wait for each other's share of each token are 20 times slower than one as soon
        # as anything else runs on two cores.
        "CHATFOLD_ENGINE_THREADS": "1",
    }


def _wait_for_url(proxy: Proxy, since: int) -> str:
    """The URL in the log, behind its first `since` bytes."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if found := GREETING.search(proxy.log_path.read_bytes(), since):
            return found[1].decode()
        assert proxy.process.poll() is None, proxy.log_path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"never listening:\n{proxy.log_path.read_text()}")


def _wait_for(proxy: Proxy, path: str) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert proxy.process.poll() is None, proxy.log_path.read_text()
        try:
            if proxy.get(path).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"not ready:\n{proxy.log_path.read_text()}")
