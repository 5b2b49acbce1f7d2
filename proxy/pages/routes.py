"""The pages' routes. None of them ends in a word that `librechat.paths` reads as the API's."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from proxy.pages import acts, again, door, live, reading
from proxy.pages.render import static_file

CHAT = "/inspect/c/{conversation}"


def page_routes() -> list[Route]:
    return [
        Route("/", reading.home, methods=["GET"]),
        Route("/inspect/files/{name}", files, methods=["GET"]),
        Route("/inspect/login", door.login_form, methods=["GET"]),
        Route("/inspect/login", door.login, methods=["POST"]),
        Route("/inspect/logout", door.logout, methods=["POST"]),
        Route("/inspect/owners", door.owners, methods=["GET"]),
        Route("/inspect/owner", door.choose_owner, methods=["POST"]),
        Route("/inspect/live", live.live, methods=["GET"]),
        Route("/inspect/events", live.events, methods=["GET"]),
        Route("/inspect/import", acts.ask_import, methods=["GET"]),
        Route("/inspect/import", acts.take_import, methods=["POST"]),
        Route("/inspect/forget", acts.ask_forget_all, methods=["GET"]),
        Route("/inspect/forget", acts.forget_all, methods=["POST"]),
        Route(CHAT, reading.conversation, methods=["GET"]),
        Route(f"{CHAT}/turns", reading.turns, methods=["GET"]),
        Route(f"{CHAT}/summaries", reading.summaries, methods=["GET"]),
        Route(f"{CHAT}/summary/{{summary:int}}", reading.summary, methods=["GET"]),
        Route(f"{CHAT}/branches", reading.branches, methods=["GET"]),
        Route(f"{CHAT}/context", reading.context, methods=["GET"]),
        Route(f"{CHAT}/seen/{{turn:int}}", reading.seen, methods=["GET"]),
        Route(f"{CHAT}/pin", acts.pin, methods=["POST"]),
        Route(f"{CHAT}/unpin/{{pin:int}}", acts.unpin, methods=["POST"]),
        Route(f"{CHAT}/summary/{{summary:int}}/correct", acts.correct, methods=["POST"]),
        Route(f"{CHAT}/message/{{message}}/forget", acts.ask_forget_message, methods=["GET"]),
        Route(f"{CHAT}/message/{{message}}/forget", acts.forget_message, methods=["POST"]),
        Route(f"{CHAT}/again", again.sets, methods=["GET"]),
        Route(f"{CHAT}/again", again.begin, methods=["POST"]),
        Route(f"{CHAT}/again/{{rewrite:int}}", again.comparison, methods=["GET"]),
        Route(f"{CHAT}/again/{{rewrite:int}}/events", again.events, methods=["GET"]),
        Route(f"{CHAT}/again/{{rewrite:int}}/stop", again.stop, methods=["POST"]),
        Route(f"{CHAT}/again/{{rewrite:int}}/go", again.go_on, methods=["POST"]),
        Route(f"{CHAT}/again/{{rewrite:int}}/use", again.use, methods=["POST"]),
        Route(f"{CHAT}/again/{{rewrite:int}}/undo", again.undo, methods=["POST"]),
        Route(f"{CHAT}/again/{{rewrite:int}}/discard", again.discard, methods=["POST"]),
        Route(f"{CHAT}/export.md", acts.export_markdown, methods=["GET"]),
        Route(f"{CHAT}/export.json", acts.export_openai, methods=["GET"]),
        Route(f"{CHAT}/librechat.json", acts.export_librechat, methods=["GET"]),
        Route(f"{CHAT}/forget", acts.ask_forget, methods=["GET"]),
        Route(f"{CHAT}/forget", acts.forget, methods=["POST"]),
    ]


async def files(request: Request) -> Response:
    """Style, scripts and the icon: the same for everybody."""
    found = static_file(request.path_params["name"])
    if found is None:
        raise HTTPException(404)
    return found
