"""The work ends when the client leaves: on real sockets, asserted on events, not on the clock."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from proxy.disconnect import ClientGone, EventStream, run_until_disconnect
from proxy.errors import LastResort, exception_handlers

PATIENCE_S = 60.0
"""Only a test that fails waits this long."""

Frames = AsyncGenerator[bytes, None]


class Work:
    """What the server was doing, as events that the client's side can wait for."""

    def __init__(self) -> None:
        self.started = Event()
        self.ended = Event()
        self.outcome: list[str] = []
        self.frames = 0

    def done(self, outcome: str) -> None:
        self.outcome.append(outcome)
        self.ended.set()

    async def forever(self) -> str:
        self.started.set()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            self.done("cancelled")
            raise
        return ""

    async def stream(self, *frames: bytes, then_wait: bool = False) -> Frames:
        try:
            for frame in frames:
                self.frames += 1
                yield frame
            if then_wait:
                await self.forever()
        finally:
            self.done("closed")


@contextmanager
def serving(endpoint: Callable[[Request], Any]) -> Iterator[tuple[str, int]]:
    """A uvicorn on a free port around one endpoint."""
    app = Starlette(
        routes=[Route("/", endpoint, methods=["POST"])], exception_handlers=exception_handlers()
    )
    config = uvicorn.Config(LastResort(app), http="h11", ws="none", log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
    assert not thread.is_alive()


def post(address: tuple[str, int]) -> socket.socket:
    client = socket.create_connection(address, timeout=PATIENCE_S)
    client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
    return client


def read_until(client: socket.socket, end: bytes) -> bytes:
    received = b""
    while end not in received:
        some = client.recv(65536)
        if not some:
            raise EOFError(received)
        received += some
    return received


def read_to_the_end(client: socket.socket) -> bytes:
    received = b""
    while some := client.recv(65536):
        received += some
    return received


def event_stream(work: Frames, **options: Any) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        await request.body()
        return EventStream(work, **options)

    return endpoint


# Answers in one piece


def test_client_leaving_cancels_an_answer_in_one_piece() -> None:
    work = Work()

    async def endpoint(request: Request) -> Response:
        await request.body()
        try:
            await run_until_disconnect(request.receive, work.forever())
        except ClientGone:
            work.done("gone")
            raise
        return PlainTextResponse("never")

    with serving(endpoint) as address:
        client = post(address)
        assert work.started.wait(PATIENCE_S)
        client.close()
        assert work.ended.wait(PATIENCE_S)
    assert work.outcome == ["cancelled", "gone"]


def test_client_that_waits_gets_the_answer_and_may_ask_again() -> None:
    async def endpoint(request: Request) -> Response:
        await request.body()

        async def answer() -> str:
            await anyio.lowlevel.checkpoint()
            return "yes"

        return PlainTextResponse(await run_until_disconnect(request.receive, answer()))

    with serving(endpoint) as address, post(address) as client:
        assert read_until(client, b"yes").startswith(b"HTTP/1.1 200")
        client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        assert read_until(client, b"yes").startswith(b"HTTP/1.1 200")


async def nobody_leaves() -> Any:
    await anyio.sleep_forever()


def test_the_error_of_the_work_comes_out_as_itself() -> None:
    async def fails() -> None:
        await anyio.lowlevel.checkpoint()
        raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(run_until_disconnect(nobody_leaves, fails()))


def test_nothing_is_left_running_after_the_race() -> None:
    async def race() -> tuple[int, int]:
        async def answer() -> int:
            return 5

        result = await run_until_disconnect(nobody_leaves, answer())
        return result, len(asyncio.all_tasks())

    assert asyncio.run(race()) == (5, 1)


def test_the_work_is_awaited_before_client_gone_is_raised() -> None:
    order: list[str] = []

    async def leaves_at_once() -> Any:
        return {"type": "http.disconnect"}

    async def slow_to_die() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
            order.append("work ended")

    async def race() -> None:
        try:
            await run_until_disconnect(leaves_at_once, slow_to_die())
        except ClientGone:
            order.append("gone")

    asyncio.run(race())
    assert order == ["work ended", "gone"]


def test_a_cancelled_caller_cancels_the_work_and_stays_cancelled() -> None:
    work = Work()

    async def main() -> None:
        task = asyncio.create_task(run_until_disconnect(nobody_leaves, work.forever()))
        await asyncio.to_thread(work.started.wait, PATIENCE_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert work.outcome == ["cancelled"]


# Streams


def test_headers_come_at_once_and_leaving_before_the_first_byte_ends_the_work() -> None:
    work = Work()
    with serving(event_stream(work.stream(then_wait=True))) as address:
        client = post(address)
        head = read_until(client, b"\r\n\r\n").lower()
        assert work.started.wait(PATIENCE_S)
        client.close()
        assert work.ended.wait(PATIENCE_S)
    assert work.outcome[0] == "cancelled"
    assert b"content-type: text/event-stream" in head
    assert b"x-accel-buffering: no" in head
    assert b"cache-control: no-cache" in head


def test_leaving_in_the_middle_ends_the_work() -> None:
    work = Work()
    with serving(event_stream(work.stream(b"data: 1\n\n", then_wait=True))) as address:
        client = post(address)
        read_until(client, b"data: 1")
        assert work.started.wait(PATIENCE_S)
        client.close()
        assert work.ended.wait(PATIENCE_S)
    assert work.outcome == ["cancelled", "closed"]


def test_a_slow_reader_slows_the_work_and_leaving_closes_it_at_its_yield() -> None:
    work = Work()
    big = [b"x" * 2**20] * 500
    with serving(event_stream(work.stream(*big), ping_s=0.01)) as address:
        client = post(address)
        read_until(client, b"x")
        stalled = wait_until_steady(lambda: work.frames)
        assert 0 < stalled < len(big)
        client.close()
        assert work.ended.wait(PATIENCE_S)
    assert work.outcome == ["closed"]
    assert work.frames <= stalled + 1


def wait_until_steady(read: Callable[[], int]) -> int:
    tick, before = Event(), -1
    while read() != before:
        before = read()
        tick.wait(0.2)
    return before


def test_silence_is_filled_with_pings() -> None:
    work = Work()
    stream = event_stream(work.stream(b"data: 1\n\n", then_wait=True), ping_s=0.01)
    with serving(stream) as address, post(address) as client:
        received = read_until(client, b": ping\n\n")
        received += read_until(client, b": ping\n\n")
    assert received.index(b"data: 1") < received.index(b": ping")


def test_the_prelude_goes_out_in_one_write_with_the_first_frame() -> None:
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])

    stream = EventStream(Work().stream(b"1", b"2"), prelude=b"opening ")
    asyncio.run(stream({"type": "http"}, nobody_leaves, send))
    assert sent == [b"opening 1", b"2", b""]


