"""What is said to an OpenAI-compatible server: pure, no I/O."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import msgspec

from memory.calls import RESULT_CLOSE, RESULT_OPEN
from memory.context import SYSTEM, Context, ContextMessage
from memory.transcript import TOOL, USER
from proxy.engines.base import CallFormat, Generate, JsonFormat, Sampling
from proxy.engines.hermes import told
from proxy.engines.remote_server import Kind, Server

CHAT_PATH = "/chat/completions"
VERSION = re.compile(r"/v\d\w*$")

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where the server is. `base` ends in /v1, `root` is what stands before it. `shown` may stand
    in logs; the others hold no secrets either, as user info and query are left out."""

    base: str
    root: str
    shown: str
    left_out: bool

    @property
    def chat(self) -> str:
        return self.base + CHAT_PATH

    @property
    def texts(self) -> str:
        return self.base + "/completions"

    @property
    def embeddings(self) -> str:
        return self.base + "/embeddings"

    @property
    def models(self) -> str:
        return self.base + "/models"


def upstream(url: str) -> Upstream:
    """From a URL with or without /v1, a slash at its end, or the whole path."""
    parts = urlsplit(url)
    secrets, _, host = parts.netloc.rpartition("@")
    path = parts.path.rstrip("/")
    is_whole = path.endswith(CHAT_PATH)
    path = path.removesuffix(CHAT_PATH)
    if not is_whole and not VERSION.search(path):
        path += "/v1"
    base = f"{parts.scheme}://{host}{path}"
    return Upstream(
        base=base,
        root=VERSION.sub("", base),
        shown=f"{parts.scheme}://{'***@' if secrets else ''}{host}{path}",
        left_out=bool(secrets or parts.query),
    )


def body(
    request: Generate,
    *,
    server: Server,
    messages: Sequence[Message],
    max_tokens: int | None,
    stream: bool = True,
    with_usage: bool = False,
    slot: int | None = None,
) -> bytes:
    """The JSON of a request, with its raw prompt or else these messages. A warming request asks for
    one token: none is not allowed."""
    said = {"messages": messages} if request.raw is None else {"prompt": prompt(request.raw)}
    fields: dict[str, Any] = {
        "model": server.name,
        **said,
        "stream": stream,
        **sampling_fields(request.sampling, everything=server.kind is not Kind.OTHER),
    }
    if with_usage:
        fields["stream_options"] = {"include_usage": True}
    if max_tokens is not None:
        fields["max_tokens"] = max(1, max_tokens)
    if server.kind is Kind.LLAMA_SERVER:
        fields |= on_slot(slot)
    fields |= asked_for(request, server.kind)
    return msgspec.json.encode(fields)


def asked_for(request: Generate, kind: Kind) -> dict[str, Any]:
    """What the answer is to be besides text: JSON, a call, with log probabilities, without
    reasoning."""
    fields: dict[str, Any] = {}
    if isinstance(request.format, CallFormat):
        fields |= call_format(request.format, request.context.tools)
    if isinstance(request.format, JsonFormat):
        fields["response_format"] = json_format(request.format, kind)
    if request.sampling.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": request.sampling.logprobs}
    if kind is Kind.LLAMA_SERVER and not request.thinks:
        fields["chat_template_kwargs"] = {"enable_thinking": False}
    return fields


def json_format(wanted: JsonFormat, kind: Kind) -> dict[str, Any]:
    """llama_cpp.server refuses the type json_schema, and takes a schema beside json_object."""
    if not wanted.schema:
        return {"type": "json_object"}
    schema = msgspec.json.decode(wanted.schema)
    if kind is Kind.LLAMA_CPP:
        return {"type": "json_object", "schema": schema}
    named = {"name": "answer", "strict": True, "schema": schema}
    return {"type": "json_schema", "json_schema": named}


def call_format(wanted: CallFormat, tools: str) -> dict[str, Any]:
    """A call that must come: by the server's own fields, for words can only ask for it."""
    fields = {"tools": msgspec.json.decode(tools)}
    if wanted.one_call and len(wanted.names) == 1:
        named = {"type": "function", "function": {"name": wanted.names[0]}}
        return fields | {"tool_choice": named}
    several = {} if not wanted.one_call else {"parallel_tool_calls": False}
    return fields | {"tool_choice": "required"} | several


def on_slot(slot: int | None) -> dict[str, Any]:
    """llama-server's own fields: where, and that what is there already is used."""
    return {"cache_prompt": True} | ({} if slot is None else {"id_slot": slot})


def prompt(raw: str | tuple[int, ...]) -> str | tuple[int, ...]:
    return plain(raw) if isinstance(raw, str) else raw


def conversation(request: Generate) -> list[Message]:
    """A server that must call is told the tools in fields of its own (`call_format`), and not in
    words as well."""
    context = request.context
    told_apart = isinstance(request.format, CallFormat)
    return messages(replace(context, tools="") if told_apart else context)


def messages(context: Context) -> list[Message]:
    """Tools are told in the system prompt, in words that every server passes on, and results are
    the user's: a server wants ids with them, which are not kept."""
    sent: list[Message] = []
    for before, message in pairwise([None, *context.messages]):
        assert message is not None
        one = _message(message)
        if before is not None and before.role == TOOL and one["role"] == USER:
            one = {"role": USER, "content": f"{sent.pop()['content']}\n{one['content']}"}
        sent.append(one)
    return _with_tools(sent, context.tools) if context.tools else sent


def _with_tools(sent: list[Message], tools: str) -> list[Message]:
    words = told(tools)
    if sent and sent[0]["role"] == SYSTEM:
        system = {"role": SYSTEM, "content": f"{words}\n\n{sent[0]['content']}"}
        return [system, *sent[1:]]
    return [{"role": SYSTEM, "content": words}, *sent]


def _message(message: ContextMessage) -> Message:
    text = plain(message.text)
    if message.role == TOOL:
        return {"role": USER, "content": RESULT_OPEN + text + RESULT_CLOSE}
    return {"role": message.role, "content": text}


def n_chars(messages: Sequence[Message]) -> int:
    return sum(len(m["content"]) for m in messages)


def plain(text: str) -> str:
    """`text` as it can be encoded: lone surrogates become U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def sampling_fields(sampling: Sampling, *, everything: bool = False) -> dict[str, Any]:
    """OpenAI's fields. What is llama.cpp's own is sent to llama.cpp (`everything`), to others only
    where it differs from the default: strict servers refuse fields they do not know, and
    llama.cpp's own defaults may have been changed where it was started."""
    default = Sampling()
    always = ("temperature", "top_p")
    others = (
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "top_k",
        "min_p",
        "repeat_penalty",
    )
    fields = {name: getattr(sampling, name) for name in always}
    for name in others:
        value = getattr(sampling, name)
        if value is not None and (everything or value != getattr(default, name)):
            fields[name] = value
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    return fields
