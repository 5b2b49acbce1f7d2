"""The pages that change something, each only for a form of our own."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from memory.keeper import Job
from proxy import wire
from proxy.background import EngineTokens
from proxy.errors import bad_request
from proxy.exports import ExportError
from proxy.forgetting import forgotten
from proxy.inspecting import acts
from proxy.pages import exporting
from proxy.pages.access import Refused, Visitor, require_own_act
from proxy.pages.chats import Chat, digest_in, front_of
from proxy.pages.importing import import_file
from proxy.pages.render import HEADERS, language_for
from proxy.pages.serving import chat_of, form, page, see, show
from proxy.pages.words import teller
from proxy.requests import json_response, read_body

QUOTE_CHARS = 300


@page
async def ask_forget(request: Request, who: Visitor) -> Response:
    chat, t = await chat_of(request, who), teller(language_for(request))
    return show(
        request,
        "ask.html",
        visitor=who,
        at="list",
        title=t("forget_conversation_title"),
        quote=chat.entry.begins[:QUOTE_CHARS],
        hint=t("forget_conversation_hint"),
        action=f"/inspect/c/{chat.entry.id}/forget",
        back=f"/inspect/c/{chat.entry.id}",
    )


@page
async def forget(request: Request, who: Visitor) -> Response:
    await form(request, who)
    state, conversation = request.app.state, request.path_params["conversation"]
    n = await forgotten(
        state, who.owner, lambda: state.store.forget_conversation(who.owner, conversation)
    )
    if not n:
        raise Refused("not_found", 404)
    return see("/", forgotten=n)


@page
async def ask_forget_all(request: Request, who: Visitor) -> Response:
    t = teller(language_for(request))
    n = await request.app.state.store.n_conversations(who.owner)
    return show(
        request,
        "ask.html",
        visitor=who,
        at="list",
        title=t("forget_all_title"),
        quote="",
        hint=t("forget_all_hint", n=n),
        action="/inspect/forget",
        back="/",
    )


@page
async def forget_all(request: Request, who: Visitor) -> Response:
    await form(request, who)
    state = request.app.state
    n = await forgotten(state, who.owner, lambda: state.store.forget_owner(who.owner))
    return see("/", forgotten=n)


@page
async def ask_forget_message(request: Request, who: Visitor) -> Response:
    chat, t = await chat_of(request, who), teller(language_for(request))
    (node,) = await request.app.state.store.nodes(who.owner, [_message(request, chat)])
    base = f"/inspect/c/{chat.entry.id}"
    return show(
        request,
        "ask.html",
        visitor=who,
        at="list",
        title=t("forget_message_title"),
        quote=node.text[:QUOTE_CHARS],
        hint=t("forget_message_hint"),
        action=f"{base}/message/{node.digest.hex()}/forget",
        back=f"{base}/turns?leaf={chat.leaf.hex()}&depth={node.depth}#m{node.depth}",
    )


@page
async def forget_message(request: Request, who: Visitor) -> Response:
    """What the model's cache holds of the owner goes with it; the rest is read again."""
    await form(request, who)
    chat, state = await chat_of(request, who), request.app.state
    digest = _message(request, chat)
    await forgotten(state, who.owner, lambda: state.store.forget_message(who.owner, digest))
    await wake(request, chat)
    depth = len(chat.tree.path(digest)) - 1
    return see(f"/inspect/c/{chat.entry.id}/turns", leaf=digest.hex(), depth=depth)


def _message(request: Request, chat: Chat) -> bytes:
    """The digest of the message that the path names. Raises Refused."""
    digest = digest_in(request.path_params["message"])
    if not chat.tree.path(digest):
        raise Refused("not_found", 404)
    return digest


# -- what the model reads ------------------------------------------------------------------------


