"""The pages that show: conversations, one of them, its summaries, what the model would see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from memory.listing import Found
from memory.store import Store
from proxy.background import EngineTokens
from proxy.pages.access import Refused, Visitor
from proxy.pages.changes import changes
from proxy.pages.charts import COLUMNS_MOST, charts
from proxy.pages.chats import Chat, context_now, read_turns, seen_at
from proxy.pages.render import language_for
from proxy.pages.serving import (
    chat_of,
    guarded,
    number,
    page,
    show,
    visitor,
    wants_html,
    with_owner,
)
from proxy.pages.snippets import snippet
from proxy.pages.timeline import Picture, with_strips
from proxy.pages.trees import Turn
from proxy.pages.warmth import left_at, warmth_now
from proxy.pages.words import teller

ENTRIES = 50
TURNS = 25
NEWEST_TURNS = 3
CARDS = 20
BRANCHES = 100
HITS = 20
TYPED_CHARS = 400


async def home(request: Request) -> Response:
    """The list for a browser; for all others nothing is here."""
    if not wants_html(request):
        raise HTTPException(404)

    async def serve() -> Response:
        return await _list(request, await with_owner(request, visitor(request)))

    return await guarded(request, serve)


async def _list(request: Request, who: Visitor) -> Response:
    store: Store = request.app.state.store
    typed = request.query_params.get("q", "")[:TYPED_CHARS]
    n_all = await store.n_conversations(who.owner)
    pages = max(1, -(-n_all // ENTRIES))
    at = min(number(request, "page"), pages)
    values: dict[str, Any] = {"typed": typed, "n_all": n_all, "page": at, "pages": pages}
    values |= {"messages": [], "summaries": [], "entries": [], "visitor": who, "at": "list"}
    if typed.strip():
        values |= _hits(await store.find(who.owner, typed, limit=HITS), typed)
    else:
        offset = ENTRIES * (at - 1)
        values["entries"] = await store.conversations(who.owner, limit=ENTRIES, offset=offset)
    part = request.query_params.get("part") == "results"
    return show(request, "results.html" if part else "list.html", said=_said(request), **values)


def _hits(found: Found, typed: str) -> dict[str, Any]:
    begins = {id_: entry.begins for id_, entry in found.entries.items()}
    return {
        "messages": [
            {
                "conversation": conversation,
                "leaf": node.digest.hex(),
                "depth": node.depth,
                "role": node.role,
                "pieces": snippet(node.text, typed),
                "begins": begins.get(conversation, ""),
            }
            for conversation, node in found.messages
        ],
        "summaries": [
            {
                "conversation": s.conversation,
                "leaf": s.last_digest.hex(),
                "id": s.id,
                "pieces": snippet(s.text, typed),
                "begins": begins.get(s.conversation, ""),
            }
            for s in found.summaries
        ],
    }


def _said(request: Request) -> str:
    """What an act that led here has done."""
    if "forgotten" not in request.query_params:
        return ""
    return teller(language_for(request))("forgotten", n=number(request, "forgotten"))


def _chat_values(who: Visitor, chat: Chat, tab: str) -> dict[str, Any]:
    return {"visitor": who, "at": "list", "chat": chat, "tab": tab, "said": ""}


@page
async def conversation(request: Request, who: Visitor) -> Response:
    chat = await chat_of(request, who)
    store: Store = request.app.state.store
    turns = await read_turns(store, chat, chat.turns[-NEWEST_TURNS:])
    first = chat.turns[-COLUMNS_MOST:][0].first
    answers = await store.answers(who.owner, chat.digests[first:])
    values = _chat_values(who, chat, "overview")
    values["charts"] = charts(chat.turns, chat.digests, answers)
    values["pins"] = await store.pins(who.owner, chat.entry.id)
    values["warm"], picture = await _warmth(request, chat)
    return show(request, "overview.html", picture=picture, turns=turns, **values)


async def _warmth(request: Request, chat: Chat) -> tuple[str, Picture]:
    """In words, and in the timeline's picture."""
    state, t = request.app.state, teller(language_for(request))
    found = await warmth_now(state.store, state.engine, state.policy, chat)
    if found is None:
        return t(f"warm_{left_at(state.engine, chat) or 'unknown'}"), chat.picture()
    drawn = with_strips(
        chat.picture(), chat.turns, in_memory=found.in_memory, on_disk=found.on_disk
    )
    held = found.tokens
    if held.on_disk > held.in_memory:
        word = "warm_disk"
    else:
        word = "warm_memory" if held.in_memory else "warm_cold"
    return t(word, n=held.in_memory, of=held.of, disk=held.on_disk), drawn


