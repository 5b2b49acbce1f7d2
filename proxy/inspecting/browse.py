"""`chatfold inspect --datasette`: the database in Datasette, read-only, for this machine alone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from memory.catalogue import metadata
from memory.store import Store
from proxy.inspecting.sources import SourceError

HOST = "127.0.0.1"
NAMES = [HOST, "localhost", "[::1]"]
PORT = 8001
SETTINGS = {
    "sql_time_limit_ms": 5000,
    "default_cache_ttl": 0,
    "allow_download": False,
    "truncate_cells_html": 400,
}
MISSING = (
    "Datasette is not installed: install it from requirements-datasette.lock (docs/inspect.md says "
    "how), or as the extra chatfold[datasette]"
)


def browse(path: Path, *, port: int, tell: Callable[[str], None]) -> None:
    """Serves until it is interrupted. `tell` gets the address. Raises SourceError and
    StoreError."""
    import uvicorn

    asyncio.run(_require_store(path))
    app = application(path)
    with _listen(port) as listener:
        tell(f"http://{HOST}:{listener.getsockname()[1]}/{path.stem}")
        config = uvicorn.Config(app, http="h11", ws="none", log_level="warning", lifespan="off")
        uvicorn.Server(config).run(sockets=[listener])


def application(path: Path) -> ASGIApp:
    """Datasette over this file, in SQLite's read-only mode: not `immutable`, since a proxy may be
    writing. Answers under the machine's own names only, or a page from elsewhere could have its
    name lead here and read all chats. Raises SourceError."""
    try:
        from datasette.app import Datasette
    except ImportError as exc:
        raise SourceError(MISSING) from exc
    made: Any = Datasette([str(path)], metadata=metadata(path.stem), settings=SETTINGS)
    return TrustedHostMiddleware(OnlyReads(made.app()), allowed_hosts=NAMES, www_redirect=False)


class OnlyReads:
    """Middleware: nothing that is posted comes in."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            refused = PlainTextResponse("Nothing can be changed here.", 405)
            await refused(scope, receive, send)
            return
        await self._app(scope, receive, send)


async def _require_store(path: Path) -> None:
    """Datasette would say of a file that is missing or older what nobody understands."""
    store = await Store.open_read_only(path)
    await store.close()


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port))
    except OSError as exc:
        raise SourceError(f"cannot listen on {HOST} port {port}: {exc.strerror}") from exc
