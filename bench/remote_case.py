"""The original user's case: two chats side by side with their titles, on one small machine.

`python -m bench.remote_case --systems bare,fold-bare` runs those; each adds its figures to the
results file, so that a long series can be made in parts. Between two turns there is the gap in
which a person reads and types: chatfold has `--gap-s` for its background work, and not longer; the
others do nothing in it, so they are not kept waiting.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from bench import command
from bench.bounds import Check, at_least, at_most
from bench.chats import Chat, UserTokens
from bench.locomo import CHAT, user_turns
from bench.servers import ROOT, Bare, BenchError, Chatfold, LlamaServer, Server

CACHE_BYTES = 4 << 30
ANSWER_TOKENS = 16
TITLE = (
    "Provide a concise, 5-word-or-less title for the conversation, using title case conventions. "
    "Only return the title itself.\n\nConversation:\nUser: {user}\nAI: {answer}"
)
SHARE = 1 / 3
GROWTH = 1.25
"""Flat: a new token costs more the more stands before it, for every server. llama-server bare
evaluates the new tokens and no others: no more growth than its own, and this for noise."""
SLACK = 1.05
"""Two runs of one system differ by this much."""

SYSTEMS = {
    "bare": "llama_cpp.server",
    "bare-cache": "llama_cpp.server --cache",
    "fold-bare": "chatfold before llama_cpp.server",
    "fold-cache": "chatfold before llama_cpp.server --cache",
    "llama-server": "llama-server",
    "fold-llama-server": "chatfold before llama-server",
    "embedded": "chatfold, embedded",
}


@dataclass(frozen=True)
class Run:
    """Times to first token of one system, in order, the two chats in turn; seconds. None where no
    answer came."""

    system: str
    first_s: list[float | None]
    new_tokens: list[int]

    @property
    def known_s(self) -> list[float]:
        return [s for s in self.first_s if s is not None]

    @property
    def sum_s(self) -> float:
        return sum(self.known_s)

    @property
    def growth(self) -> float:
        """Seconds for a new token: the median of the last third of the turns against the first's,
        behind the first turn of each chat."""
        pairs = zip(self.first_s, self.new_tokens, strict=True)
        each = [s / n for s, n in pairs if s is not None]
        third = len(each) // 3
        return median(each[-third:]) / median(each[2:third]) if third > 2 else 0.0

    def against(self, other: Run) -> float:
        """Ratio of the sums over the turns that both answered."""
        both = [(a, b) for a, b in zip(self.first_s, other.first_s, strict=False) if a and b]
        return sum(a for a, _ in both) / max(1e-9, sum(b for _, b in both))

    def __str__(self) -> str:
        middle = median(self.known_s) if self.known_s else 0.0
        return (
            f"{SYSTEMS[self.system]:42} {len(self.known_s)}/{len(self.first_s)} answered, sum "
            f"{self.sum_s:6.1f} s, p50 {middle:.2f} s, longest {max(self.known_s, default=0):.2f} s"
            f", a new token's time growing {self.growth:.2f}-fold"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    return command.run(lambda: _measure(options), with_chat=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.remote_case", description=__doc__)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="some of the names, by commas")
    parser.add_argument("--turns", type=int, default=24, help="of each chat")
    parser.add_argument("--n-ctx", type=int, default=4096)
    parser.add_argument("--gap-s", type=float, default=15.0)
    parser.add_argument("--anew", action="store_true", help="forget the figures of earlier runs")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/remote_case.json")
    return parser.parse_args(arguments)


def _measure(options: argparse.Namespace) -> int:
    earlier: dict[str, Any] = {}
    if options.results.exists() and not options.anew:
        earlier = json.loads(options.results.read_text())["systems"]
    runs = {
        name: Run(name, found["first_s"], found["new_tokens"]) for name, found in earlier.items()
    }
    for name in options.systems.split(","):
        if name not in SYSTEMS:
            raise BenchError(f"unknown system {name!r}: one of {', '.join(SYSTEMS)}")
        with tempfile.TemporaryDirectory(prefix="chatfold-bench-") as directory:
            runs[name] = _run(name, options, Path(directory))
        print(runs[name], flush=True)
    checks = _checks(runs)
    print("\n".join(map(str, checks)))
    found = {
        "gap_s": options.gap_s,
        "systems": {name: run.__dict__ | {"sum_s": run.sum_s} for name, run in runs.items()},
        "checks": [check.to_json() for check in checks],
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(check.holds for check in checks) else 1


def _checks(runs: dict[str, Run]) -> list[Check]:
    """As far as what they compare was run."""
    checks = []
    for name, run in runs.items():
        if name.startswith(("fold", "embedded")):
            answered, wanted = len(run.known_s), len(run.first_s)
            checks.append(at_least(f"{SYSTEMS[name]}: turns answered", answered, wanted))
            if server := runs.get("llama-server"):
                claim = f"{SYSTEMS[name]}: growth of a new token's time / that of llama-server bare"
                checks.append(at_most(claim, run.growth / server.growth, GROWTH))
    ours = [name for name in runs if name.startswith(("fold", "embedded"))]
    for theirs, most in (("bare", SHARE), ("bare-cache", SLACK), ("llama-server", SLACK)):
        for name in ours if theirs in runs else ():
            if (name, theirs) == ("fold-cache", "llama-server"):
                continue  # That server's own cache copies a state for each request.
            claim = f"{SYSTEMS[name]} / {SYSTEMS[theirs]}: times to first token, where both answer"
            checks.append(at_most(claim, runs[name].against(runs[theirs]), most))
    return checks


# -- one system ----------------------------------------------------------------------------------


def _run(name: str, options: argparse.Namespace, directory: Path) -> Run:
    lines, tokens = user_turns(CHAT, 2 * options.turns), UserTokens()
    halves = lines[: options.turns], lines[options.turns :]
    with _system(name, options.n_ctx, directory) as (client, rest):
        chats = Chat(client, ANSWER_TOKENS), Chat(client, ANSWER_TOKENS)
        first_s: list[float | None] = []
        new_tokens: list[int] = []
        for number in range(options.turns):
            for chat, texts in zip(chats, halves, strict=True):
                text = texts[number]
                new_tokens.append(tokens.count(text))
                turn = chat.say(text, new_tokens=new_tokens[-1])
                first_s.append(turn.answer.first_content_s if turn.answer.ok else None)
                if number == 0:
                    ask_title(client, text, turn.answer.text)
                rest(options.gap_s)
    return Run(name, first_s, new_tokens)


Rest = Callable[[float], None]


@contextmanager
def _system(name: str, window_tokens: int, directory: Path) -> Iterator[tuple[httpx.Client, Rest]]:
    """Its client, and what is done between two turns."""
    with ExitStack() as stack:
        server: Server | None = None
        if name.endswith(("bare", "bare-cache", "fold-cache")):
            cache = CACHE_BYTES if name.endswith("cache") else 0
            server = stack.enter_context(
                Bare(directory, window_tokens=window_tokens, cache_bytes=cache)
            )
        elif name.endswith("llama-server"):
            server = stack.enter_context(LlamaServer(directory, window_tokens=window_tokens))
        if server and not name.startswith("fold"):
            yield server.client, lambda gap_s: None
            return
        chatfold = Chatfold(
            directory / "fold",
            window_tokens=0 if server else window_tokens,
            upstream=server.url if server else "",
        )
        stack.enter_context(chatfold)
        yield chatfold.client, lambda gap_s: _rest(chatfold, gap_s)


def _rest(chatfold: Chatfold, gap_s: float) -> None:
    """The gap, or the part of it in which there is something to do."""
    until = time.monotonic() + gap_s
    while time.monotonic() < until and not chatfold.is_idle():
        time.sleep(0.1)


def ask_title(client: httpx.Client, user: str, answer: str) -> None:
    """As LibreChat asks for one, behind the first answer; bounded, as small models do not end."""
    content = TITLE.format(user=user, answer=answer)
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0.2,
        "stream": False,
    }
    client.post("/v1/chat/completions", json=body)


if __name__ == "__main__":
    sys.exit(main())
