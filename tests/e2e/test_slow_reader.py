"""A client that does not read: over real sockets, beside clients that do."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .serving import Event, Proxy, serving

LONG_NAME = "m" * 4000
"""Each chunk of an answer repeats the model's name: so buffers are full after a few."""

SMALL_SEGMENT_BYTES = 536
"""Keeps the kernel's buffers for this connection small, on both sides."""

BODY: dict[str, Any] = {
    "model": LONG_NAME,
    "messages": [{"role": "user", "content": "Tell me of whales."}],
    "stream": True,
    "max_tokens": 380,
    "logit_bias": {"2": -100},
}
"""More tokens than fit into all the buffers between model and client."""


@contextmanager
def not_reading(proxy: Proxy, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A client that has sent its whole request."""
    data = json.dumps(body).encode()
    host, _, port = proxy.url.removeprefix("http://").partition(":")
    with socket.socket() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_SEGMENT_BYTES)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(100)
        client.connect((host, int(port)))
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n" % len(data) + data
        )
        yield client


def payloads(client: socket.socket) -> list[str]:
    """Reads to the end."""
    received = b"".join(iter(lambda: client.recv(1 << 16), b""))
    lines = received.decode().replace("\r\n", "\n").splitlines()
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def named(name: str, request: int | None = None) -> Any:
    return lambda e: e["event"] == name and (request is None or e.get("request") == request)


def index(events: list[Event], name: str, request: int) -> int:
    """Where it was last so: what the sockets swallow may let a slow reader catch up once before."""
    return max(i for i, e in enumerate(events) if named(name, request)(e))


def test_one_that_never_reads_stops_neither_of_two_that_do(tmp_path: Path) -> None:
    with serving(tmp_path, "--n-ctx", "1024") as proxy:
        with not_reading(proxy, BODY) as client:
            slow = proxy.wait_for_event("held back", named("request_held_back"))["request"]
            since = len(proxy.events())
            readers = [
                threading.Thread(
                    target=proxy.chat,
                    args=([{"role": "user", "content": text}],),
                    kwargs={"max_tokens": 5},
                )
                for text in ("How are you?", "And where?")
            ]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join(100)
            done = [e["request"] for e in proxy.events()[since:] if named("request_done")(e)]
            assert len(set(done)) >= 2
            assert slow not in done
            frames = payloads(client)
        events = proxy.events()
        caught_up = index(events, "request_caught_up", slow)
        assert all(index(events, "request_done", r) < caught_up for r in done[:2])
        assert frames[-1] == "[DONE]"
        chunks = [json.loads(frame) for frame in frames[:-1]]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
        assert proxy.wait_stored("assistant", text[:200]) == text


def test_one_that_reads_nothing_for_too_long_is_let_go_of_and_the_engine_is_free(
    tmp_path: Path,
) -> None:
    with serving(tmp_path, "--n-ctx", "1024", CHATFOLD_TIMEOUTS_READER_S="0.5") as proxy:
        proxy.chat([{"role": "user", "content": "Hello"}], max_tokens=1)
        before = sockets(proxy)
        with not_reading(proxy, BODY):
            gone = proxy.wait_for_event("freed", named("request_cancelled"))
            proxy.wait("the connection closed", lambda status: sockets(proxy) <= before)
        assert not any(named("request_done", gone["request"])(e) for e in proxy.events())
        proxy.wait_idle()
        proxy.chat([{"role": "user", "content": "Hello again"}], max_tokens=1)


def sockets(proxy: Proxy) -> int:
    folder = Path(f"/proc/{proxy.process.pid}/fd")
    return sum("socket" in os.readlink(fd) for fd in folder.iterdir() if fd.is_symlink())
