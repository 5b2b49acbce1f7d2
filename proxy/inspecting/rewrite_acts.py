"""What the inspector's API does with sets of summaries that are written again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Any

import msgspec
from starlette.requests import Request

from proxy import rewrites, sse
from proxy.errors import bad_request
from proxy.inspecting.rewrite_views import UNDER_WAY, outline, progress, set_of
from proxy.inspecting.views import Desk, NotThere
from proxy.pages.live import LOOK_S
from proxy.requests import read_body

ASKED_BYTES = 64 * 1024
NEWEST_MOST = 10**6


class Asked(msgspec.Struct, forbid_unknown_fields=True):
    """`newest`: how many of the summaries in use, the newest first."""

    policy: str
    newest: Annotated[int, msgspec.Meta(ge=1, le=NEWEST_MOST)] = rewrites.NEWEST_DEFAULT
    knobs: dict[str, str | int | float] = {}


ASKED = msgspec.json.Decoder(Asked)


async def begin(request: Request, desk: Desk) -> Any:
    body = await read_body(request, ASKED_BYTES)
    try:
        asked = ASKED.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise bad_request(f'The body must be JSON like {{"policy": "balanced"}}: {exc}.') from exc
    chat = await desk.chat(_words(request) | {"leaf": request.query_params.get("leaf", "")})
    state = request.app.state
    knobs = {name: str(value) for name, value in asked.knobs.items()}
    policy = rewrites.policy_of(state.policy, asked.policy, knobs)
    stored = await rewrites.begin(state, chat, policy, newest=asked.newest)
    return outline(desk, stored)


async def use(request: Request, desk: Desk) -> Any:
    chat, one = await set_of(desk, _words(request))
    await rewrites.use(request.app.state, chat, one)
    return await _now(request, desk)


async def undo(request: Request, desk: Desk) -> Any:
    chat, one = await set_of(desk, _words(request))
    await rewrites.undo(request.app.state, chat, one)
    return await _now(request, desk)


async def stop(request: Request, desk: Desk) -> Any:
    _, one = await set_of(desk, _words(request))
    request.app.state.rewriter.cancel(desk.owner, one.id)
    return await _now(request, desk)


async def go_on(request: Request, desk: Desk) -> Any:
    chat, one = await set_of(desk, _words(request))
    await rewrites.go_on(request.app.state, chat, one)
    return await _now(request, desk)


async def discard(request: Request, desk: Desk) -> Any:
    chat, one = await set_of(desk, _words(request))
    await rewrites.discard(request.app.state, desk.owner, chat.entry.id, one.id)
    return {"discarded": one.id}


async def events(request: Request, desk: Desk) -> AsyncGenerator[bytes, None]:
    """How far a set is: an event whenever that changes, the last one when it is not under way any
    more. Raises NotThere."""
    await set_of(desk, _words(request))
    return _events(request, desk)


async def _events(request: Request, desk: Desk) -> AsyncGenerator[bytes, None]:
    last: Any = None
    while not request.app.state.stopping():
        try:
            _, one = await set_of(desk, _words(request))
        except NotThere:
            return
        now = progress(desk, one) | {"doing": _doing(request, desk)}
        if now != last:
            yield sse.data(now)
            last = now
        if now["state"] not in UNDER_WAY:
            return
        await asyncio.sleep(LOOK_S)


def _doing(request: Request, desk: Desk) -> Any:
    """How far the block at hand is; None where another owner's is written, or none."""
    doing, run = request.app.state.again.doing, desk.rewriter and desk.rewriter.run_of(desk.owner)
    if not (doing and run and run.at_work and doing.owner == desk.owner):
        return None
    return {
        "first_depth": run.span[0] if run.span else None,
        "last_depth": run.span[1] if run.span else None,
        "read_tokens": doing.read,
        "of_tokens": doing.of,
        "written_tokens": doing.written,
    }


async def _now(request: Request, desk: Desk) -> Any:
    _, one = await set_of(desk, _words(request))
    return outline(desk, one)


def _words(request: Request) -> dict[str, str]:
    return {name: str(value) for name, value in request.path_params.items()}


ACTS = {"use": use, "undo": undo, "stop": stop, "go": go_on}
"""What is posted below a set's own path, by its last part."""