@page
async def pin(request: Request, who: Visitor) -> Response:
    fields = await form(request, who)
    chat = await chat_of(request, who)
    try:
        await acts.pin(request.app.state.store, chat, fields.get("text", ""))
    except acts.NotDone as exc:
        raise bad_request(str(exc)) from exc
    await wake(request, chat)
    return see(f"/inspect/c/{chat.entry.id}", leaf=chat.leaf.hex())


@page
async def unpin(request: Request, who: Visitor) -> Response:
    await form(request, who)
    chat = await chat_of(request, who)
    await request.app.state.store.unpin(who.owner, chat.entry.id, request.path_params["pin"])
    await wake(request, chat)
    return see(f"/inspect/c/{chat.entry.id}", leaf=chat.leaf.hex())


@page
async def correct(request: Request, who: Visitor) -> Response:
    """A summary of another text for the same span. It is used once its context is warm."""
    fields = await form(request, who)
    chat, state = await chat_of(request, who), request.app.state
    old = chat.summary(request.path_params["summary"])
    if old is None or chat.state(old) == "past":
        raise Refused("not_found", 404)
    counter = EngineTokens(state.engine)
    try:
        stored = await acts.correct(state.store, counter, chat, old, fields.get("text", ""))
    except acts.NotDone as exc:
        raise bad_request(str(exc)) from exc
    await wake(request, chat)
    return see(f"/inspect/c/{chat.entry.id}/summary/{stored.id}", leaf=chat.leaf.hex())


async def wake(request: Request, chat: Chat) -> None:
    """The keeper looks after the path that was shown: what changed is warmed in the background."""
    state = request.app.state
    info = state.engine.info
    system = await front_of(state.store, chat, info.default_system if info else "")
    state.keeper.wake(Job(chat.owner, chat.entry.id, chat.digests, system))


# -- files ---------------------------------------------------------------------------------------


@page
async def export_markdown(request: Request, who: Visitor) -> Response:
    chat = await chat_of(request, who)
    nodes = await request.app.state.store.nodes(who.owner, chat.digests)
    text = exporting.markdown(chat.entry.begins, nodes, chat.active)
    name = exporting.file_name(chat.entry.id, ".md")
    return _file(name, text.encode("utf-8"), "text/markdown; charset=utf-8")


@page
async def export_openai(request: Request, who: Visitor) -> Response:
    chat = await chat_of(request, who)
    nodes = await request.app.state.store.nodes(who.owner, chat.digests)
    name = exporting.file_name(chat.entry.id, ".json")
    return _file(name, wire.encode(exporting.openai_messages(nodes)), "application/json")


@page
async def export_librechat(request: Request, who: Visitor) -> Response:
    chat = await chat_of(request, who)
    twigs = await request.app.state.store.tree(who.owner, chat.entry.id)
    nodes = await request.app.state.store.nodes(who.owner, [t.digest for t in twigs])
    value = exporting.librechat(chat.entry.id, chat.entry.begins, nodes)
    name = exporting.file_name(chat.entry.id, "-librechat.json")
    return _file(name, wire.encode(value), "application/json")


def _file(name: str, body: bytes, media_type: str) -> Response:
    headers = HEADERS | {"content-disposition": f'attachment; filename="{name}"'}
    return Response(body, headers=headers, media_type=media_type)


@page
async def ask_import(request: Request, who: Visitor) -> Response:
    return show(request, "import.html", visitor=who, at="import")


@page
async def take_import(request: Request, who: Visitor) -> Response:
    """The file is the body, as it is: its name never comes here. Answers JSON."""
    sent = request.headers.get("x-chatfold-token", "")
    require_own_act(request.headers, token=who.token, sent=sent)
    body = await read_body(request, request.app.state.config.max_body_bytes)
    try:
        found = await import_file(request.app.state.store, who.owner, body)
    except ExportError as exc:
        raise bad_request(str(exc)) from exc
    t = teller(language_for(request))
    values = {"conversations": found.conversations, "messages": found.messages}
    return json_response({"said": t("imported", **values), **values}, headers=HEADERS)
