"""Servers that fail in the middle, and clients that leave: no wrong endings, nothing left behind.

Through the whole proxy, over real sockets on both sides.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
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
)
from scripted_upstream import usage as usage_frame
from test_remote import ask, asking, serving, text

from proxy.app import create_app
from proxy.config import Config, RemoteConfig
from proxy.engines.base import Delta, EngineError, Finished, Priority, Started
from proxy.engines.remote import RemoteEngine
from proxy.engines.remote_call import Call
from proxy.engines.remote_session import Session

pytestmark = pytest.mark.anyio

ANSWER = "Hello, wörld."
UP_TO_THE_END = frames(ROLE, say("Hello, "), say("wörld."), end())
STREAM = UP_TO_THE_END + frames(usage_frame(7, 5)) + DONE
COMPLETE = len(UP_TO_THE_END)
"""From this byte on the answer is whole: its finish_reason has come."""

STAGES = ("before headers", "before the first byte", "mid-stream")
BODY = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def proxy_before(server: Upstream, data: Path) -> AsyncIterator[tuple[str, RemoteEngine]]:
    """A chatfold before `server`, on a real socket; gives its URL and its engine."""
    config = Config(data=data, upstream=server.url, remote=RemoteConfig(recheck_s=3600))
    engine = RemoteEngine.from_config(config)
    app = create_app(config, engine=engine)
    settings = uvicorn.Config(app, port=0, http="h11", ws="none", log_config=None, lifespan="on")
    running = uvicorn.Server(settings)
    task = asyncio.create_task(running.serve())
    while not running.started:  # noqa: ASYNC110 - uvicorn tells it to those who ask only
        await asyncio.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    try:
        await engine.model()
        yield f"http://127.0.0.1:{port}", engine
    finally:
        running.should_exit = True
        await task


def cut(how: str, at: int) -> Any:
    async def script(exchange: Exchange) -> None:
        if how == "chunked":
            await exchange.send(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n")
            if at:
                await exchange.chunk(STREAM[:at])
        else:
            await exchange.send(STREAM_HEAD + b"connection: close\r\n\r\n" + STREAM[:at])
        if how == "reset":
            # What was sent must have been read: a reset throws away the rest.
            await asyncio.sleep(0.002)
            exchange.reset()
        else:
            exchange.hang_up()

    return script


@pytest.mark.parametrize("how", ["clean", "chunked", "reset"])
async def test_a_stream_cut_at_any_byte_ends_in_an_error_or_was_complete(how: str) -> None:
    server = Upstream()
    wrong: list[tuple[int, str]] = []
    async with serving(server) as engine:
        for at in range(len(STREAM) + 1):
            server.chat = cut(how, at)
            said, ending = "", ""
            try:
                async with engine.generate(asking()) as events:
                    async for event in events:
                        said += event.text if isinstance(event, Delta) else ""
                        ending = "finished" if isinstance(event, Finished) else ending
            except EngineError:
                ending = "error"
            # A reset may take bytes along that were on their way.
            expected = {"finished"} if at >= COMPLETE else {"error"}
            if how == "reset" and at >= COMPLETE:
                expected = {"finished", "error"}
            if ending not in expected or (ending == "finished" and said != ANSWER):
                wrong.append((at, f"{ending} {said!r}"))
        assert wrong == []
        server.chat = hello
        assert text(await ask(engine)) == "Hello"


async def test_a_client_sees_an_error_frame_and_no_done_where_the_stream_was_cut(
    tmp_path: Path,
) -> None:
    server = Upstream()
    async with (
        server.serving(),
        proxy_before(server, tmp_path) as (url, _),
        httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
    ):
        for at in range(0, len(STREAM), 23):
            server.chat = cut("clean", at)
            received = (await client.post("/v1/chat/completions", json=BODY)).text
            assert ("[DONE]" in received) == (at >= COMPLETE), at
            assert ('"error"' in received) == (at < COMPLETE), at
            assert ('"finish_reason":"stop"' in received) == (at >= COMPLETE), at


async def test_a_thousand_clients_that_leave_at_random_leave_nothing_behind(
    tmp_path: Path,
) -> None:
    """Before the headers, before the first byte, in the middle, behind the end."""

    async def slow(exchange: Exchange) -> None:
        await asyncio.sleep(0.001 * chance.random())
        await exchange.send(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for i in range(5):
            await asyncio.sleep(0.002 * chance.random())
            await exchange.chunk(STREAM[i * 100 : (i + 1) * 100])
        await exchange.chunk(STREAM[500:])
        await exchange.chunk(b"")

    chance = random.Random(5)
    patience_s = 0.15
    server = Upstream(chat=slow)

    async def leave(client: httpx.AsyncClient, number: int) -> None:
        body = BODY | {"stream": number % 3 > 0, "user": f"user {number % 50}"}
        try:
            async with asyncio.timeout(patience_s * chance.random()):
                await client.post("/v1/chat/completions", json=body)
        except TimeoutError:
            pass

    async with server.serving(), proxy_before(server, tmp_path) as (url, engine):
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=url, timeout=60, trust_env=False, limits=limits
        ) as client:
            for start in range(0, 1000, 50):
                before = len(server.seen)
                await asyncio.gather(*(leave(client, n) for n in range(start, start + 50)))
                # On a slow machine nearly all leave before their request is passed on.
                if len(server.seen) - before < 10:
                    patience_s *= 2
            assert len(server.seen) > 50
            server.chat = hello
            answers = [await client.post("/v1/chat/completions", json=BODY) for _ in range(10)]
            status = await until_quiet(client)
        assert [a.status_code for a in answers] == [200] * 10
        assert all(a.text.rstrip().endswith("[DONE]") for a in answers)
        engine.check_integrity()
        assert engine._http.n_open == 0
        assert not engine._calls
        assert not any((*status["running"].values(), *status["waiting"].values()))


async def until_quiet(client: httpx.AsyncClient) -> dict[str, Any]:
    """The engine's status once no request and no background work is left."""
    while True:
        status: dict[str, Any] = (await client.get("/api/status")).json()
        engine, background = status["engine"], status["background"]
        busy = (*engine["running"].values(), *engine["waiting"].values(), *background.values())
        if not any(busy):
            return dict(engine)
        await asyncio.sleep(0.05)


