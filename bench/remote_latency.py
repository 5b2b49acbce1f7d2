"""What chatfold adds before a server that answers at once: `python -m bench.remote_latency`.

Requests go by turns straight to the stub and through chatfold, which runs in a process of its own,
for the many streams on one core; the difference is what is added. The history in a request is
known, but for its last turn, as in every chat that goes on: each request of 10 messages goes on a
chat of its own, the long chat grows by a turn with each. A first request, with a history that is
not known, is told apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from bench.bounds import Check, at_least, at_most
from bench.servers import HOST, ROOT, BenchError, Chatfold, Server

MESSAGE_CHARS = 300
FRAMES = 50
STREAMS, FRAMES_PER_S, STREAM_S = 200, 20, 5.0
SMALL, LARGE = 10, 2000

Messages = list[dict[str, str]]


class Stub(Server):
    """bench.stub as a process."""

    ready_path = "/v1/models"

    def __init__(self, directory: Path, *, window_tokens: int) -> None:
        env = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "bench.stub", "--window-tokens", str(window_tokens)]
        super().__init__(command, log=directory / "stub.log", env=env)


@dataclass(frozen=True)
class Times:
    """Milliseconds: straight to the server, and through chatfold."""

    direct: Sequence[float]
    through: Sequence[float]
    first: float = 0.0

    def added(self, share: float = 0.5) -> float:
        return _quantile(self.through, share) - _quantile(self.direct, share)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="chatfold-bench-") as directory:
            return _measure(options, Path(directory))
    except BenchError as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.remote_latency", description=__doc__)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--window-tokens", type=int, default=8192, help="the stub's")
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--stream-s", type=float, default=STREAM_S)
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/remote_latency.json")
    return parser.parse_args(arguments)


def _measure(options: argparse.Namespace, directory: Path) -> int:
    with (
        Stub(directory, window_tokens=options.window_tokens) as stub,
        Chatfold(directory / "fold", upstream=stub.url) as chatfold,
    ):
        small = _short_chats(stub, chatfold, options.requests)
        large = _long_chat(stub, chatfold, options.requests)
        frames = _frames(stub, chatfold, options.requests // 5)
        one_core(chatfold)
        direct = asyncio.run(_many(stub.url, options.streams, options.stream_s))
        before_s = cpu_s(chatfold.pid)
        many = asyncio.run(_many(chatfold.url, options.streams, options.stream_s))
        used_s = cpu_s(chatfold.pid) - before_s
    checks = _checks(small, large, frames, direct, many, options)
    checks.append(at_most("streams at a time: share of one core", used_s / options.stream_s, 1))
    for line in (_line("10 messages", small), _line("2,000 messages, 600 kB", large)):
        print(line)
    print(_line("a frame", frames))
    print(f"{options.streams} streams, frame by frame, ms: straight {direct}, through {many}")
    print("\n".join(map(str, checks)))
    found = {
        "checks": [check.to_json() for check in checks],
        "small": small.__dict__,
        "large": large.__dict__,
        "streams": {"direct": direct.__dict__, "through": many.__dict__},
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(check.holds for check in checks) else 1


def one_core(chatfold: Server) -> None:
    """chatfold gets the first core for itself as far as this goes; who measures takes the rest."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(chatfold.pid, cores[:1])
        os.sched_setaffinity(0, cores[1:])


