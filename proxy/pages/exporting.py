"""A conversation as a file: Markdown, OpenAI messages, LibreChat's import format. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from memory.calls import split_calls
from memory.records import Node, Summary
from memory.transcript import ASSISTANT, ROOT, TOOL, USER
from proxy.tools import call_json

NO_PARENT = "00000000-0000-0000-0000-000000000000"
"""What LibreChat calls the parent of a first message."""

TITLE_CHARS = 80


@dataclass(frozen=True, slots=True)
class File:
    name: str
    media_type: str
    text: str | Mapping[str, Any]


def file_name(conversation: str, ending: str) -> str:
    """Of letters, digits and hyphens alone, whatever the conversation is called."""
    kept = re.sub(r"[^A-Za-z0-9-]+", "-", conversation).strip("-")[:40] or "conversation"
    return f"chatfold-{kept}{ending}"


def markdown(title: str, nodes: Sequence[Node], summaries: Sequence[Summary]) -> str:
    """To read: the system prompt, the summaries in use, then every message of the path."""
    lines = [f"# {_one_line(title)}", ""]
    if front := _front(nodes):
        lines += ["## system", "", front, ""]
    for summary in summaries:
        lines += [f"## summary of messages {summary.first_depth} to {summary.last_depth}", ""]
        lines += [f"> {line}".rstrip() for line in summary.text.splitlines()] + [""]
    for node in nodes:
        lines += [f"## {node.role}", "", node.text, ""]
    return "\n".join(lines)


def openai_messages(nodes: Sequence[Node]) -> dict[str, Any]:
    """The path as a chat request would hold it. Calls get ids again, in the order they came."""
    messages: list[dict[str, Any]] = []
    if front := _front(nodes):
        messages.append({"role": "system", "content": front})
    open_ids: list[str] = []
    for node in nodes:
        if node.role == ASSISTANT:
            content, calls = split_calls(node.text)
            open_ids = [f"call_{node.depth}_{i}" for i in range(len(calls))]
            message: dict[str, Any] = {"role": ASSISTANT, "content": content or None}
            if calls:
                message["tool_calls"] = [
                    call_json(call, id_) for call, id_ in zip(calls, open_ids, strict=True)
                ]
            else:
                message["content"] = node.text
            messages.append(message)
        elif node.role == TOOL:
            id_ = open_ids.pop(0) if open_ids else f"call_{node.depth}"
            messages.append({"role": TOOL, "tool_call_id": id_, "content": node.text})
        else:
            messages.append({"role": node.role, "content": node.text})
    return {"messages": messages}


def librechat(conversation: str, title: str, nodes: Sequence[Node]) -> dict[str, Any]:
    """All branches: a flat list whose messages name their parents, as LibreChat exports it."""
    ids = {node.digest: str(_uuid(conversation, node.digest)) for node in nodes}
    front = next((n.front for n in reversed(nodes) if n.front is not None), "")
    return {
        "conversationId": str(_uuid(conversation, ROOT)),
        "endpoint": "openAI",
        "title": _one_line(title),
        "exportAt": _moment(max((n.created_at for n in nodes), default=0.0)),
        "branches": True,
        "recursive": False,
        "options": {"endpoint": "openAI", "title": _one_line(title), "promptPrefix": front},
        "messages": [
            {
                "messageId": ids[node.digest],
                "parentMessageId": ids.get(node.parent, NO_PARENT),
                "sender": "User" if node.role == USER else "Assistant",
                "text": node.text,
                "isCreatedByUser": node.role == USER,
                "createdAt": _moment(node.created_at),
                "error": False,
            }
            for node in nodes
        ],
    }


def _front(nodes: Sequence[Node]) -> str:
    return next((n.front for n in reversed(nodes) if n.front is not None), "")


def _one_line(title: str) -> str:
    return " ".join(title.split())[:TITLE_CHARS] or "Conversation"


def _uuid(conversation: str, digest: bytes) -> UUID:
    """The same for the same message each time: what is imported twice is known again."""
    return uuid5(NAMESPACE_URL, f"chatfold:{conversation}:{digest.hex()}")


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
