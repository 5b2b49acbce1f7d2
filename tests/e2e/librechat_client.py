"""LibreChat's own client, @librechat/agents, in a Node.js process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.servers import Server

from .serving import ROOT, Proxy

SOURCE = Path(__file__).parent / "node_librechat"
INSTALLED = ROOT / ".node-librechat"
STOP_S = 10


def missing() -> str:
    """Why the client cannot run here; "" when it can."""
    if not shutil.which("node"):
        return "Node.js is not installed"
    if not (INSTALLED / "node_modules" / "@librechat" / "agents").is_dir():
        return "@librechat/agents is not installed: `make test` does it where there is npm (0.5 GB)"
    return ""


@dataclass(slots=True)
class Client:
    """Takes one turn at a time. `base` is what OPENAI_REVERSE_PROXY would hold."""

    process: subprocess.Popen[str]
    base: str

    def turn(self, messages: list[list[str]], **ask: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        ask = {"baseURL": self.base, "messages": messages, **ask}
        self.process.stdin.write(json.dumps(ask) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


@contextmanager
def librechat(proxy: Proxy | Server, path: str = "/v1") -> Iterator[Client]:
    shutil.copyfile(SOURCE / "client.mjs", INSTALLED / "client.mjs")
    process = subprocess.Popen(
        ["node", "client.mjs"],
        cwd=INSTALLED,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield Client(process, proxy.url + path)
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """The end of its input is the end of its work."""
    with process:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()


@dataclass(slots=True)
class Chat:
    """A chat as LibreChat keeps it: what it would send with the next message."""

    client: Client
    options: dict[str, Any]
    history: list[list[str]] = field(default_factory=list)
    summary: str = ""

    def say(self, text: str, **more: Any) -> dict[str, Any]:
        """One turn, kept when it was answered."""
        asked = [*self.history, ["user", text]]
        answer = self.ask(asked, **more)
        if answer.get("summary"):
            # What stood beside the summary is gone with the next request.
            self.summary, self.history = answer["summary"], [["assistant", answer["text"]]]
        elif answer["text"]:
            self.history = [*asked, ["assistant", answer["text"]]]
        return answer

    def ask(self, messages: list[list[str]], **more: Any) -> dict[str, Any]:
        """One request that changes nothing here."""
        options = self.options | more | ({"summary": self.summary} if self.summary else {})
        return self.client.turn(messages, **options)


def evaluated(answer: dict[str, Any]) -> int:
    """Prompt tokens that were not in the cache, as LibreChat is told."""
    usage = answer["usage"]
    n: int = usage["input_tokens"] - usage["input_token_details"].get("cache_read", 0)
    return n
