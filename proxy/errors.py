"""What went wrong, in the shape that OpenAI clients understand.

Clients differ in what they do with a status. LibreChat shows a 400, 401, 403, 404 or 413 at once
and tries 429 and 5xx again for up to 110 seconds: so what will not heal in seconds is a 4xx, and
what may is one for the clients that do so (`for_client`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memory.store_errors import StoreError
from proxy.disconnect import ClientGone
from proxy.engines.base import (
    ContextOverflow,
    EngineBroken,
    EngineError,
    EngineUnavailable,
    QueueFull,
    ReaderStalled,
    RequestRefused,
)
from proxy.librechat.side import repeats_itself

logger = logging.getLogger("chatfold")

INVALID_REQUEST = "invalid_request_error"
RATE_LIMIT = "rate_limit_error"
SERVER_ERROR = "server_error"

CLIENT_CLOSED_REQUEST = 499
"""Nobody reads it; it stands in logs and metrics (nginx's number)."""

PLAIN_HOST = re.compile(r"[A-Za-z0-9.:_\[\]-]{1,255}")

Handler = Callable[[Request, Exception], Awaitable[Response]]


class ApiError(Exception):
    """A failure that the client shall see: one clear sentence in the OpenAI error shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers or {}

    def __repr__(self) -> str:
        return f"<ApiError {self.status} {self.type} param={self.param} {self.message!r}>"

    def body(self) -> dict[str, Any]:
        """The JSON object, the same for a response and for an error frame in a stream."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        return Response(
            msgspec.json.encode(self.body()),
            status_code=self.status,
            headers=self.headers,
            media_type="application/json",
        )


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def too_large(max_body_bytes: int) -> ApiError:
    message = f"The request is larger than the {max_body_bytes:,} bytes that are allowed."
    return ApiError(413, message, code="request_too_large")


def unauthorized() -> ApiError:
    message = "The API key is missing or wrong: send `Authorization: Bearer KEY`."
    headers = {"www-authenticate": "Bearer"}
    return ApiError(401, message, code="invalid_api_key", headers=headers)


def unexpected() -> ApiError:
    message = "Something went wrong inside the proxy; its log says what."
    return ApiError(500, message, type=SERVER_ERROR, code="internal_error")


def from_engine(exc: EngineError) -> ApiError:
    """The one place where an engine's failure becomes an HTTP status."""
    message = str(exc) or "The model failed."
    match exc:
        case ContextOverflow():
            return bad_request(message, param="messages", code="context_length_exceeded")
        case RequestRefused():
            return bad_request(message, param=exc.param, code="request_refused")
        case QueueFull():
            return _later(429, message, type=RATE_LIMIT, code="queue_full")
        case ReaderStalled():
            return ApiError(408, message, code="reader_stalled")
        case EngineBroken():
            # No 503: clients would try again for minutes, and the user would see a spinner.
            return bad_request(message, code="engine_broken")
        case EngineUnavailable():
            return _later(503, message, type=SERVER_ERROR, code="engine_unavailable")
        case _:
            return ApiError(500, message, type=SERVER_ERROR, code="engine_error")


def as_api_error(exc: Exception) -> ApiError:
    """What the client is told about any exception. Unknown ones say nothing about the inside."""
    match exc:
        case ApiError():
            return exc
        case EngineError():
            return from_engine(exc)
        case StoreError():
            return _later(503, f"Memory: {exc}.", type=SERVER_ERROR, code="memory_unavailable")
        case _:
            return unexpected()


def for_client(error: ApiError, headers: Mapping[str, str]) -> ApiError:
    """The error as this client must be told it, by its request's headers. One that repeats itself
    would ask again what failed for up to 110 seconds, while its user sees a spinner: it gets a 400,
    which it shows at once. All others are told when to come again."""
    if not repeats_itself(headers) or not (error.status == 429 or error.status >= 500):
        return error
    return ApiError(400, error.message, type=error.type, param=error.param, code=error.code)


def exception_handlers() -> dict[Any, Handler]:
    """For Starlette(exception_handlers=...). `LastResort` takes whatever is not in here."""
    return {
        ApiError: _answer,
        EngineError: _answer,
        StoreError: _answer,
        HTTPException: _http_exception,
        ClientGone: _client_gone,
        ClientDisconnect: _client_gone,
    }


class LastResort:
    """The outermost middleware: an unexpected exception is logged once, with its request, and
    answered with a 500 in the OpenAI shape. Where the response has begun it is cut off, so that no
    client takes it for complete."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except (ClientGone, ClientDisconnect):
            logger.debug("client gone: %s %s", scope["method"], scope["path"])
        except Exception:
            logger.exception("unexpected error in %s %s", scope["method"], scope["path"])
            if not started:
                error = for_client(unexpected(), Headers(scope=scope))
                await error.response()(scope, receive, send)


async def _answer(request: Request, exc: Exception) -> Response:
    return for_client(as_api_error(exc), request.headers).response()


async def _client_gone(request: Request, exc: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    error = _from_http(request, exc)
    error.headers.update(exc.headers or {})
    return error.response()


def _from_http(request: Request, exc: HTTPException) -> ApiError:
    path = request.url.path
    if exc.status_code == 404:
        message = (
            f"There is nothing at {path}: the chat API is at {_base(request)}/v1/chat/completions"
            f" (for LibreChat: OPENAI_REVERSE_PROXY={_base(request)}/v1)."
        )
        return ApiError(404, message, code="unknown_url")
    if exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "another method")
        message = f"{request.method} is not possible at {path}: use {allowed}."
        return ApiError(405, message, code="method_not_allowed")
    kind = INVALID_REQUEST if exc.status_code < 500 else SERVER_ERROR
    return ApiError(exc.status_code, exc.detail, type=kind)


def _base(request: Request) -> str:
    host = request.headers.get("host", "")
    return f"http://{host if PLAIN_HOST.fullmatch(host) else 'HOST:PORT'}"


def _later(status: int, message: str, *, type: str, code: str) -> ApiError:
    return ApiError(status, message, type=type, code=code, headers={"retry-after": "1"})
