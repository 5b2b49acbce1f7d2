"""The inspector's part of the HTTP API: what its pages show and do, as JSON. For whoever may open
the pages: with an API key, or without one where none is set, from the machine itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from memory.context import DoesNotFit
from memory.ports import TokenCounter
from proxy import sse
from proxy.background import EngineTokens
from proxy.config import Config
from proxy.disconnect import EventStream
from proxy.engines.base import EngineUnavailable, ModelInfo
from proxy.errors import ApiError, bad_request
from proxy.exports import ExportError
from proxy.forgetting import forgotten
from proxy.headers import bearer_token, owner_of
from proxy.inspecting import acts, rewrite_acts
from proxy.inspecting.paths import CHAT, VIEWS, View
from proxy.inspecting.views import BadQuestion, Desk, NotThere, summary_of
from proxy.pages.access import OWNER_NAME, Refused, owner_for, require_own_origin
from proxy.pages.acts import wake
from proxy.pages.chats import digest_in
from proxy.pages.importing import import_file
from proxy.pages.live import LOOK_S
from proxy.pages.render import HEADERS
from proxy.pages.serving import visitor
from proxy.pages.words import teller
from proxy.requests import check_key, json_response, read_body

TEXT_BYTES = 256 * 1024
TEXT = msgspec.json.Decoder(dict[str, str])

Endpoint = Callable[[Request], Awaitable[Response]]
Work = Callable[[Request, Desk], Awaitable[Any]]


def api_routes() -> list[Route]:
    reads = [Route(f"/api{path}", _reads(view), methods=["GET"]) for path, view in VIEWS.values()]
    chat, rewrite = f"/api{CHAT}", f"/api{VIEWS['rewrite'][0]}"
    return [
        *reads,
        Route("/api/owners", owners, methods=["GET"]),
        Route("/api/live", live, methods=["GET"]),
        Route("/api/import", _acts(take_import), methods=["POST"]),
        Route(f"{chat}/pins", _acts(pin), methods=["POST"]),
        Route(f"{chat}/pins/{{pin:int}}", _acts(unpin), methods=["DELETE"]),
        Route(f"{chat}/summaries/{{summary:int}}", _acts(correct), methods=["PUT"]),
        Route(f"{chat}/messages/{{message}}", _acts(forget_message), methods=["DELETE"]),
        Route(f"{chat}/rewrites", _acts(rewrite_acts.begin), methods=["POST"]),
        Route(rewrite, _acts(rewrite_acts.discard), methods=["DELETE"]),
        Route(f"{rewrite}/events", rewrite_events, methods=["GET"]),
        *[
            Route(f"{rewrite}/{name}", _acts(work), methods=["POST"])
            for name, work in rewrite_acts.ACTS.items()
        ],
    ]


async def owner_asked_for(request: Request) -> str:
    """Whose chats a request is about: `?owner=` is an owner's name or a user's id; without it the
    key's own, or where there is no key the only one. Raises ApiError."""
    asked = request.query_params.get("owner", "")
    if keys := _require_entry(request):
        return owner_for(bearer_token(request.headers), asked, keys)
    if asked:
        return asked if OWNER_NAME.fullmatch(asked) else owner_of({}, asked)
    found = await request.app.state.store.owners()
    if len(found) > 1:
        raise bad_request(f"There are {len(found)} owners: name one of them.", param="owner")
    return found[0].key if found else owner_of({})


def _require_entry(request: Request) -> tuple[str, ...]:
    """The keys of which the request has one; none where the machine itself may look without.
    Raises ApiError."""
    config: Config = request.app.state.config
    if config.api_keys and config.inspect != "off":
        check_key(request)
        return config.api_keys
    with _said():
        visitor(request)
    return ()


async def desk_of(request: Request) -> Desk:
    """Raises ApiError."""
    state = request.app.state

    async def model() -> tuple[TokenCounter, ModelInfo]:
        if state.engine.info is None:
            raise EngineUnavailable("The model is not loaded yet.")
        return EngineTokens(state.engine), state.engine.info

    owner = await owner_asked_for(request)
    return Desk(state.store, owner, state.policy, model, state.rewriter)


def _reads(view: View) -> Endpoint:
    async def work(request: Request, desk: Desk) -> Any:
        return await view(desk, dict(request.query_params) | _words(request))

    return _answering(work)


