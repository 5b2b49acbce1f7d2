"""A chat of 60 turns with title requests, through chatfold, before real servers: how many tokens
the server evaluates for each new one, in its own numbers.

`python -m bench.remote_flat --servers llama_cpp,llama-server`. llama_cpp.server tells what it
evaluated in its log, llama-server in the usage of each answer.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import bounds, command
from bench.bounds import Check, at_least, at_most
from bench.chats import Chat, Turn, UserTokens
from bench.locomo import CHAT, user_turns
from bench.remote_case import ask_title
from bench.servers import ROOT, Bare, BenchError, Chatfold, LlamaServer

AMPLIFICATION = 1.10
TITLE_EVERY = 10
SERVERS = ("llama_cpp", "llama-server")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    return command.run(lambda: _measure(options), with_chat=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.remote_flat", description=__doc__)
    parser.add_argument("--servers", default=",".join(SERVERS))
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--n-ctx", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/remote_flat.json")
    return parser.parse_args(arguments)


def _measure(options: argparse.Namespace) -> int:
    checks: list[Check] = []
    found: dict[str, Any] = {}
    for name in options.servers.split(","):
        with tempfile.TemporaryDirectory(prefix="chatfold-bench-") as directory:
            turns, summaries = _run(name, options, Path(directory))
        checks += _checks(name, turns, summaries, options)
        found[name] = {"summaries": summaries, "turns": [turn.to_json() for turn in turns]}
    print("\n".join(map(str, checks)))
    found["checks"] = [check.to_json() for check in checks]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(check.holds for check in checks) else 1


def _checks(
    name: str, turns: list[Turn], summaries: int, options: argparse.Namespace
) -> list[Check]:
    answered = sum(turn.answer.ok for turn in turns)
    return [
        at_least(f"{name}: turns answered", answered, options.turns),
        at_least(f"{name}: turns of which the server told", _told(turns), options.turns),
        at_most(f"{name}: evaluated / new tokens, in all", _ratio(turns), AMPLIFICATION),
        at_least(f"{name}: summaries in use at the end", summaries, min(1, options.turns // 40)),
        at_most(f"{name}: prompt + answer, tokens", bounds.most_tokens(turns), options.n_ctx),
    ]


def _told(turns: Sequence[Turn]) -> int:
    return sum(turn.evaluated is not None for turn in turns)


def _ratio(turns: Sequence[Turn]) -> float:
    """Over all turns behind the first, which brings the system prompt of the template with it."""
    known = [t for t in turns[1:] if t.evaluated is not None]
    return sum(t.evaluated or 0 for t in known) / max(1, sum(t.new_tokens for t in known))


def _run(name: str, options: argparse.Namespace, directory: Path) -> tuple[list[Turn], int]:
    if name not in SERVERS:
        raise BenchError(f"unknown server {name!r}: one of {', '.join(SERVERS)}")
    lines, tokens = user_turns(CHAT, options.turns), UserTokens()
    window = options.n_ctx
    server = (
        Bare(directory, window_tokens=window)
        if name == "llama_cpp"
        else LlamaServer(directory, window_tokens=window)
    )
    with server, Chatfold(directory / "fold", upstream=server.url) as chatfold:
        chat = Chat(chatfold.client, options.max_tokens)
        for text in lines:
            if isinstance(server, Bare):
                server.skip_log()
            turn = chat.say(text, new_tokens=tokens.count(text))
            if isinstance(server, Bare):
                turn.evaluated = server.evaluated_first()
            if turn.number % TITLE_EVERY == 1:
                ask_title(chatfold.client, text, turn.answer.text)
            chatfold.wait_until_idle()
            if turn.number % 10 == 0:
                print(f"{name} {turn.number}/{len(lines)} {_ratio(chat.turns):.3f}", flush=True)
    return chat.turns, chat.turns[-1].context("summaries") or 0


if __name__ == "__main__":
    sys.exit(main())
