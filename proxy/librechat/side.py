"""Which requests belong to no chat: titles, languages, summaries, checkpoints. Pure.

Each of them would evict the chat's cached prefix and stand in its history, if it were taken for a
part of it. Known by their texts, which no setting of LibreChat 0.6 and 0.7 can change; newer
versions let an administrator write them anew, so there is a fallback by structure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from memory.transcript import USER
from proxy.librechat.quote import Quote, quoted

TITLES = (
    # 0.6, second of two calls
    "Write a concise title for this conversation in the given language.",
    # 0.6, when the first two calls came to nothing
    "Detect user language and write in the same language an extremely concise title",
    # 0.7
    "Please generate a concise, 5-word-or-less title for the conversation",
    # now, as text
    "Provide a concise, 5-word-or-less title for the conversation",
    # now, as JSON
    "Analyze this conversation and provide:\n1. The detected language",
)
LANGUAGES = ("Detect the language used in the following text.",)
SUMMARIES = (
    "Summarize the conversation by integrating new lines into the current summary.",
    "The following text is cut-off:",
)
CHECKPOINTS = (
    "Hold on, before you continue I need you to write me a checkpoint of everything so far",
    "Hold on again, update your checkpoint",
)

CLIENT = "langchainjs"
"""How the client of today's LibreChat names itself. Its chats are streams, all of them."""

CLIENTS = (CLIENT, "openai/js")
"""The same for all versions: they try again what they have lost."""

ID_HEADERS = ("x-conversation-id", "x-message-id", "x-parent-id")
"""What a LibreChat sends that was told to, and what any other client may."""

STREAMS = b'"stream":true'
"""As JavaScript writes it."""

_TITLE_WORD = re.compile(
    r"title|titel|titre|t[ií]tulo|titolo|заголов|назван|タイトル|题|題|제목", re.I
)


class Kind(StrEnum):
    TITLE = "title"
    LANGUAGE = "language"
    SUMMARY = "summary"
    CHECKPOINT = "checkpoint"
    OTHER = "other"
    """Belongs to no chat, and nothing more is known of it."""


class Shape(StrEnum):
    TEXT = "text"
    FUNCTION = "function_call"
    TOOL = "tool_calls"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Form:
    """How the answer is to look: `fields` are the properties of the object that is asked for,
    `name` the function's."""

    shape: Shape = Shape.TEXT
    name: str = ""
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Side:
    """A side request. `messages` are its own, (role, text); `quote` is what a title or a language
    is asked of."""

    kind: Kind
    messages: tuple[tuple[str, str], ...]
    quote: Quote
    form: Form = Form()
    model: str = ""
    user: str | None = None
    stream: bool = False
    include_usage: bool = False

    @property
    def text(self) -> str:
        """The message that says what is wanted."""
        return self.messages[-1][1] if self.kind is Kind.CHECKPOINT else self.messages[0][1]


class _Part(msgspec.Struct, frozen=True):
    text: str | None = None


class _Message(msgspec.Struct, frozen=True):
    role: str
    content: str | list[_Part] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text or "" for part in self.content)
        return self.content or ""


class _Function(msgspec.Struct, frozen=True):
    name: str = ""
    parameters: dict[str, Any] = {}


class _Tool(msgspec.Struct, frozen=True):
    function: _Function = _Function()


class _Schema(msgspec.Struct, frozen=True):
    schema: dict[str, Any] = {}


class _Format(msgspec.Struct, frozen=True):
    type: str = ""
    json_schema: _Schema | None = None


class _StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class _Body(msgspec.Struct, frozen=True):
    messages: list[_Message] = []
    model: str | None = None
    user: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    functions: list[_Function] | None = None
    tools: list[_Tool] | None = None
    response_format: _Format | None = None


_decoder = msgspec.json.Decoder(_Body)


def side_of(body: bytes, headers: Mapping[str, str]) -> Side | None:
    """The side request that this body is, or None for a chat, and for what cannot be read.

    `headers` has lower-case keys or ignores case. Reads no more than it must: a long chat is told
    by a search for the words above.
    """
    # LibreChat's chats are streams: of those only a checkpoint is none, which its words tell.
    ours = _from_librechat(headers) and STREAMS not in body
    if not (ours or _may_be(body)):
        return None
    try:
        request = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if not request.messages:
        return None
    return _classified(request, ours=ours, streams_chats=_streams_chats(headers))


_WORDS = tuple(
    # As far as JSON writes it in any case.
    text.partition("\n")[0].encode()
    for text in (*TITLES, *LANGUAGES, *SUMMARIES, *CHECKPOINTS)
)


def _may_be(body: bytes) -> bool:
    return any(words in body for words in _WORDS)


def repeats_itself(headers: Mapping[str, str]) -> bool:
    """Whether a second request of this client, equal to one that runs, is that one again."""
    return headers.get("user-agent", "").lower().startswith(CLIENTS)


def _from_librechat(headers: Mapping[str, str]) -> bool:
    return _streams_chats(headers) or any(name in headers for name in ID_HEADERS)


def _streams_chats(headers: Mapping[str, str]) -> bool:
    return headers.get("user-agent", "").lower().startswith(CLIENT)


def _classified(request: _Body, *, ours: bool, streams_chats: bool) -> Side | None:
    if request.messages[-1].text.startswith(CHECKPOINTS):
        return _side(Kind.CHECKPOINT, request)
    # All others are whole answers to one message, or to two of which none is an answer.
    short = len(request.messages) <= 2 and all(m.role != "assistant" for m in request.messages)
    if request.stream or not short:
        return None
    kind = _kind(request, ours=ours, streams_chats=streams_chats)
    return _side(kind, request) if kind else None


def _kind(request: _Body, *, ours: bool, streams_chats: bool) -> Kind | None:
    text = request.messages[0].text
    if text.startswith(TITLES):
        return Kind.TITLE
    if text.startswith(LANGUAGES):
        return Kind.LANGUAGE
    if text.startswith(SUMMARIES):
        return Kind.SUMMARY
    if not ours or request.messages[-1].role != USER:
        return None
    asks = _TITLE_WORD.search(text) or "title" in _form(request).fields
    if asks and quoted(text):
        return Kind.TITLE
    # Whoever names a chat by a header may ask for whole answers in it.
    return Kind.OTHER if streams_chats else None


def _side(kind: Kind, request: _Body) -> Side:
    messages = tuple((m.role, m.text) for m in request.messages)
    if kind is Kind.LANGUAGE:
        quote = Quote(user=messages[-1][1])
    else:
        quote = (quoted(messages[0][1]) if kind is Kind.TITLE else None) or Quote()
    options = request.stream_options or _StreamOptions()
    return Side(
        kind,
        messages,
        quote,
        _form(request),
        model=request.model or "",
        user=request.user or None,
        stream=bool(request.stream),
        include_usage=bool(options.include_usage),
    )


def _form(request: _Body) -> Form:
    if request.functions:
        function = request.functions[0]
        return Form(Shape.FUNCTION, function.name, _fields(function.parameters))
    if request.tools:
        function = request.tools[0].function
        return Form(Shape.TOOL, function.name, _fields(function.parameters))
    wanted = request.response_format
    if wanted and wanted.type.startswith("json"):
        schema = wanted.json_schema.schema if wanted.json_schema else {}
        return Form(Shape.JSON, "", _fields(schema) or ("language", "title"))
    return Form()


def _fields(schema: dict[str, Any]) -> tuple[str, ...]:
    properties = schema.get("properties")
    return tuple(properties) if isinstance(properties, dict) else ()
