"""The remote engine against a scripted server: over real sockets, asserted on events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from scripted_upstream import (
    DONE,
    HELLO,
    ROLE,
    STREAM_HEAD,
    Exchange,
    Upstream,
    end,
    frames,
    hello,
    say,
    usage,
)

from memory.context import Context, ContextMessage, Shape
from proxy.config import Config, RemoteConfig, TimeoutsConfig
from proxy.engines import remote
from proxy.engines.base import (
    ContextOverflow,
    Delta,
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    Event,
    Finished,
    Generate,
    Priority,
    QueueFull,
    RequestRefused,
    Sampling,
    Started,
)
from proxy.engines.remote import RemoteEngine
from proxy.engines.remote_server import model_name, window
from proxy.engines.remote_settings import RemoteSettings
from proxy.engines.remote_stream import BadStream, Frames, piece
from proxy.engines.remote_turns import Turns
from proxy.engines.remote_wire import upstream

pytestmark = pytest.mark.anyio

ONE_AT_A_TIME = RemoteConfig(parallel=1)
CHAT, SIDE, BACKGROUND = Priority.CHAT, Priority.SIDE, Priority.BACKGROUND


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def asking(text: str = "hi", priority: Priority = CHAT, **options: Any) -> Generate:
    head = ContextMessage("system", ("Be ", "brief."))
    context = Context((head, ContextMessage("user", (text,))), "", False, Shape(1, 10, 0, 0, 4, 0))
    return Generate("me", context, priority, **options)


@asynccontextmanager
async def engine_for(server: Upstream, **options: Any) -> AsyncIterator[RemoteEngine]:
    """An engine that has found the server and asks it for one thing at a time; the line of requests
    is in order at the end."""
    options.setdefault("remote", ONE_AT_A_TIME)
    engine = RemoteEngine.from_config(Config(upstream=server.url, **options))
    await engine.start()
    try:
        await engine.model()
        yield engine
        engine.check_integrity()
    finally:
        await engine.stop()


@asynccontextmanager
async def serving(server: Upstream, **options: Any) -> AsyncIterator[RemoteEngine]:
    async with server.serving(), engine_for(server, **options) as engine:
        yield engine


def be_patient(engine: RemoteEngine) -> None:
    """From now on nobody is given up, however slow the machine is."""
    longest = RemoteSettings(engine._settings.upstream)
    engine._settings = engine._the_session._settings = longest


async def until_ready(engine: RemoteEngine) -> None:
    while not engine.ready():  # noqa: ASYNC110 - the engine tells it to those who ask only
        await asyncio.sleep(0.01)


async def ask(engine: RemoteEngine, request: Generate | None = None) -> list[Event]:
    async with engine.generate(request or asking()) as events:
        return [event async for event in events]


def text(events: list[Event]) -> str:
    return "".join(e.text for e in events if isinstance(e, Delta))


def finish(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def replying(value: Any, *, status: int) -> Any:
    async def script(exchange: Exchange) -> None:
        await exchange.reply(value, status=status)

    return script


def streaming(data: bytes) -> Any:
    async def script(exchange: Exchange) -> None:
        await exchange.stream(data)

    return script


# -- what goes well ------------------------------------------------------------------------------


async def test_an_answer_arrives_with_the_servers_own_numbers() -> None:
    async with serving(Upstream()) as engine:
        events = await ask(engine)
    assert [type(e) for e in events] == [Started, Delta, Delta, Finished]
    assert text(events) == "Hello"
    last = finish(events)
    assert (last.finish_reason, last.token_ids) == ("stop", None)
    assert (last.prompt_tokens, last.cached_tokens, last.completion_tokens) == (7, 5, 2)


async def test_without_usage_tokens_are_estimated() -> None:
    server = Upstream(chat=streaming(frames(ROLE, say("Hello there"), end("length")) + DONE))
    async with serving(server) as engine:
        last = finish(await ask(engine))
        (counted,) = await engine.count(["Hello there"])
    assert last.finish_reason == "length"
    assert last.completion_tokens == counted
    assert last.cached_tokens == 0
    assert last.prompt_tokens > 14


async def test_the_request_holds_the_prompt_as_it_is_and_what_the_client_set() -> None:
    server = Upstream()
    sampling = Sampling(temperature=0.5, seed=7, stop=("END",), logit_bias=((3, -1.0),), min_p=0.1)
    async with serving(server) as engine:
        await ask(engine, asking("一\ud800", max_tokens=9, sampling=sampling))
    body = server.seen[0].body
    assert body == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "一\ufffd"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.95,
        "seed": 7,
        "min_p": 0.1,
        "stop": ["END"],
        "logit_bias": {"3": -1.0},
    }
    assert "authorization" not in server.seen[0].headers


async def test_max_tokens_never_reach_beyond_the_window() -> None:
    server = Upstream()
    async with serving(server) as engine:
        await ask(engine, asking(max_tokens=100_000))
        await ask(engine, asking())
    assert server.seen[0].body["max_tokens"] < 1000
    assert "max_tokens" not in server.seen[1].body


async def test_warming_evaluates_the_prompt_and_gives_no_text() -> None:
    server = Upstream()
    async with serving(server) as engine:
        events = await ask(engine, asking(max_tokens=0, priority=BACKGROUND))
    assert server.seen[0].body["max_tokens"] == 1
    assert [type(e) for e in events] == [Started, Finished]
    assert finish(events).completion_tokens == 0


async def test_a_server_that_refuses_stream_options_is_asked_without_from_then_on() -> None:
    async def strict(exchange: Exchange) -> None:
        if "stream_options" in exchange.body:
            await exchange.reply({"detail": [{"msg": "extra field"}]}, status=422)
        else:
            await exchange.stream(frames(ROLE, say("yes"), end()) + DONE)

    server = Upstream(chat=strict)
    async with serving(server) as engine:
        assert text(await ask(engine)) == "yes"
        assert text(await ask(engine)) == "yes"
    assert ["stream_options" in e.body for e in server.seen] == [True, False, False]


async def test_one_connection_serves_request_after_request() -> None:
    server = Upstream()
    async with serving(server) as engine:
        for _ in range(3):
            await ask(engine)
    assert server.connections == 1


async def test_a_kept_connection_found_closed_is_replaced_and_the_request_sent_again() -> None:
    async def closes_kept_ones(exchange: Exchange) -> None:
        if exchange.connection == 1:
            exchange.hang_up()
        else:
            await exchange.stream(HELLO)

    server = Upstream(chat=closes_kept_ones)
    async with serving(server) as engine:
        assert text(await ask(engine)) == "Hello"
    assert [e.connection for e in server.seen] == [1, 2]


async def test_a_fresh_connection_that_gives_nothing_is_not_tried_again() -> None:
    async def hangs_up(exchange: Exchange) -> None:
        exchange.hang_up()

    server = Upstream(chat=hangs_up)
    async with serving(server) as engine:
        with pytest.raises(EngineCrashed):
            await ask(engine)
    assert [e.connection for e in server.seen] == [1, 2]


async def test_cookies_are_neither_kept_nor_sent() -> None:
    async def sets_a_cookie(exchange: Exchange) -> None:
        await exchange.stream(HELLO, headers=b"set-cookie: user=a; path=/\r\n")

    server = Upstream(chat=sets_a_cookie)
    async with serving(server) as engine:
        await ask(engine)
        await ask(engine)
    assert len(server.seen) == 2
    assert all("cookie" not in e.headers for e in server.seen)


# -- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "kind", "sentence"),
    [
        (400, {"error": {"message": "No such model."}}, RequestRefused, "No such model."),
        (422, {"detail": [{"msg": "Field required"}]}, RequestRefused, "Field required"),
        (404, b"<html>", RequestRefused, "The upstream server answered with status 404."),
        (307, b"", RequestRefused, "The upstream URL is not the right one"),
        (429, {"error": {"message": "Slow down."}}, QueueFull, "Slow down."),
        (500, {"error": {"message": "Boom."}}, EngineUnavailable, "Boom."),
        (503, {"error": "Loading"}, EngineUnavailable, "Loading"),
    ],
)
async def test_a_status_becomes_an_error_with_the_servers_sentence(
    status: int, body: Any, kind: type[EngineError], sentence: str
) -> None:
    async with serving(Upstream(chat=replying(body, status=status))) as engine:
        with pytest.raises(kind) as caught:
            await ask(engine)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    "error",
    [
        {"type": "exceed_context_size_error", "code": 400, "n_prompt_tokens": 900, "n_ctx": 512},
        {
            "code": "context_length_exceeded",
            "message": "This model's maximum context length is 512 tokens. However, you requested"
            " 1000 tokens (900 in the messages, 100 in the completion). Please reduce the length.",
        },
    ],
)
async def test_an_overflow_carries_its_numbers_and_the_window_is_learned(error: Any) -> None:
    async with serving(Upstream(chat=replying({"error": error}, status=400))) as engine:
        with pytest.raises(ContextOverflow) as caught:
            await ask(engine)
        assert (caught.value.prompt_tokens, caught.value.window_tokens) == (900, 512)
        assert (await engine.model()).budget.window_tokens == 512


async def test_a_stream_that_ends_before_it_began_is_asked_for_its_reason() -> None:
    refusal = {
        "code": "context_length_exceeded",
        "message": "This model's maximum context length is 512 tokens. However, you requested"
        " 901 tokens (900 in the messages, 1 in the completion).",
    }

    async def script(exchange: Exchange) -> None:
        if exchange.body["stream"]:
            await exchange.stream(b"")
        else:
            await exchange.reply({"error": refusal}, status=400)

    server = Upstream(chat=script)
    async with serving(server) as engine:
        with pytest.raises(ContextOverflow):
            await ask(engine, asking(max_tokens=100))
        assert engine.status()["window_tokens"] == 512
    assert [e.body["max_tokens"] for e in server.seen] == [100, 1]


async def test_an_overflow_without_numbers_is_one_by_an_eighth_of_the_window() -> None:
    error = {"code": "context_length_exceeded", "message": "Too long."}
    async with serving(Upstream(chat=replying({"error": error}, status=400))) as engine:
        with pytest.raises(ContextOverflow) as caught:
            await ask(engine)
    assert (caught.value.prompt_tokens, caught.value.window_tokens) == (1125, 1000)


async def test_an_error_frame_is_an_error() -> None:
    failing = frames(ROLE, say("Hel"), {"error": {"message": "Out of memory.", "code": 500}})
    server = Upstream(chat=streaming(failing + DONE))
    async with serving(server) as engine, engine.generate(asking()) as events:
        assert text([await anext(events), await anext(events)]) == "Hel"
        with pytest.raises(EngineUnavailable, match=r"Out of memory\."):
            await anext(events)


@pytest.mark.parametrize("how", ["hang_up", "reset"])
@pytest.mark.parametrize("framing", ["chunked", "to the end"])
async def test_a_stream_cut_anywhere_before_its_finish_reason_is_an_error(
    how: str, framing: str
) -> None:
    complete_at = HELLO.index(b"\n\n", HELLO.index(b'"stop"')) + 2
    cut_at = 0

    async def cuts(exchange: Exchange) -> None:
        if framing == "chunked":
            await exchange.send(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n")
            await exchange.chunk(HELLO[:cut_at]) if cut_at else None
        else:
            await exchange.send(STREAM_HEAD + b"connection: close\r\n\r\n" + HELLO[:cut_at])
        getattr(exchange, how)()

    async with serving(Upstream(chat=cuts)) as engine:
        for cut_at in [*range(0, len(HELLO), 17), complete_at - 1]:
            if cut_at >= complete_at:
                continue
            with pytest.raises(EngineCrashed):
                await ask(engine)


async def test_a_stream_cut_behind_its_finish_reason_is_complete() -> None:
    whole = frames(ROLE, say("Hello"), end())

    async def cuts(exchange: Exchange) -> None:
        await exchange.send(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n")
        await exchange.chunk(whole)
        exchange.hang_up()

    async with serving(Upstream(chat=cuts)) as engine:
        events = await ask(engine)
    assert (text(events), finish(events).finish_reason) == ("Hello", "stop")


async def test_done_without_a_finish_reason_is_an_error() -> None:
    async with serving(Upstream(chat=streaming(frames(ROLE, say("Hel")) + DONE))) as engine:
        with pytest.raises(EngineCrashed):
            await ask(engine)


@pytest.mark.parametrize("data", [b"data: {not json}\n\n", b'data: {"choices": 5}\n\n'])
async def test_what_is_no_chunk_is_an_error(data: bytes) -> None:
    async with serving(Upstream(chat=streaming(data))) as engine:
        with pytest.raises(EngineError, match="cannot be read"):
            await ask(engine)


@pytest.mark.parametrize("timeouts", [{"first_token_s": 0.1}, {"between_tokens_s": 0.1}])
async def test_a_server_that_falls_silent_is_given_up_and_the_next_request_is_served(
    timeouts: dict[str, float],
) -> None:
    async def silent(exchange: Exchange) -> None:
        if len(server.seen) > 1:
            return await hello(exchange)
        await exchange.send(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n")
        if "between_tokens_s" in timeouts:
            await exchange.chunk(frames(ROLE, say("Hel")))
        await exchange.until_gone()
        await server.note("gone")

    server = Upstream(chat=silent)
    async with serving(server, timeouts=TimeoutsConfig(**timeouts)) as engine:
        with pytest.raises(EngineUnavailable, match="too long"):
            await ask(engine)
        be_patient(engine)
        assert text(await ask(engine)) == "Hello"
        await server.noted("gone")


# -- coming and going ----------------------------------------------------------------------------


async def test_a_server_that_comes_later_is_found() -> None:
    server = Upstream()
    async with server.serving():
        pass
    engine = RemoteEngine.from_config(
        Config(upstream=server.url, timeouts=TimeoutsConfig(connect_s=0.1))
    )
    await engine.start()
    try:
        with pytest.raises(EngineUnavailable):
            await ask(engine)
        assert not engine.ready()
        assert engine.info is None
        async with server.serving():
            await until_ready(engine)
            be_patient(engine)
            assert text(await ask(engine)) == "Hello"
    finally:
        await engine.stop()


async def test_a_server_that_takes_its_time_to_say_what_it_is_is_waited_for() -> None:
    said = asyncio.Event()

    async def slow(exchange: Exchange) -> None:
        await said.wait()
        await exchange.reply(server.models)

    server = Upstream()
    server.routes["GET", "/v1/models"] = slow
    async with server.serving():
        engine = RemoteEngine.from_config(
            Config(upstream=server.url, timeouts=TimeoutsConfig(connect_s=0.1))
        )
        await engine.start()
        try:
            asked = asyncio.create_task(ask(engine))
            await asyncio.sleep(0.3)
            assert not asked.done()
            said.set()
            assert text(await asked) == "Hello"
        finally:
            await engine.stop()


async def test_a_server_that_comes_back_with_another_model_is_known_again() -> None:
    server = Upstream()
    async with server.serving():
        engine = RemoteEngine.from_config(Config(upstream=server.url))
        await engine.start()
        await engine.model()
    try:
        with pytest.raises(EngineUnavailable, match="cannot be reached"):
            await ask(engine)
        assert not engine.ready()
        server.models = {"data": [{"id": "other"}]}
        async with server.serving():
            await until_ready(engine)
            assert (await engine.model()).name == "other"
            assert text(await ask(engine)) == "Hello"
    finally:
        await engine.stop()


@pytest.mark.parametrize("when", ["before headers", "before the first byte", "mid-stream"])
async def test_leaving_closes_the_connection_to_the_server(when: str) -> None:
    async def waits(exchange: Exchange) -> None:
        if when != "before headers":
            await exchange.send(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n")
        if when == "mid-stream":
            await exchange.chunk(frames(ROLE, say("Hel")))
        await server.note("waiting")
        await exchange.until_gone()
        await server.note("gone")

    server = Upstream(chat=waits)
    async with serving(server) as engine:
        async with engine.generate(asking()):
            await server.noted("waiting")
        await server.noted("gone")
        server.chat = hello
        assert text(await ask(engine)) == "Hello"
        assert not engine._calls


async def test_a_cancelled_reader_closes_the_connection_to_the_server() -> None:
    async def waits(exchange: Exchange) -> None:
        await server.note("waiting")
        await exchange.until_gone()
        await server.note("gone")

    server = Upstream(chat=waits)
    async with serving(server) as engine:
        async with anyio.create_task_group() as group:
            group.start_soon(ask, engine)
            await server.noted("waiting")
            group.cancel_scope.cancel()
        await server.noted("gone")
        assert not engine._calls


async def test_many_cancelled_requests_leave_nothing_behind() -> None:
    async def slow(exchange: Exchange) -> None:
        await asyncio.sleep(0.002)
        await hello(exchange)

    server = Upstream(chat=slow)
    async with serving(server) as engine:
        for i in range(100):
            with anyio.move_on_after(i / 20_000):
                await ask(engine)
        for _ in range(10):
            assert text(await ask(engine)) == "Hello"
        assert not engine._calls
        assert not engine._http.n_open


async def test_stopping_ends_running_and_waiting_requests() -> None:
    async def waits(exchange: Exchange) -> None:
        await server.note("waiting")
        await exchange.until_gone()

    server = Upstream(chat=waits)
    async with server.serving(), engine_for(server) as engine:
        tasks = [asyncio.create_task(ask(engine)) for _ in range(2)]
        await server.noted("waiting")
        await engine.stop()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(r) for r in results] == [EngineUnavailable, EngineUnavailable]


# -- who goes first ------------------------------------------------------------------------------


async def test_background_work_gives_way_to_a_chat_and_begins_anew() -> None:
    async def script(exchange: Exchange) -> None:
        if exchange.said == "summary" and "asked chat" not in server.log:
            await exchange.send(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n")
            await exchange.chunk(frames(ROLE, say("half a sum")))
            await server.note("half way")
            await exchange.until_gone()
            await server.note("gone")
        else:
            await exchange.stream(HELLO)

    server = Upstream(chat=script)
    async with serving(server) as engine:
        summary = asyncio.create_task(ask(engine, asking("summary", BACKGROUND)))
        await server.noted("half way")
        assert text(await ask(engine, asking("chat"))) == "Hello"
        events = await summary
        assert engine.status()["preemptions"] == 1
    assert [line for line in server.log if line.startswith("asked")] == [
        "asked summary",
        "asked chat",
        "asked summary",
    ]
    assert "gone" in server.log
    # The half that was thrown away is not in it.
    assert [type(e) for e in events] == [Started, Delta, Delta, Finished]
    assert text(events) == "Hello"


async def test_background_work_interrupted_too_often_is_handed_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(exchange: Exchange) -> None:
        if exchange.said == "chat":
            return await hello(exchange)
        await server.note(f"summary {len(server.seen)}")
        await exchange.until_gone()

    monkeypatch.setattr(remote, "INTERRUPTIONS_MOST", 2)
    server = Upstream(chat=script)
    async with serving(server) as engine:
        summary = asyncio.create_task(ask(engine, asking("summary", BACKGROUND)))
        await server.noted("summary 1")
        await ask(engine, asking("chat"))
        await server.noted("summary 3")
        await ask(engine, asking("chat"))
        with pytest.raises(EngineUnavailable, match="too often"):
            await summary


async def test_a_title_gives_way_until_it_has_given_something_out() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n")
        if exchange.said == "early" and len(server.seen) == 1:
            await server.note("early waits")
            return await exchange.until_gone()
        if exchange.said == "late":
            await exchange.chunk(frames(ROLE, say("A t")))
            await server.noted("chat is coming")
        await exchange.chunk(HELLO)
        await exchange.chunk(b"")

    server = Upstream(chat=script)
    async with serving(server) as engine:
        early = asyncio.create_task(ask(engine, asking("early", SIDE)))
        await server.noted("early waits")
        await ask(engine, asking("chat"))
        assert text(await early) == "Hello"
        async with engine.generate(asking("late", SIDE)) as events:
            await anext(events)
            chat = asyncio.create_task(ask(engine, asking("chat 2")))
            await asyncio.sleep(0)
            await server.note("chat is coming")
            assert text([e async for e in events]) == "A tHello"
        await chat
    asked = [line.removeprefix("asked ") for line in server.log if line.startswith("asked")]
    assert asked == ["early", "chat", "early", "late", "chat 2"]


async def test_one_at_a_time_in_class_order_and_a_full_queue_refuses() -> None:
    async def script(exchange: Exchange) -> None:
        if exchange.said == "first":
            await server.noted("go")
        await exchange.stream(HELLO)
        await server.note(f"done {exchange.said}")

    server = Upstream(chat=script)
    async with serving(server, queue_limit=3) as engine:
        tasks = [asyncio.create_task(ask(engine, asking("first")))]
        await server.noted("asked first")
        for name, priority in (("summary", BACKGROUND), ("title", SIDE), ("second", CHAT)):
            tasks.append(asyncio.create_task(ask(engine, asking(name, priority))))
            await asyncio.sleep(0)
        status = engine.status()
        assert status["running"] == {"chat": 1, "side": 0, "background": 0}
        assert status["waiting"] == {"chat": 1, "side": 1, "background": 1}
        with pytest.raises(QueueFull):
            await ask(engine)
        await server.note("go")
        await asyncio.gather(*tasks)
    order = ["first", "second", "title", "summary"]
    assert [e.said for e in server.seen] == order
    assert [line for line in server.log if "done" in line] == [f"done {name}" for name in order]


async def test_waiting_too_long_in_the_queue_is_an_error() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.until_gone()

    server = Upstream(chat=script)
    timeouts = TimeoutsConfig(queue_s=0.1)
    async with serving(server, timeouts=timeouts) as engine, engine.generate(asking("first")):
        await server.noted("asked first")
        with pytest.raises(QueueFull, match="waited"):
            await ask(engine)


async def test_a_reader_that_stops_reading_holds_up_nobody_else() -> None:
    long = frames(ROLE, *(say("x" * 10_000) for _ in range(100)), end()) + DONE
    server = Upstream(chat=streaming(long))
    async with serving(server) as engine, engine.generate(asking("first")) as events:
        await anext(events)
        assert text(await ask(engine)) == "x" * 1_000_000
        assert text([e async for e in events]) == "x" * 1_000_000


async def test_a_turn_goes_to_the_best_class_and_within_it_to_who_came_first() -> None:
    turns = Turns(limit=10)
    first = turns.enter(BACKGROUND)
    others = [turns.enter(p) for p in (BACKGROUND, SIDE, CHAT, SIDE, CHAT)]
    assert first.interrupted
    assert first.scope.cancel_called
    turns.leave(first)
    turns.again(first)
    order = []
    while sum(turns.running()):
        turns.check_integrity()
        (running,) = [t for t in (first, *others) if t.granted.is_set() and t not in order]
        order.append(running)
        turns.leave(running)
    assert [t.place for t in order] == sorted(t.place for t in (first, *others))
    assert sum(turns.waiting()) == 0


# -- what the server is --------------------------------------------------------------------------


async def test_status_names_the_server_and_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    server = Upstream()
    async with server.serving():
        url = f"http://someone:hunter2@127.0.0.1:{server.port}/?key=hunter2"
        with caplog.at_level(logging.DEBUG):
            engine = RemoteEngine.from_config(Config(upstream=url))
            await engine.start()
            await engine.model()
            await ask(engine)
            status = engine.status()
            await engine.stop()
    assert "hunter2" not in json.dumps(status) + caplog.text + repr(engine)
    assert "authorization" not in server.seen[0].headers
    assert status["kind"] == "remote"
    assert status["url"] == f"http://***@127.0.0.1:{server.port}/v1"
    assert status["ready"]
    assert (status["model"], status["window_tokens"]) == ("tiny", 1000)


@pytest.mark.parametrize(
    ("models", "n_ctx", "name", "expected"),
    [
        ({"data": [{"id": "a", "max_model_len": 900}]}, 0, "a", (900, "max_model_len")),
        ({"data": [{"id": "a", "max_model_len": 900}]}, 512, "a", (512, "n_ctx")),
        ({"data": [{"id": "a", "max_model_len": 900}]}, 9000, "a", (900, "max_model_len")),
        ({"data": [{"id": "a"}]}, 2048, "a", (2048, "n_ctx")),
        ({"data": [{"id": "a", "meta": None}]}, 0, "a", (4096, "default")),
        ({"data": []}, 0, "default", (4096, "default")),
        (None, 0, "default", (4096, "default")),
        ([{"id": 5}], 0, "default", (4096, "default")),
    ],
)
def test_what_is_not_said_is_assumed(
    models: Any, n_ctx: int, name: str, expected: tuple[int, str]
) -> None:
    assert model_name(models) == name
    assert window(models, None, n_ctx=n_ctx) == expected


@pytest.mark.parametrize(
    ("url", "chat"),
    [
        ("http://h:8000", "http://h:8000/v1/chat/completions"),
        ("http://h:8000/", "http://h:8000/v1/chat/completions"),
        ("http://h:8000/v1", "http://h:8000/v1/chat/completions"),
        ("http://h:8000/v1/", "http://h:8000/v1/chat/completions"),
        ("http://h:8000/v1/chat/completions", "http://h:8000/v1/chat/completions"),
        ("https://h/api/v1beta", "https://h/api/v1beta/chat/completions"),
        ("https://h/openai/chat/completions/", "https://h/openai/chat/completions"),
        ("http://u:p@[::1]:9/api", "http://[::1]:9/api/v1/chat/completions"),
    ],
)
def test_the_url_may_be_given_in_many_ways(url: str, chat: str) -> None:
    assert upstream(url).chat == chat
    assert upstream(url).models == chat.removesuffix("/chat/completions") + "/models"


def test_props_are_beside_the_api() -> None:
    assert upstream("http://h:8000/v1").root == "http://h:8000"


# -- the stream ----------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_frames_may_come_cut_anywhere(newline: bytes) -> None:
    lines = [b": ping", b"", b"event: x", b"data: one", b"data:two", b"", b"data: [DONE]", b"", b""]
    stream = b"\xef\xbb\xbf" + newline.join(lines)
    for size in range(1, len(stream) + 1):
        reader = Frames()
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        events = [event for some in pieces for event in reader.feed(some)]
        assert events == [b"one\ntwo", b"[DONE]"]


def test_a_frame_that_the_end_cuts_off_is_none() -> None:
    assert Frames().feed(b'data: {"choices": []}\n') == []


def test_a_line_without_end_is_refused() -> None:
    reader = Frames()
    with pytest.raises(BadStream):
        for _ in range(100):
            reader.feed(b"data: " + b"x" * 65536)


def test_a_usage_frame_opens_no_answer() -> None:
    read = piece(json.dumps(usage(3, 4)).encode())
    assert not read.opens
    assert read.usage is not None
    assert (read.usage.prompt_tokens, read.usage.cached_tokens) == (3, 0)


@pytest.mark.parametrize("reason", ["abort", "error"])
async def test_an_answer_that_the_server_gave_up_is_an_error(reason: str) -> None:
    async with serving(Upstream(chat=streaming(frames(ROLE, end(reason)) + DONE))) as engine:
        with pytest.raises(EngineCrashed):
            await ask(engine)


# -- counting ------------------------------------------------------------------------------------


async def test_an_estimate_errs_on_the_long_side_and_takes_any_text() -> None:
    texts = ["", "hello there", "<|endoftext|>", "\ud800", "こんにちは", "word " * 30_000]
    async with serving(Upstream()) as engine:
        counts = await engine.count(texts)
    assert counts[0] == 0
    assert counts[1] == 3  # two tokens and the margin
    assert all(n > 0 for n in counts[1:])
    assert 30_000 < counts[5] < 40_000