def cpu_s(pid: int) -> float:
    """Processor time of the process so far, of all its threads; 0 where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _checks(
    small: Times, large: Times, frames: Times, direct: Many, many: Many, options: Any
) -> list[Check]:
    wanted = options.streams * FRAMES_PER_S * options.stream_s
    return [
        at_most("10 messages: added, p50, ms", small.added(), 3),
        at_most("2,000 messages: added, p50, ms", large.added(), 15),
        at_most("2,000 messages: added, p95, ms", large.added(0.95), 30),
        at_most("a frame: added, p50, ms", frames.added(), 1),
        at_least("streams at a time: frames that came, share", many.frames / wanted, 1.0),
        at_most("streams at a time: last frame late, ms", many.last_ms - direct.last_ms, 100),
    ]


# -- one request at a time -----------------------------------------------------------------------


def _short_chats(stub: Stub, chatfold: Chatfold, n: int) -> Times:
    """Milliseconds from sending SMALL messages to the first piece of text."""
    direct, through, first = [], [], []
    for i in range(n):
        system = _message("system", f"You are assistant number {i}.")
        history = [system, *_history(SMALL - 3)]
        took, answer = _until_text(chatfold.client, history)
        first.append(took)
        chatfold.wait_until_idle()
        history += [_message("assistant", answer), _message("user", "And then?")]
        direct.append(_until_text(stub.client, history)[0])
        through.append(_until_text(chatfold.client, history)[0])
        chatfold.wait_until_idle()
    return Times(direct, through, median(first))


def _long_chat(stub: Stub, chatfold: Chatfold, n: int) -> Times:
    """The same for LARGE messages and, by and by, 2 n more."""
    history = _history(LARGE - 1)
    direct, through = [], []
    first, answer = _until_text(chatfold.client, history)
    chatfold.wait_until_idle()
    for i in range(n):
        # The answer as it came: with any other, each turn would be a branch of its own.
        history += [_message("assistant", answer), _message("user", f"And then, number {i}?")]
        direct.append(_until_text(stub.client, history)[0])
        took, answer = _until_text(chatfold.client, history)
        through.append(took)
        chatfold.wait_until_idle()
    return Times(direct, through, first)


def _history(n: int) -> Messages:
    """Of the user and the assistant in turn."""
    roles = ("user", "assistant")
    return [_message(roles[i % 2], _text(i)) for i in range(n)]


def _text(i: int) -> str:
    words = f"Message {i}: the lighthouse keeper wrote down what the sea had brought that day. "
    return (words * (MESSAGE_CHARS // len(words) + 1))[:MESSAGE_CHARS]


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _body(messages: Messages, n_frames: int) -> bytes:
    body = {"model": "stub", "messages": messages, "max_tokens": n_frames, "stream": True}
    return json.dumps(body, separators=(",", ":")).encode()


def _until_text(client: httpx.Client, messages: Messages) -> tuple[float, str]:
    """Milliseconds, and the answer."""
    content = _body(messages, 1)
    sent, took, answer = time.monotonic(), 0.0, ""
    with client.stream("POST", "/v1/chat/completions", content=content) as response:
        for line in response.iter_lines():
            if text := _text_of(line):
                took, answer = took or time.monotonic() - sent, answer + text
    if not took:
        raise BenchError(f"no answer to {len(messages)} messages, status {response.status_code}")
    return took * 1000, answer


def _frames(stub: Stub, chatfold: Chatfold, n: int) -> Times:
    """Milliseconds from the server's writing a frame to its arrival."""
    history = _history(SMALL - 2)
    direct: list[float] = []
    through: list[float] = []
    for i in range(n):
        messages = [*history, _message("user", f"Number {i}, pace=0.004")]
        direct += _ages(stub.client, messages)
        through += _ages(chatfold.client, messages)
        chatfold.wait_until_idle()
    return Times(direct, through)


def _ages(client: httpx.Client, messages: Messages) -> list[float]:
    ages = []
    content = _body(messages, FRAMES)
    with client.stream("POST", "/v1/chat/completions", content=content) as response:
        for line in response.iter_lines():
            if at := _written_at(line):
                ages.append((time.monotonic() - at) * 1000)
    return ages


def _written_at(line: str) -> float | None:
    text = _text_of(line)
    return float(text) if text else None


def _text_of(line: str) -> str:
    if not line.startswith("data: {"):
        return ""
    choices = json.loads(line[6:]).get("choices")
    return choices[0]["delta"].get("content") or "" if choices else ""


# -- many streams at a time ----------------------------------------------------------------------


@dataclass(frozen=True)
class Many:
    """How many frames came, and how late: median, 95th percentile, and in the last second."""

    frames: int
    p50_ms: float
    p95_ms: float
    last_ms: float

    def __str__(self) -> str:
        return f"p50 {self.p50_ms:.1f} p95 {self.p95_ms:.1f} in the last second {self.last_ms:.1f}"


async def _many(url: str, n: int, seconds: float) -> Many:
    port = int(url.rpartition(":")[2])
    tasks = [_one_of_many(port, i, seconds) for i in range(n)]
    ages = await asyncio.gather(*tasks)
    every = [age for some in ages for age in some]
    last = [age for some in ages for age in some[-FRAMES_PER_S:]]
    return Many(len(every), median(every), _quantile(every, 0.95), median(last))


async def _one_of_many(port: int, number: int, seconds: float) -> list[float]:
    """A socket and no client library: two hundred of those would be what is measured."""
    pace = f"Stream {number}, pace={1 / FRAMES_PER_S:.3f}"
    body = _body([_message("user", pace)], round(FRAMES_PER_S * seconds))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(head.encode() + body)
    ages = []
    while (line := await reader.readline()) and line != b"data: [DONE]\n":
        if at := _stamp(line):
            ages.append((time.monotonic() - at) * 1000)
    writer.close()
    return ages


def _stamp(line: bytes) -> float | None:
    _, mark, rest = line.replace(b'": "', b'":"').partition(b'"content":"')
    digits = rest.partition(b" ")[0]
    return float(digits) if mark and digits[:1].isdigit() else None


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _line(what: str, times: Times) -> str:
    first = f"; the first time, its history unknown: {times.first:.1f}" if times.first else ""
    return (
        f"{what}, ms: straight p50 {_quantile(times.direct, 0.5):.2f} p95 "
        f"{_quantile(times.direct, 0.95):.2f}, through p50 {_quantile(times.through, 0.5):.2f} p95 "
        f"{_quantile(times.through, 0.95):.2f}{first}"
    )


if __name__ == "__main__":
    sys.exit(main())
