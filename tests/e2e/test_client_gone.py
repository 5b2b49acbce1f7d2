"""When the client leaves, the engine stops at once, and what was answered by then is kept.

Clients are raw sockets, so that nothing is sent or read that the test does not know of. What
happened is read from the trace of the model process: no clock is asked.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest

from .serving import Event, Proxy, idle

LONG_PROMPT_WORDS = 700
ABORT_NOW = struct.pack("ii", 1, 0)

Body = dict[str, Any]


def long_body(**options: Any) -> Body:
    """Takes seconds to evaluate; nothing of it is in the cache."""
    words = " ".join(f"{i}" for i in range(LONG_PROMPT_WORDS))
    content = f"{uuid4().hex} {words}"
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **options}


def talkative_body(**options: Any) -> Body:
    """Answers until it is stopped: the end of an answer is banned."""
    content = f"Count from one to a thousand. {uuid4().hex[:6]}"
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": 400, "logit_bias": {"2": -100}, **options}


def content_of(body: Body) -> str:
    text: str = body["messages"][-1]["content"]
    return text


@contextmanager
def connected(proxy: Proxy, body: Body) -> Iterator[socket.socket]:
    """A client that has sent its whole request."""
    data = json.dumps(body).encode()
    host, _, port = proxy.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=100) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\n"
            b"content-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(data) + data
        )
        yield client


def leave(client: socket.socket, *, reset: bool = False) -> None:
    """Closes with a FIN, as a browser does, or with a RST, as a killed process may."""
    if reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT_NOW)
    client.close()


def wait_for(proxy: Proxy, name: str, since: int) -> Event:
    """The next event of this name that belongs to a chat request."""
    return proxy.wait_for_event(
        name,
        lambda e: e["event"] == name and e.get("cls") == "chat",
        since=since,
    )


def assert_stopped(proxy: Proxy, request: int) -> None:
    """It was cancelled; no batch was begun for it afterwards; nothing runs or waits."""
    cancelled = proxy.wait_for_event(
        "cancelled", lambda e: e["event"] == "request_cancelled" and e["request"] == request
    )
    proxy.wait_idle()
    events = proxy.events()
    later = events[events.index(cancelled) + 1 :]
    assert not [e for e in later if request in e.get("requests", [])]
    assert not [e for e in events if e["event"] == "request_done" and e["request"] == request]


def assert_serves(proxy: Proxy) -> None:
    answer = proxy.chat([{"role": "user", "content": "Are you there?"}], max_tokens=2)
    assert answer["usage"]["completion_tokens"] == 2


def read_deltas(client: socket.socket, n: int) -> str:
    """The text of the stream's first `n` deltas with text."""
    texts: list[str] = []
    for line in client.makefile("rb"):
        if not line.startswith(b"data: "):
            continue
        if text := json.loads(line[6:])["choices"][0]["delta"].get("content"):
            texts.append(text)
        if len(texts) == n:
            break
    return "".join(texts)


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_during_prefill_stops_it(
    shared: Proxy, stream: bool, reset: bool
) -> None:
    shared.wait_idle()
    since, body = len(shared.events()), long_body(stream=stream)
    with connected(shared, body) as client:
        request = wait_for(shared, "batch", since)["requests"][0]
        leave(client, reset=reset)
        assert_stopped(shared, request)
    events = [e for e in shared.events()[since:] if e.get("request") == request]
    assert "first_token" not in [e["event"] for e in events]
    assert_serves(shared)


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
def test_a_client_that_leaves_mid_stream_stops_the_answer(shared: Proxy, reset: bool) -> None:
    shared.wait_idle()
    since, body = len(shared.events()), talkative_body(stream=True)
    with connected(shared, body) as client:
        seen = read_deltas(client, 4)
        request = wait_for(shared, "first_token", since)["request"]
        leave(client, reset=reset)
        assert_stopped(shared, request)
    assert shared.wait_stored("user", content_of(body))
    assert shared.wait_stored("assistant", seen)
    assert_serves(shared)


