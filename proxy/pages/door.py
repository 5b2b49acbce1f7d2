"""Coming in and going out: a key's login, and the choice among owners on the machine itself."""

from __future__ import annotations

import hmac

from starlette.requests import Request
from starlette.responses import Response

from proxy.config import Config
from proxy.errors import ApiError
from proxy.pages.access import (
    COOKIE,
    SESSION_S,
    LoginNeeded,
    Refused,
    Sessions,
    Visitor,
    owner_for,
    require_own_act,
)
from proxy.pages.serving import form, form_fields, guarded, see, show, visitor

UNAUTHORIZED = 401


async def login_form(request: Request) -> Response:
    async def serve() -> Response:
        return see("/") if _known(request) else _form(request)

    return await guarded(request, serve)


async def login(request: Request) -> Response:
    async def serve() -> Response:
        config: Config = request.app.state.config
        sessions: Sessions = request.app.state.sessions
        _known(request)
        fields = await form_fields(request)
        token = sessions.token("")
        require_own_act(request.headers, token=token, sent=fields.get("token", ""))
        try:
            owner = owner_for(fields.get("key", ""), fields.get("user", ""), config.api_keys)
        except ApiError:
            return _form(request, failed=True)
        return _begun(request, owner, local=False)

    return await guarded(request, serve)


def _known(request: Request) -> Visitor | None:
    """None where a login would help. Raises Refused where it would not."""
    try:
        return visitor(request)
    except LoginNeeded:
        return None


def _form(request: Request, *, failed: bool = False) -> Response:
    token = request.app.state.sessions.token("")
    status = UNAUTHORIZED if failed else 200
    values = {"visitor": None, "at": "", "token": token, "failed": failed}
    return show(request, "login.html", status=status, **values)


def _begun(request: Request, owner: str, *, local: bool) -> Response:
    response = see("/")
    response.set_cookie(
        COOKIE,
        request.app.state.sessions.begin(owner, local=local),
        max_age=int(SESSION_S),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


async def logout(request: Request) -> Response:
    async def serve() -> Response:
        await form(request, visitor(request))
        request.app.state.sessions.end(request.cookies.get(COOKIE, ""))
        response = see("/")
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response

    return await guarded(request, serve)


async def owners(request: Request) -> Response:
    """All owners, for who needs no key: whoever sits at the machine."""

    async def serve() -> Response:
        who = _local(request)
        found = await request.app.state.store.owners()
        return show(request, "owners.html", visitor=who, at="", owners=found)

    return await guarded(request, serve)


async def choose_owner(request: Request) -> Response:
    async def serve() -> Response:
        wanted = (await form(request, _local(request))).get("owner", "")
        known = [owner.key for owner in await request.app.state.store.owners()]
        if not any(hmac.compare_digest(key.encode(), wanted.encode()) for key in known):
            raise Refused("not_found", 404)
        return _begun(request, wanted, local=True)

    return await guarded(request, serve)


def _local(request: Request) -> Visitor:
    who = visitor(request)
    if not who.local:
        raise Refused("not_found", 404)
    return who
