"""Hands each request to the route that its path means."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.librechat.paths import route_of


class AnyPath:
    """Middleware before the routes: a path that ends in a route of the OpenAI API becomes that
    route. All other paths stay as they are, for the 404 to name."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (route := route_of(scope["path"], scope["method"])):
            # In place: who counts requests reads from this very scope which endpoint it was.
            scope["path"], scope["raw_path"] = route, route.encode()
        await self.app(scope, receive, send)
