"""Every failure has the OpenAI shape and a status that clients treat rightly."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from proxy.engines.base import (
    ContextOverflow,
    EngineBroken,
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    QueueFull,
    ReaderStalled,
    RequestRefused,
)
from proxy.errors import LastResort, bad_request, exception_handlers, from_engine, too_large


def app_that_raises(exc: Exception) -> Starlette:
    async def endpoint(request: Request) -> Response:
        raise exc

    return Starlette(
        routes=[Route("/x", endpoint, methods=["POST"])],
        middleware=[Middleware(LastResort)],
        exception_handlers=exception_handlers(),
    )


def ask(
    app: Starlette, path: str = "/x", method: str = "POST", *, agent: str = ""
) -> tuple[int, dict[str, Any], Any]:
    """Status, headers and JSON of one request, straight through ASGI."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"example:1"), (b"user-agent", agent.encode())]
    scope: dict[str, Any] = {"type": "http", "method": method, "path": path, "headers": headers}
    scope |= {"query_string": b"", "root_path": "", "scheme": "http", "server": ("x", 1)}
    asyncio.run(app(scope, receive, send))
    names = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], names, json.loads(body)["error"]


@pytest.mark.parametrize(
    ("exc", "status", "code"),
    [
        (ContextOverflow(prompt_tokens=9, window_tokens=5), 400, "context_length_exceeded"),
        (RequestRefused("No."), 400, "request_refused"),
        (QueueFull("Full."), 429, "queue_full"),
        (ReaderStalled("Not read."), 408, "reader_stalled"),
        (EngineUnavailable("Loading."), 503, "engine_unavailable"),
        (EngineCrashed("Crashed."), 503, "engine_unavailable"),
        (EngineBroken("No model."), 400, "engine_broken"),
        (EngineError("Odd."), 500, "engine_error"),
        (bad_request("Wrong.", param="n"), 400, None),
        (too_large(5), 413, "request_too_large"),
    ],
)
def test_known_failures(exc: Exception, status: int, code: str | None) -> None:
    got, headers, error = ask(app_that_raises(exc))
    assert (got, error["code"], error["message"]) == (status, code, str(exc))
    assert set(error) == {"message", "type", "param", "code"}
    assert headers["content-type"] == "application/json"


def test_what_heals_says_when_to_try_again() -> None:
    for exc in (QueueFull("Full."), EngineUnavailable("Loading.")):
        assert from_engine(exc).headers["retry-after"] == "1"


AGENTS = ("langchainjs-openai/1.0.0 ((node/v20.20.2; linux; x64))", "OpenAI/JS 4.20.1")


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize(
    "exc",
    [QueueFull("Full."), EngineCrashed("Crashed."), EngineError("Odd."), ZeroDivisionError("x")],
    ids=repr,
)
def test_a_client_that_would_ask_again_for_minutes_is_told_at_once(
    exc: Exception, agent: str
) -> None:
    app = app_that_raises(exc)
    status, headers, error = ask(app, agent=agent)
    others_status, _, others = ask(app, agent="OpenAI/Python 3.54.0")
    assert status == 400
    assert "retry-after" not in headers
    assert error == others
    assert others_status == 429 or others_status >= 500


def test_a_wrong_request_of_such_a_client_keeps_its_status() -> None:
    assert ask(app_that_raises(too_large(5)), agent=AGENTS[0])[0] == 413


def test_an_unexpected_exception_is_logged_once_and_tells_the_client_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    status, _, error = ask(app_that_raises(ZeroDivisionError("secret")))
    assert status == 500
    assert "secret" not in json.dumps(error)
    assert [record.message for record in caplog.records] == ["unexpected error in POST /x"]


def test_a_wrong_url_names_the_right_one() -> None:
    status, _, error = ask(app_that_raises(KeyError()), path="/v2/chat")
    assert status == 404
    assert "/v2/chat" in error["message"]
    assert "OPENAI_REVERSE_PROXY=http://example:1/v1" in error["message"]


def test_a_wrong_method_names_the_right_one() -> None:
    status, headers, error = ask(app_that_raises(KeyError()), method="GET")
    assert (status, headers["allow"]) == (405, "POST")
    assert error["message"] == "GET is not possible at /x: use POST."


def test_other_http_exceptions_keep_their_words() -> None:
    exc = HTTPException(418, "Tea.", headers={"x-tea": "green"})
    status, headers, error = ask(app_that_raises(exc))
    assert (status, headers["x-tea"], error["message"]) == (418, "green", "Tea.")


def test_a_good_answer_passes_untouched() -> None:
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse('{"error": "none"}')

    app = Starlette(routes=[Route("/x", endpoint)], middleware=[Middleware(LastResort)])
    assert ask(app, method="GET")[::2] == (200, "none")