def test_a_client_that_leaves_while_its_whole_answer_is_written_stops_it(shared: Proxy) -> None:
    shared.wait_idle()
    since, body = len(shared.events()), talkative_body()
    with connected(shared, body) as client:
        request = wait_for(shared, "first_token", since)["request"]
        shared.wait_for_event(
            "decoding",
            lambda e: e["event"] == "batch" and request in e["requests"] and e["tokens"] == 1,
            since=since,
        )
        leave(client)
        assert_stopped(shared, request)
    assert shared.wait_stored("user", content_of(body))
    assert_serves(shared)


def test_a_turn_that_was_left_before_its_answer_leaves_the_chat_as_it_was(shared: Proxy) -> None:
    shared.wait_idle()
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"I am {uuid4().hex[:6]}."}]
    first = shared.chat(messages, max_tokens=4)
    messages.append(first["choices"][0]["message"])
    since, question = len(shared.events()), long_body()["messages"]
    with connected(shared, {"messages": messages + question}) as client:
        request = wait_for(shared, "batch", since)["requests"][0]
        leave(client)
        assert_stopped(shared, request)
    usage = shared.chat([*messages, {"role": "user", "content": "Hi."}], max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["total_tokens"] - 1


def test_whoever_comes_back_with_the_partial_answer_goes_on_from_there(shared: Proxy) -> None:
    shared.wait_idle()
    since, body = len(shared.events()), talkative_body(stream=True)
    with connected(shared, body) as client:
        seen = read_deltas(client, 6)
        request = wait_for(shared, "first_token", since)["request"]
        leave(client)
        assert_stopped(shared, request)
    partial = shared.wait_stored("assistant", seen)
    messages = [
        *body["messages"],
        {"role": "assistant", "content": partial},
        {"role": "user", "content": "Go on."},
    ]
    usage = shared.chat(messages, max_tokens=2)["usage"]
    # All but the new message: its two words, the markup around it and the answer's header.
    assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] <= 16


def test_a_client_that_leaves_does_not_disturb_another(shared: Proxy) -> None:
    shared.wait_idle()
    answers: list[dict[str, Any]] = []
    since, body = len(shared.events()), talkative_body(stream=True)
    with connected(shared, body) as client:
        request = wait_for(shared, "first_token", since)["request"]
        ask = [{"role": "user", "content": "Is it raining over there?"}]
        other = threading.Thread(target=lambda: answers.append(shared.chat(ask, max_tokens=24)))
        other.start()
        shared.wait_for_event(
            "two at once",
            lambda e: e["event"] == "batch" and len(e["requests"]) == 2,
            since=since,
        )
        leave(client)
        other.join(100)
        assert_stopped(shared, request)
    assert answers[0]["usage"]["completion_tokens"] > 0
    assert answers[0]["choices"][0]["finish_reason"] in ("stop", "length")


def test_a_client_that_leaves_in_the_middle_of_its_request_is_no_event(shared: Proxy) -> None:
    shared.wait_idle()
    since = len(shared.events())
    host, _, port = shared.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=100) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\ncontent-length: 500\r\n\r\n{"
        )
    assert_serves(shared)
    queued = [e for e in shared.events()[since:] if e["event"] == "request_queued"]
    assert len([e for e in queued if e["cls"] == "chat"]) == 1
    assert "Traceback" not in shared.log_path.read_text()


def test_a_client_that_half_reads_and_waits_is_not_taken_for_gone(shared: Proxy) -> None:
    shared.wait_idle()
    since = len(shared.events())
    with connected(shared, talkative_body(stream=True, max_tokens=16)) as client:
        read_deltas(client, 1)
        request = wait_for(shared, "request_done", since)["request"]
    shared.wait("idle", idle)
    ends = [e["event"] for e in shared.events()[since:] if e.get("request") == request]
    assert "request_cancelled" not in ends
