"""What all pages share: who asks, whose chats they are, and what is said when it goes wrong."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import wraps
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from memory.context import DoesNotFit
from memory.store import Store, StoreError
from proxy.config import Config
from proxy.engines.base import EngineError
from proxy.errors import ApiError, as_api_error, bad_request
from proxy.headers import owner_of
from proxy.pages.access import (
    COOKIE,
    LoginNeeded,
    Refused,
    Sessions,
    Visitor,
    require_own_act,
    visitor_of,
)
from proxy.pages.chats import Chat, read_chat
from proxy.pages.render import HEADERS, language_for
from proxy.pages.words import teller
from proxy.requests import read_body

FORM_BYTES = 256 * 1024
SEE_OTHER = 303

Page = Callable[[Request, Visitor], Awaitable[Response]]
Endpoint = Callable[[Request], Awaitable[Response]]


class ChooseOwner(Exception):
    """Several owners have conversations here, and none was chosen."""


def page(work: Page) -> Endpoint:
    """A page for whoever may see it, with an owner chosen."""

    @wraps(work)
    async def endpoint(request: Request) -> Response:
        async def serve() -> Response:
            return await work(request, await with_owner(request, visitor(request)))

        return await guarded(request, serve)

    return endpoint


async def guarded(request: Request, serve: Callable[[], Awaitable[Response]]) -> Response:
    """What `serve` answers; what it raises becomes a page that says so in the reader's
    language."""
    try:
        return await serve()
    except LoginNeeded:
        return see("/inspect/login")
    except ChooseOwner:
        return see("/inspect/owners")
    except Refused as exc:
        return failure(request, exc.status, word=exc.word)
    except DoesNotFit as exc:
        return failure(request, 400, sentence=str(exc))
    except (ApiError, StoreError, EngineError) as exc:
        error = as_api_error(exc)
        return failure(request, error.status, sentence=error.message)


def visitor(request: Request) -> Visitor:
    """Raises LoginNeeded or Refused."""
    config: Config = request.app.state.config
    sessions: Sessions = request.app.state.sessions
    return visitor_of(
        sessions,
        headers=request.headers,
        cookie=request.cookies.get(COOKIE, ""),
        client=request.client.host if request.client else "",
        keys=config.api_keys,
        inspect=config.inspect,
    )


async def with_owner(request: Request, who: Visitor) -> Visitor:
    """Raises ChooseOwner. Where only one owner has conversations it is that one."""
    if who.owner:
        return who
    store: Store = request.app.state.store
    found = await store.owners()
    if len(found) > 1:
        raise ChooseOwner
    return replace(who, owner=found[0].key if found else owner_of({}))


async def form(request: Request, who: Visitor) -> dict[str, str]:
    """The fields of a form of ours. Raises Refused where it is not, and ApiError."""
    fields = await form_fields(request)
    require_own_act(request.headers, token=who.token, sent=fields.get("token", ""))
    return fields


async def form_fields(request: Request) -> dict[str, str]:
    body = await read_body(request, FORM_BYTES)
    try:
        return dict(parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=64))
    except (UnicodeDecodeError, ValueError) as exc:
        raise bad_request("This is no form.") from exc


async def chat_of(request: Request, who: Visitor) -> Chat:
    """The conversation that the path names, on the branch that the query names."""
    id_, leaf = request.path_params["conversation"], request.query_params.get("leaf", "")
    chat = await read_chat(request.app.state.store, who.owner, id_, leaf)
    if chat is None:
        raise Refused("not_found", 404)
    return chat


def see(path: str, **query: object) -> Response:
    """To another page, after an act or before a login."""
    url = f"{path}?{urlencode(query)}" if query else path
    return RedirectResponse(url, SEE_OTHER, headers=HEADERS)


def show(request: Request, name: str, **values: Any) -> Response:
    response: Response = request.app.state.templates.page(request, name, **values)
    return response


def failure(request: Request, status: int, *, word: str = "", sentence: str = "") -> Response:
    """As a page, or in the shape of the API for whoever does not read HTML."""
    said = teller(language_for(request))(word) if word else sentence
    if not wants_html(request):
        return ApiError(status, said).response()
    values = {"sentence": said, "visitor": None, "at": ""}
    return show(request, "error.html", status=status, **values)


def wants_html(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")


def number(request: Request, name: str, default: int = 1) -> int:
    """A number of the query, at least 1; the default where it is none."""
    text = request.query_params.get(name, "")
    return max(1, int(text)) if text.isascii() and text.isdigit() and len(text) < 10 else default