async def test_a_client_that_leaves_closes_the_connection_to_the_server_on_every_path(
    tmp_path: Path,
) -> None:
    async def waits(exchange: Exchange) -> None:
        stage = exchange.said
        if stage not in STAGES:
            return await hello(exchange)  # the keeper looks after what was answered
        if stage != "before headers":
            await exchange.send(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n")
        if stage == "mid-stream":
            await exchange.chunk(frames(ROLE, say("Hel")))
        await server.note(f"waiting {stage}")
        await exchange.until_gone()
        await server.note(f"gone {stage}")

    server = Upstream(chat=waits)
    async with server.serving(), proxy_before(server, tmp_path) as (url, engine):
        for stream in (True, False):
            for stage in STAGES:
                body = {"messages": [{"role": "user", "content": stage}], "stream": stream}
                async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
                    task = asyncio.create_task(client.post("/v1/chat/completions", json=body))
                    await server.noted(f"waiting {stage}")
                    task.cancel()
                    await asyncio.wait([task])
                await server.noted(f"gone {stage}")
                server.log.clear()
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
            await until_quiet(client)
        assert engine._http.n_open == 0


@pytest.mark.parametrize("whole", [False, True])
async def test_what_comes_with_the_interruption_is_not_given_out_twice(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat enters the line in the pass of the loop in which a title's first frames arrived."""

    async def script(exchange: Exchange) -> None:
        await exchange.send(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n")
        if whole or len(server.seen) > 1:
            await exchange.chunk(HELLO)
            return await exchange.chunk(b"")
        await exchange.chunk(frames(ROLE, say("Hel")))
        await exchange.until_gone()

    def on_frame(session: Session, call: Call, frame: bytes) -> float:
        if call.ticket.interruptions == 0 and not call.started:
            chat = engine._turns.enter(Priority.CHAT)
            asyncio.get_running_loop().call_soon(engine._turns.leave, chat)
        return plain(session, call, frame)

    server, plain = Upstream(chat=script), Session._on_frame
    async with serving(server) as engine:
        monkeypatch.setattr(Session, "_on_frame", on_frame)
        events = await ask(engine, asking("title", Priority.SIDE))
    assert [type(e) for e in events] == [Started, Delta, Delta, Finished]
    assert text(events) == "Hello"
    # A whole answer is kept: no use in asking for it again.
    assert len(server.seen) == (1 if whole else 2)


async def test_a_long_chat_in_a_script_that_estimates_know_little_of_is_cut_until_vllm_takes_it(
    tmp_path: Path,
) -> None:
    async def counts(exchange: Exchange) -> None:
        n = sum(len(m["content"]) for m in exchange.body["messages"])
        n_most = 1000 - exchange.body["max_tokens"]
        if n <= n_most:
            return await hello(exchange)
        sentence = (
            "This model's maximum context length is 1000 tokens. However, you requested"
            f" {1000 - n_most} output tokens and your prompt contains at least {n_most + 1} input"
            " tokens, for a total of at least 1001 tokens."
        )
        error = {"message": sentence, "type": "BadRequestError", "code": 400}
        await server.note("refused")
        await exchange.reply({"error": error}, status=400)

    # Two letters are a token of cl100k_base, or less; here each is one.
    said = "rhythm lynx sphinx crypt "
    server = Upstream(chat=counts)
    turns = [
        {"role": r, "content": f"{i} {said * 3}"} for i in range(9) for r in ("user", "assistant")
    ]
    body = {"messages": [*turns, {"role": "user", "content": "And?"}], "max_tokens": 16}
    async with (
        server.serving(),
        proxy_before(server, tmp_path) as (url, _),
        httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
    ):
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert server.log[:2] == ["asked And?", "refused"]


async def test_an_error_of_the_server_is_one_sentence_that_the_client_shows_at_once(
    tmp_path: Path,
) -> None:
    async def refuses(exchange: Exchange) -> None:
        await exchange.reply({"error": {"message": "No such model.", "code": 404}}, status=404)

    server = Upstream(chat=refuses)
    async with (
        server.serving(),
        proxy_before(server, tmp_path) as (url, _),
        httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
    ):
        plain = await client.post("/v1/chat/completions", json=BODY | {"stream": False})
        streamed = await client.post("/v1/chat/completions", json=BODY)
    assert (plain.status_code, plain.json()["error"]["message"]) == (400, "No such model.")
    last = streamed.text.strip().splitlines()[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "No such model."
    assert "[DONE]" not in streamed.text