def test_a_nudge_that_comes_first_takes_the_prelude_along() -> None:
    async def silent_until_nudged() -> Frames:
        await nudged_twice.wait()
        yield b"1"

    nudged_twice = anyio.Event()
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])
        if len(sent) == 2:
            nudged_twice.set()

    stream = EventStream(silent_until_nudged(), prelude=b"opening ", nudge=b"nudge", nudge_s=0.001)
    asyncio.run(stream({"type": "http"}, nobody_leaves, send))
    assert sent[:2] == [b"opening nudge", b"nudge"]
    assert all(b"opening" not in later for later in sent[1:])


def test_a_stream_that_ends_is_complete_and_the_connection_goes_on() -> None:
    async def endpoint(request: Request) -> Response:
        await request.body()
        return EventStream(Work().stream(b"data: 1\n\n", b"data: [DONE]\n\n"), ping_s=0.001)

    with serving(endpoint) as address, post(address) as client:
        for _ in range(3):
            received = read_until(client, b"\r\n0\r\n\r\n")
            assert received.index(b"data: 1") < received.index(b"data: [DONE]")
            client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")


def test_a_stream_that_fails_is_cut_off_and_not_ended(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> Frames:
        yield b"data: 1\n\n"
        raise KeyError("x")

    with serving(event_stream(fails())) as address, post(address) as client:
        received = read_to_the_end(client)
    assert b"data: 1" in received
    assert not received.endswith(b"0\r\n\r\n")
    assert [r.message for r in caplog.records if r.exc_info] == ["unexpected error in POST /"]


def test_a_server_that_says_oserror_means_that_the_client_is_gone() -> None:
    work = Work()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise OSError("gone")

    async def main() -> None:
        stream = EventStream(work.stream(b"1", b"2"))
        await stream({"type": "http"}, nobody_leaves, send)

    asyncio.run(main())
    assert (work.outcome, work.frames) == (["closed"], 1)
