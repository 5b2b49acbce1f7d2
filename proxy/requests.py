"""What the endpoints share: reading requests, and saying where an answer came from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from memory.context import Shape
from proxy import wire
from proxy.chat import Plan
from proxy.config import Config
from proxy.errors import too_large
from proxy.headers import authorize, hints, owner_of
from proxy.wire import ChatRequest


async def read_chat(request: Request) -> tuple[ChatRequest, str]:
    """The request, and whose it is. Raises ApiError."""
    config: Config = request.app.state.config
    check_key(request)
    chat = wire.parse_chat(await read_body(request, config.max_body_bytes))
    return chat, owner_of(request.headers, chat.user)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Raises ApiError (413) as soon as there is more."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large(max_bytes)
    return bytes(body)


def client_id_of(request: Request) -> str | None:
    """The client's own name for the conversation, where it sends one."""
    header = request.app.state.config.conversation_header
    return hints(request.headers, conversation_header=header).conversation


def check_key(request: Request) -> None:
    """Raises ApiError (401)."""
    if error := authorize(request.headers, request.app.state.config.api_keys):
        raise error


def headers_for(plan: Plan) -> dict[str, str]:
    """Which conversation it is of, and what its context is made of."""
    headers = {
        "x-chatfold-conversation": plan.history.conversation,
        "x-chatfold-context": _shape(plan.context.shape),
    }
    if plan.degraded:
        headers["x-chatfold-memory"] = "degraded"
    return headers


def _shape(shape: Shape) -> str:
    return "; ".join(f"{name}={value}" for name, value in asdict(shape).items())


def json_response(
    value: Any, *, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(
        wire.encode(value), status_code=status, headers=headers, media_type="application/json"
    )