@page
async def turns(request: Request, who: Visitor) -> Response:
    """The newest first page by page, within a page in order: `depth` leads to the page of that
    message."""
    chat = await chat_of(request, who)
    pages = _pages(chat.turns, TURNS)
    at = min(number(request, "page"), len(pages))
    if "depth" in request.query_params:
        depth = number(request, "depth", 0)
        at = next((i for i, p in enumerate(pages, 1) if p[0].first <= depth), len(pages))
    shown = await read_turns(request.app.state.store, chat, pages[at - 1])
    values = _chat_values(who, chat, "turns")
    return show(request, "turns.html", turns=shown, page=at, pages=len(pages), **values)


def _pages(turns: Sequence[Turn], size: int) -> list[Sequence[Turn]]:
    """The newest ones on the first page, and whole pages behind it."""
    starts = range(0, len(turns), size)
    return [turns[start : start + size] for start in reversed(starts)]


@page
async def summaries(request: Request, who: Visitor) -> Response:
    chat = await chat_of(request, who)
    ordered = sorted(chat.summaries, key=lambda s: (s not in chat.active, -s.last_depth, -s.id))
    pages = max(1, -(-len(ordered) // CARDS))
    at = min(number(request, "page"), pages)
    shown = ordered[CARDS * (at - 1) : CARDS * at]
    values = _chat_values(who, chat, "summaries") | {"page": at, "pages": pages}
    return show(request, "summaries.html", picture=chat.picture(), summaries=shown, **values)


@page
async def summary(request: Request, who: Visitor) -> Response:
    chat = await chat_of(request, who)
    found = chat.summary(int(request.path_params["summary"]))
    if found is None:
        raise Refused("not_found", 404)
    behind = [t for t in chat.turns if found.first_depth <= t.last and t.first <= found.last_depth]
    starts = range(0, len(behind), TURNS)
    at = min(number(request, "page"), max(1, len(starts)))
    shown = await read_turns(request.app.state.store, chat, behind[TURNS * (at - 1) : TURNS * at])
    values = _chat_values(who, chat, "summaries") | {"page": at, "pages": len(starts)}
    values["parents"] = [s for s in chat.summaries if s.id in found.parents]
    values["children"] = [s for s in chat.summaries if found.id in s.parents]
    return show(request, "summary.html", summary=found, turns=shown, **values)


@page
async def branches(request: Request, who: Visitor) -> Response:
    chat = await chat_of(request, who)
    found = chat.tree.branches()
    pages = max(1, -(-len(found) // BRANCHES))
    at = min(number(request, "page"), pages)
    shown = found[BRANCHES * (at - 1) : BRANCHES * at]
    nodes = await request.app.state.store.nodes(who.owner, [b.begins_with for b in shown])
    begins = {node.digest: node for node in nodes}
    values = _chat_values(who, chat, "branches") | {"page": at, "pages": pages}
    return show(request, "branches.html", branches=shown, begins=begins, **values)


@page
async def context(request: Request, who: Visitor) -> Response:
    """What the model would see now, word for word."""
    chat, state, t = await chat_of(request, who), request.app.state, teller(language_for(request))
    info = state.engine.info
    values = _chat_values(who, chat, "context")
    if info is None:
        hint = t("context_no_model")
        return show(request, "context.html", context=None, window=0, hint=hint, **values)
    counter = EngineTokens(state.engine)
    found = await context_now(state.store, counter, state.policy, info, chat)
    values |= {"window": info.budget.window_tokens, "hint": t("context_hint")}
    return show(request, "context.html", context=found, **values)


@page
async def seen(request: Request, who: Visitor) -> Response:
    """What the model saw at a turn, word for word, beside what it saw at the turn before."""
    chat, state, t = await chat_of(request, who), request.app.state, teller(language_for(request))
    at = request.path_params["turn"]
    if not 1 <= at <= len(chat.turns):
        raise Refused("not_found", 404)
    values = _chat_values(who, chat, "turns") | {"number": at, "exact": False, "pieces": []}
    info = state.engine.info
    if info is None:
        return show(request, "seen.html", hint=t("context_no_model"), **values)
    counter = EngineTokens(state.engine)
    now = await seen_at(state.store, counter, info, chat, chat.turns[at - 1])
    if now is None:
        return show(request, "seen.html", hint=t("seen_unknown"), **values)
    last = chat.turns[at - 2] if at > 1 else None
    before = await seen_at(state.store, counter, info, chat, last) if last else None
    values["pieces"] = changes(before[0] if before else None, now[0])
    hint = t("seen_exact" if now[1] else "seen_differs")
    return show(request, "seen.html", hint=hint, **values)
