"""Templates to responses: escaped everywhere, under a policy that runs no script but our files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response

from proxy.pages.words import ENGLISH, LANGUAGES, WORDS, language_of, teller

FOLDER = Path(__file__).parent
LANGUAGE_COOKIE = "chatfold_language"
YEAR_S = 365 * 86400

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    # Not no-referrer: forms would then be sent with the origin "null".
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "vary": "accept, accept-language, cookie",
}

FILES = {
    "style.css": "text/css; charset=utf-8",
    "search.js": "text/javascript; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "import.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""What a page may load. Nothing else is served, whatever name is asked for."""


class Templates:
    """Reads a template's file when it is first used."""

    def __init__(self) -> None:
        self._environment = Environment(
            loader=FileSystemLoader(FOLDER / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters["when"] = when
        self._environment.filters["check_word"] = check_word
        self._environment.filters["thousands"] = lambda n: f"{n:,}"

    def page(
        self,
        request: Request,
        name: str,
        *,
        status: int = 200,
        headers: dict[str, str] | None = None,
        **values: Any,
    ) -> Response:
        language = language_for(request)
        template = self._environment.get_template(name)
        text = template.render(
            t=teller(language),
            language=language,
            languages=LANGUAGES,
            here=_here(request),
            **values,
        )
        response = Response(
            # Stored text has no surrogates; what a URL brought may.
            text.encode("utf-8", "replace"),
            status_code=status,
            headers=HEADERS | (headers or {}),
            media_type="text/html; charset=utf-8",
        )
        if request.query_params.get("lang") in LANGUAGES:
            response.set_cookie(
                LANGUAGE_COOKIE, language, max_age=YEAR_S, httponly=True, samesite="strict"
            )
        return response


def language_for(request: Request) -> str:
    chosen = request.query_params.get("lang", "")
    if chosen not in LANGUAGES:
        chosen = request.cookies.get(LANGUAGE_COOKIE, "")
    return language_of(chosen=chosen, accepted=request.headers.get("accept-language", ""))


def _here(request: Request) -> str:
    """Where the switch of languages leads: this very page, ready for one more parameter."""
    kept = [(k, v) for k, v in request.query_params.multi_items() if k not in ("lang", "part")]
    url = request.url.replace(scheme="", netloc="", query="").include_query_params(**dict(kept))
    return f"{url.path}?{url.query}&" if url.query else f"{url.path}?"


def when(seconds: float) -> str:
    """A moment in this machine's own time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "-"


def check_word(name: str, tell: Callable[..., str]) -> str:
    """A failed check in the reader's language; its own name where another version stored it."""
    word = f"check_{name}"
    return tell(word) if word in WORDS[ENGLISH] else name


def static_file(name: str) -> Response | None:
    if name not in FILES:
        return None
    headers = HEADERS | {"cache-control": "no-cache"}
    return Response(
        (FOLDER / "static" / name).read_bytes(), headers=headers, media_type=FILES[name]
    )
