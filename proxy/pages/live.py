"""What chatfold is doing, while it happens: a page, and server-sent events that keep it true."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from proxy import sse
from proxy.background import Doing
from proxy.disconnect import EventStream
from proxy.pages.access import LoginNeeded, Refused, Visitor
from proxy.pages.render import language_for
from proxy.pages.serving import page, show, visitor
from proxy.pages.words import teller

LOOK_S = 0.5
"""From one look at the state to the next. It is sent only where it changed."""


@page
async def live(request: Request, who: Visitor) -> Response:
    return show(request, "live.html", visitor=who, at="live", facts=_facts(request, who))


@page
async def events(request: Request, who: Visitor) -> Response:
    return stream(request, lambda: _facts(request, who))


def stream(request: Request, look: Callable[[], dict[str, str]]) -> Response:
    """Server-sent events: what `look` gives, first all of it and then what has changed. Ends where
    the session does, behind a fact named `over`, and as soon as the proxy is told to stop: it is no
    answer that somebody waits for."""
    return EventStream(_changes(request, look), ping_s=request.app.state.config.timeouts.ping_s)


async def _changes(
    request: Request, look: Callable[[], dict[str, str]]
) -> AsyncGenerator[bytes, None]:
    last: dict[str, str] = {}
    while not request.app.state.stopping() and _may_go_on(request) and "over" not in last:
        facts = look()
        if facts != last:
            yield sse.data({k: v for k, v in facts.items() if last.get(k) != v})
            last = facts
        await asyncio.sleep(LOOK_S)


def _may_go_on(request: Request) -> bool:
    try:
        visitor(request)
    except (LoginNeeded, Refused):
        return False
    return True


def _facts(request: Request, who: Visitor) -> dict[str, str]:
    state = request.app.state
    background = {"running": state.keeper.running, "pending": state.keeper.pending}
    t = teller(language_for(request))
    facts = facts_of(state.engine.status())
    facts["background"] = t("live_background_now", **background)
    facts["progress"] = progress_now(request, who.owner) or "-"
    classes = ("chat", "side", "background")
    for name in ("running", "waiting"):
        counts = facts[name].split("/")
        facts[name] = ", ".join(
            f"{t(cls + '_class')} {n}" for cls, n in zip(classes, counts, strict=True)
        )
    return facts


def progress_now(request: Request, owner: str) -> str:
    """What is done in the background of this owner's chats, and how far it is; "" for nothing.
    Of others' chats nothing is told."""
    state, t = request.app.state, teller(language_for(request))
    run = state.rewriter.run_of(owner)
    found = []
    workers = ((state.background, state.keeper.span), (state.again, run.span if run else None))
    for model, span in workers:
        if model.doing and model.doing.owner == owner:
            found.append(progress_words(t, model.doing, span))
    return "; ".join(found)


def progress_words(t: Callable[..., str], doing: Doing, span: tuple[int, int] | None) -> str:
    if not doing.most:
        what = t("progress_warming")
    elif span:
        what = t("progress_messages", first=span[0] + 1, last=span[1] + 1)
    else:
        what = t("progress_summarising")
    if not doing.of:
        return t("progress_waits", what=what)
    if not doing.most or doing.read < doing.of:
        return t("progress_reads", what=what, read=doing.read, of=doing.of)
    values = {"of": doing.of, "written": doing.written, "most": doing.most}
    return t("progress_writes", what=what, **values)


def facts_of(status: Mapping[str, Any]) -> dict[str, str]:
    """An engine's status in a few words. Numbers of the whole machine: nothing of any owner."""
    cells = status.get("cells")
    facts = {
        "engine": str(status.get("model") or "-"),
        "running": _counts(status.get("running")),
        "waiting": _counts(status.get("waiting")),
        "background": "",
    }
    if trouble := status.get("trouble"):
        facts["engine"] = str(trouble)
    if cells == 0:  # the model is being loaded: a page that is open then fills these in later
        facts |= dict.fromkeys(("cells", "sequences", "snapshots"), "-")
    if cells:
        share = 100 * status["cells_used"] // cells
        facts["cells"] = f"{status['cells_used']:,} / {cells:,} ({share} %)"
        facts["sequences"] = f"{status['sequences_used']:,}"
        size = status["snapshot_bytes"] / 1e6
        facts["snapshots"] = f"{status['snapshots']:,} ({size:,.0f} MB)"
    return facts


def _counts(by_class: Mapping[str, int] | None) -> str:
    found = by_class or {}
    return "/".join(str(found.get(name, 0)) for name in ("chat", "side", "background"))
