"""Summaries written again under another policy: the sets there are, and two of them side by side.
What the acts do stands in proxy.rewrites."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from memory.records import Rewrite
from memory.rewriting import Run
from proxy import rewrites
from proxy.pages.access import Refused, Visitor
from proxy.pages.chats import Chat, read_chat
from proxy.pages.comparing import FACTS_SHOWN
from proxy.pages.live import progress_words, stream
from proxy.pages.render import language_for
from proxy.pages.serving import chat_of, form, page, see, show
from proxy.pages.words import teller

NUMBER_MOST = 2**53
"""No set has so great a number; SQLite takes none that is much greater."""


@page
async def sets(request: Request, who: Visitor) -> Response:
    chat, state = await chat_of(request, who), request.app.state
    found = await state.store.rewrites(who.owner, chat.entry.id)
    info = state.engine.info
    window = info.budget.window_tokens if info else 0
    values = _values(who, chat) | {
        "sets": [(one, rewrites.state_of(state.rewriter, who.owner, one)) for one in found],
        "window": window,
        "policies": [
            (name, policy, policy.limits(window) if window else None)
            for name, policy in rewrites.policies(state.policy).items()
        ],
        "newest": min(rewrites.NEWEST_DEFAULT, len(chat.active)),
    }
    return show(request, "again.html", **values)


@page
async def begin(request: Request, who: Visitor) -> Response:
    fields = await form(request, who)
    chat, state = await chat_of(request, who), request.app.state
    knobs = {knob: fields.get(knob, "").strip() for knob in rewrites.KNOBS}
    policy = rewrites.policy_of(state.policy, fields.get("policy", ""), knobs)
    newest = fields.get("newest", "")
    n = int(newest) if newest.isascii() and newest.isdigit() and len(newest) < 7 else 0
    stored = await rewrites.begin(state, chat, policy, newest=n or rewrites.NEWEST_DEFAULT)
    return see(f"/inspect/c/{chat.entry.id}/again/{stored.id}")


@page
async def comparison(request: Request, who: Visitor) -> Response:
    """While it is being written it says how far it is; then both sides."""
    chat, one = await _set_of(request, who)
    state = request.app.state
    at = rewrites.state_of(state.rewriter, who.owner, one)
    values = _values(who, chat) | {
        "set": one,
        "state": at,
        "trouble": state.rewriter.trouble(who.owner, one.id),
        "progress": _facts(request, one, state.rewriter.run(who.owner, one.id)).get("again", ""),
        "compared": None,
        "before": rewrites.before_of(chat, one),
        "facts_shown": FACTS_SHOWN,
        "configured": state.policy.name,
        "knobs": rewrites.other_knobs(state.policy, one),
    }
    if one.finished_at is not None and values["before"] and one.blocks:
        values["compared"] = await rewrites.compared(state.store, chat, one)
    return show(request, "compare.html", **values)


@page
async def events(request: Request, who: Visitor) -> Response:
    chat, one = await _set_of(request, who)
    rewriter, owner = request.app.state.rewriter, chat.owner
    return stream(request, lambda: _facts(request, one, rewriter.run(owner, one.id)))


def _facts(request: Request, one: Rewrite, run: Run | None) -> dict[str, str]:
    if run is None:
        return {"over": "1"}
    t = teller(language_for(request))
    if not run.at_work:
        return {"again": t("again_waits", done=run.done, of=run.of)}
    model = request.app.state.again
    told = t("again_runs", done=run.done, of=run.of, n=run.blocks)
    if model.doing and model.doing.owner == run.job.owner:
        told = f"{told} {progress_words(t, model.doing, run.span)}"
    return {"again": told}


@page
async def stop(request: Request, who: Visitor) -> Response:
    await form(request, who)
    chat, one = await _set_of(request, who)
    request.app.state.rewriter.cancel(who.owner, one.id)
    return _to(chat, one)


@page
async def go_on(request: Request, who: Visitor) -> Response:
    await form(request, who)
    chat, one = await _set_of(request, who)
    await rewrites.go_on(request.app.state, chat, one)
    return _to(chat, one)


@page
async def use(request: Request, who: Visitor) -> Response:
    await form(request, who)
    chat, one = await _set_of(request, who)
    await rewrites.use(request.app.state, chat, one)
    return _to(chat, one)


@page
async def undo(request: Request, who: Visitor) -> Response:
    await form(request, who)
    chat, one = await _set_of(request, who)
    await rewrites.undo(request.app.state, chat, one)
    return _to(chat, one)


@page
async def discard(request: Request, who: Visitor) -> Response:
    await form(request, who)
    chat, one = await _set_of(request, who)
    await rewrites.discard(request.app.state, who.owner, chat.entry.id, one.id)
    return see(f"/inspect/c/{chat.entry.id}/again", leaf=chat.leaf.hex())


def _to(chat: Chat, one: Rewrite) -> Response:
    return see(f"/inspect/c/{chat.entry.id}/again/{one.id}")


async def _set_of(request: Request, who: Visitor) -> tuple[Chat, Rewrite]:
    """The set that the path names, and its conversation on a path that its messages lie on."""
    store, id_ = request.app.state.store, request.path_params["conversation"]
    number = min(request.path_params["rewrite"], NUMBER_MOST)
    one = await store.rewrite(who.owner, id_, number)
    chat = await read_chat(store, who.owner, id_, one.last_digest.hex()) if one else None
    if one is None or chat is None:
        raise Refused("not_found", 404)
    return chat, one


def _values(who: Visitor, chat: Chat) -> dict[str, Any]:
    return {"visitor": who, "at": "list", "chat": chat, "tab": "again", "said": ""}
