"""LibreChat's own client, @librechat/agents, in a Node.js process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from bench.servers import ROOT

SOURCE = ROOT / "tests" / "e2e" / "node_librechat"
INSTALLED = ROOT / ".node-librechat"
STOP_S = 60

Said = dict[str, Any]
"""What came of a request, as `client.mjs` writes it."""


class Served(Protocol):
    @property
    def url(self) -> str: ...


class Speaks(Protocol):
    """A client of one of LibreChat's versions."""

    def turn(
        self,
        messages: list[list[str]],
        *,
        stop_when: Callable[[], object] | None = None,
        **ask: Any,
    ) -> Said: ...


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

    def turn(
        self,
        messages: list[list[str]],
        *,
        stop_when: Callable[[], object] | None = None,
        **ask: Any,
    ) -> Said:
        """`stop_when` returns when the user presses Stop: the client's AbortController aborts."""
        assert self.process.stdout is not None
        self._write({"baseURL": self.base, "messages": messages, **ask})
        if stop_when:
            stop_when()
            self._write({"stop_now": True})
        answer: Said = json.loads(self.process.stdout.readline())
        return answer

    def _write(self, line: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()


@contextmanager
def librechat(served: Served, path: str = "/v1") -> Iterator[Client]:
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
        yield Client(process, served.url + path)
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
    """A chat as LibreChat keeps it: what it would send with the next message. Each is its role, its
    text, and the thoughts before an answer that had some."""

    client: Speaks
    options: dict[str, Any]
    history: list[list[str]] = field(default_factory=list)
    summary: str = ""

    def say(self, text: str, **more: Any) -> Said:
        """One turn, kept when it was answered."""
        return self._keep([*self.history, ["user", text]], **more)

    @property
    def can_go_back(self) -> bool:
        """Whether the last question is still there: with LibreChat's own summary it may not be."""
        return [role for role, *_ in self.history[-2:]] == ["user", "assistant"]

    def regenerate(self, **more: Any) -> Said:
        """The last question anew; the chat goes on from the new answer."""
        return self._keep(self.history[:-1], **more)

    def edit(self, text: str, **more: Any) -> Said:
        """Another question in the place of the last."""
        return self._keep([*self.history[:-2], ["user", text]], **more)

    def go_on(self, **more: Any) -> Said:
        """Lets the last answer be continued."""
        answer = self.ask(self.history, **more)
        self.history[-1][1] += answer["text"]
        return answer

    def _keep(self, asked: list[list[str]], **more: Any) -> Said:
        answer = self.ask(asked, **more)
        if answer.get("summary"):
            # What stood beside the summary is gone with the next request, the question too.
            self.summary = answer["summary"]
            self.history = [_assistant(answer)] if answer["text"] else []
        elif answer["text"]:
            self.history = [*asked, _assistant(answer)]
        elif answer["stopped"]:
            # The question stays; the answer, which is empty, is left out.
            self.history = asked
        return answer

    def ask(self, messages: list[list[str]], **more: Any) -> Said:
        """One request that changes nothing here."""
        options = self.options | more | ({"summary": self.summary} if self.summary else {})
        return self.client.turn(messages, **options)


def _assistant(answer: Said) -> list[str]:
    thoughts = answer.get("reasoning")
    return ["assistant", answer["text"], *([thoughts] if thoughts else [])]


def evaluated(answer: Said) -> int:
    """Prompt tokens that were not in the cache, as LibreChat is told."""
    usage = answer["usage"]
    n: int = usage["input_tokens"] - usage["input_token_details"].get("cache_read", 0)
    return n