def _acts(work: Work) -> Endpoint:
    async def own(request: Request, desk: Desk) -> Any:
        with _said():
            require_own_origin(request.headers)
        return await work(request, desk)

    return _answering(own)


def _answering(work: Work) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        desk = await desk_of(request)
        with _said():
            return json_response(await work(request, desk), headers=HEADERS)

    return endpoint


@contextmanager
def _said() -> Iterator[None]:
    """What goes wrong here in the shape of the API."""
    try:
        yield
    except Refused as exc:
        raise ApiError(exc.status, teller("en")(exc.word)) from exc
    except NotThere as exc:
        raise ApiError(404, _sentence(exc), code="not_found") from exc
    except (BadQuestion, acts.NotDone, ExportError, DoesNotFit) as exc:
        raise bad_request(_sentence(exc)) from exc


def _sentence(exc: Exception) -> str:
    text = str(exc)
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _words(request: Request) -> dict[str, str]:
    return {name: str(value) for name, value in request.path_params.items()}


async def owners(request: Request) -> Response:
    """All owners, for who needs no key: whoever sits at the machine."""
    if _require_entry(request):
        raise ApiError(403, "With an API key there is no list of owners: name the user's id.")
    found = await request.app.state.store.owners()
    return json_response([owner._asdict() for owner in found], headers=HEADERS)


async def live(request: Request) -> Response:
    """What runs, waits and is done in the background: an event whenever it changes."""
    _require_entry(request)
    return EventStream(_changes(request), ping_s=request.app.state.config.timeouts.ping_s)


async def _changes(request: Request) -> AsyncGenerator[bytes, None]:
    """Ends as soon as the proxy is told to stop."""
    state = request.app.state
    last: dict[str, Any] = {}
    while not state.stopping():
        keeper = state.keeper
        background = {"running": keeper.running, "pending": keeper.pending}
        now = {"engine": state.engine.status(), "background": background}
        if now != last:
            yield sse.data(now)
            last = now
        await asyncio.sleep(LOOK_S)


async def rewrite_events(request: Request) -> Response:
    """How far a set of summaries is that is written again."""
    desk = await desk_of(request)
    with _said():
        found = await rewrite_acts.events(request, desk)
    return EventStream(found, ping_s=request.app.state.config.timeouts.ping_s)


# -- acts ----------------------------------------------------------------------------------------


async def pin(request: Request, desk: Desk) -> Any:
    chat = await desk.chat(_words(request))
    made = await acts.pin(desk.store, chat, await _text(request))
    await wake(request, chat)
    return {"id": made.id, "text": made.text}


async def unpin(request: Request, desk: Desk) -> Any:
    chat, id_ = await desk.chat(_words(request)), request.path_params["pin"]
    if not await desk.store.unpin(desk.owner, chat.entry.id, id_):
        raise NotThere(f"there is no pinned fact {id_} in this conversation")
    await wake(request, chat)
    return {"unpinned": id_}


async def correct(request: Request, desk: Desk) -> Any:
    chat = await desk.chat(_words(request) | _leaf(request))
    old = summary_of(chat, request.path_params["summary"])
    counter, _ = await desk.model()
    new = await acts.correct(desk.store, counter, chat, old, await _text(request))
    await wake(request, chat)
    return {"id": new.id, "instead_of": old.id}


async def forget_message(request: Request, desk: Desk) -> Any:
    chat = await desk.chat(_words(request))
    digest = digest_in(request.path_params["message"])
    if not chat.tree.path(digest):
        raise NotThere("there is no such message in this conversation")
    await forgotten(
        request.app.state, desk.owner, lambda: desk.store.forget_message(desk.owner, digest)
    )
    await wake(request, chat)
    return {"deleted_messages": 1}


async def take_import(request: Request, desk: Desk) -> Any:
    body = await read_body(request, request.app.state.config.max_body_bytes)
    found = await import_file(desk.store, desk.owner, body)
    return {"conversations": found.conversations, "messages": found.messages}


def _leaf(request: Request) -> dict[str, str]:
    return {"leaf": request.query_params.get("leaf", "")}


async def _text(request: Request) -> str:
    """Raises ApiError."""
    body = await read_body(request, TEXT_BYTES)
    try:
        return TEXT.decode(body).get("text", "")
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise bad_request('The body must be JSON: {"text": "..."}.', param="text") from exc
