"""Chats that other programs wrote to a file: LibreChat's exports, ChatGPT's, and OpenAI messages.

Pure but for `read_export`. An export holds a tree: answers that were given anew, questions that
were edited. Who wants one line of it takes `newest`, who wants all takes `messages`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from memory.transcript import ASSISTANT, TOOL, USER
from proxy.deep_json import DeepJsonError, parse_deep
from proxy.errors import ApiError
from proxy.wire import parse_chat

LIBRECHAT = "librechat"
CHATGPT = "chatgpt"
OPENAI = "openai"

MAX_EXPORT_BYTES = 128 * 2**20
"""A larger file is refused before it is read: parsed it takes several times as much memory."""

NO_PARENT = "00000000-0000-0000-0000-000000000000"
"""What LibreChat calls the parent of a first message."""

SYSTEM = "system"


class ExportError(Exception):
    """The file is no export that is understood here. `str()` is one sentence that names it."""


@dataclass(frozen=True, slots=True)
class Said:
    """One message of an export. `parent` is the id of the message before it, "" at a root;
    `created_at` is in seconds since the epoch, 0.0 where the file does not say."""

    id: str
    parent: str
    role: str
    text: str
    created_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Exported:
    """One conversation. `messages` are in the order of the file, each behind its parent; messages
    without text are left out, and what followed them follows their parent. `id` is the writing
    program's own name for it, "" where it has none."""

    kind: str
    id: str
    title: str
    system: str
    messages: tuple[Said, ...]

    def newest(self) -> tuple[Said, ...]:
        """The path from a root to the message that came last: by its time, else by its place."""
        came: dict[str, tuple[float, int]] = {"": (0.0, -1)}
        for place, said in enumerate(self.messages):
            # Nothing came before what it answers, whatever the file says or leaves out.
            came[said.id] = max(said.created_at, came[said.parent][0]), place
        return self.path(max(came, key=came.__getitem__))

    def leaves(self) -> tuple[Said, ...]:
        """The ends of all branches, in the order of the file."""
        parents = {said.parent for said in self.messages}
        return tuple(said for said in self.messages if said.id not in parents)

    def path(self, id_: str) -> tuple[Said, ...]:
        """The messages from a root up to this one."""
        by_id = {said.id: said for said in self.messages}
        found = []
        while id_ in by_id:
            found.append(by_id[id_])
            id_ = by_id[id_].parent
        return tuple(reversed(found))


def read_export(path: Path) -> tuple[Exported, ...]:
    """The conversations in a file. Raises ExportError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_EXPORT_BYTES + 1)
    except OSError as exc:
        raise ExportError(f"{path} cannot be read: {exc.strerror}.") from exc
    if len(data) > MAX_EXPORT_BYTES:
        raise ExportError(f"{path} has more than {MAX_EXPORT_BYTES // 2**20} MiB.")
    return parse_export(data, name=str(path))


def parse_export(data: bytes, *, name: str) -> tuple[Exported, ...]:
    """The conversations in a file's bytes; `name` is for errors. Raises ExportError where there is
    none with a message."""
    value = parse_json(data, name=name)
    found = tuple(one for one in _conversations(value, name) if one.messages)
    if not found:
        raise ExportError(f"{name} holds no message.")
    return found


def parse_json(data: bytes, *, name: str) -> Any:
    """JSON however deep it is nested (LibreChat's recursive exports nest each answer in its
    question), or lines of JSON. Raises ExportError."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise ExportError(f"{name} is empty.")
    try:
        return msgspec.json.decode(data)
    except RecursionError:
        return _deep(data, name)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        lines = [line for line in data.splitlines() if line.strip()]
        if len(lines) > 1 and lines[0].strip().endswith((b"}", b"]")):
            return _lines(lines, name)
        raise ExportError(f"{name} is not JSON: {exc}.") from exc


def _deep(data: bytes, name: str) -> Any:
    try:
        return parse_deep(data.decode("utf-8"))
    except (DeepJsonError, UnicodeDecodeError) as exc:
        raise ExportError(f"{name} is not JSON: {exc}.") from exc


def _lines(lines: Sequence[bytes], name: str) -> list[Any]:
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(msgspec.json.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise ExportError(f"{name} is not JSON in line {number}: {exc}.") from exc
    return found


def _conversations(value: Any, name: str) -> Iterator[Exported]:
    if isinstance(value, list) and value and all(_is_message(v) for v in value):
        yield _openai({"messages": value}, name)
        return
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, dict):
            raise _unknown(name)
        if "messagesTree" in one or ("conversationId" in one and "messages" in one):
            yield _librechat(one, name)
        elif isinstance(one.get("mapping"), dict):
            yield _chatgpt(one)
        elif isinstance(one.get("messages"), list):
            yield _openai(one, name)
        else:
            raise _unknown(name)


def _unknown(name: str) -> ExportError:
    known = "a LibreChat or ChatGPT export, or OpenAI messages"
    return ExportError(f"{name} is no export that is understood: it should be {known}.")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


# -- OpenAI messages -------------------------------------------------------------------------------


def _openai(value: dict[str, Any], name: str) -> Exported:
    """By the same rules as a request, but that pictures and sounds are left out, and calls that
    nobody answered."""
    messages = [_text_only(m) for m in value["messages"]]
    while messages and isinstance(messages[-1], dict) and messages[-1].get("tool_calls"):
        messages.pop()
    if not messages:
        return Exported(OPENAI, "", "", "", ())
    try:
        transcript = parse_chat(msgspec.json.encode({"messages": messages})).transcript
    except ApiError as exc:
        raise ExportError(f"{name} holds no OpenAI messages: {exc}") from exc
    said = [
        Said(str(i), str(i - 1) if i else "", m.role, m.text)
        for i, m in enumerate(transcript.messages)
    ]
    id_, title = (_word(value.get(key)) for key in ("id", "title"))
    return Exported(OPENAI, id_, title, transcript.system, tuple(said))


def _text_only(message: Any) -> Any:
    if isinstance(message, dict) and isinstance(content := message.get("content"), list):
        kept = [p for p in content if isinstance(p, dict) and p.get("type") == "text"]
        return message | {"content": kept}
    return message


# -- LibreChat -------------------------------------------------------------------------------------


def _librechat(value: dict[str, Any], name: str) -> Exported:
    """`messages` is a list whose items name their parents, or `messagesTree` a list whose items
    hold their children."""
    raw = value.get("messagesTree") or value.get("messages")
    if not isinstance(raw, list):
        raise _unknown(name)
    options = value.get("options")
    prompt = _word(options.get("promptPrefix")) if isinstance(options, dict) else ""
    tree = _Tree()
    for item, parent in _walk(raw):
        text = "" if item.get("error") is True else _librechat_text(item)
        role = USER if item.get("isCreatedByUser") else ASSISTANT
        parent = parent if parent is not None else _word(item.get("parentMessageId"))
        created_at = _time(item.get("createdAt"))
        tree.add(_word(item.get("messageId")), parent, role, text, created_at)
    id_, title = _word(value.get("conversationId")), _word(value.get("title"))
    return Exported(LIBRECHAT, id_, title, prompt, tree.messages())


def _walk(items: Sequence[Any]) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each message, with the id of the one that holds it; parents first. Without recursion: a chat
    of a thousand messages is a thousand deep."""
    stack: list[tuple[Any, str | None]] = [(item, None) for item in reversed(items)]
    while stack:
        item, parent = stack.pop()
        if not isinstance(item, dict):
            continue
        yield item, parent
        children = item.get("children")
        if isinstance(children, list):
            own = _word(item.get("messageId"))
            stack += [(child, own) for child in reversed(children)]


def _librechat_text(item: dict[str, Any]) -> str:
    """The text, or the text parts; what a model thought is no part of it."""
    if text := _word(item.get("text")):
        return text
    parts = item.get("content")
    found = [_part_text(p) for p in parts if isinstance(p, dict)] if isinstance(parts, list) else []
    return "\n".join(filter(None, found))


def _part_text(part: dict[str, Any]) -> str:
    if part.get("type") != "text":
        return ""
    text = part.get("text")
    return _word(text.get("value")) if isinstance(text, dict) else _word(text)


# -- ChatGPT ---------------------------------------------------------------------------------------


def _chatgpt(value: dict[str, Any]) -> Exported:
    """`mapping` gives each node by its id, with its parent and a message, which may be null."""
    tree = _Tree()
    system = []
    for id_, node in value["mapping"].items():
        if not isinstance(node, dict):
            continue
        message = node.get("message")
        message = message if isinstance(message, dict) else {}
        author = message.get("author")
        role = _word(author.get("role")) if isinstance(author, dict) else ""
        text = _chatgpt_text(message.get("content"))
        if role == SYSTEM and text.strip():
            system.append(text)
        known = role in (USER, ASSISTANT)
        created_at = _time(message.get("create_time"))
        tree.add(id_, _word(node.get("parent")), role, text if known else "", created_at)
    id_, title = _word(value.get("conversation_id")), _word(value.get("title"))
    return Exported(CHATGPT, id_, title, "\n\n".join(system), tree.messages())


def _chatgpt_text(content: Any) -> str:
    if not isinstance(content, dict) or content.get("content_type") not in ("text", None):
        return ""
    parts = content.get("parts")
    return "\n".join(p for p in parts if isinstance(p, str)) if isinstance(parts, list) else ""


# -- trees -----------------------------------------------------------------------------------------


class _Tree:
    """Messages in any order, put in order: parents first, those without text skipped."""

    def __init__(self) -> None:
        self._found: dict[str, Said] = {}
        self._last = ""

    def add(self, id_: str, parent: str, role: str, text: str, created_at: float) -> None:
        """Without an id or a parent that is said, it follows the message before it."""
        id_ = id_ or f"#{len(self._found)}"
        if id_ in self._found:
            return  # Said twice: the first one holds.
        if parent == NO_PARENT:
            parent = ""
        elif not parent:
            parent = self._last
        self._found[id_] = Said(id_, parent, role, text, created_at)
        self._last = id_

    def messages(self) -> tuple[Said, ...]:
        children: dict[str, list[Said]] = {}
        for said in self._found.values():
            parent = said.parent if said.parent in self._found else ""
            children.setdefault(parent, []).append(said)
        out: list[Said] = []
        stack = [(said, "") for said in reversed(children.get("", []))]
        while stack:
            said, parent = stack.pop()
            kept = parent
            if said.text.strip() and said.role in (USER, ASSISTANT, TOOL):
                out.append(Said(said.id, parent, said.role, said.text, said.created_at))
                kept = said.id
            stack += [(child, kept) for child in reversed(children.get(said.id, []))]
        return tuple(out)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _time(value: Any) -> float:
    """Seconds since the epoch: a number is that already, a text is ISO 8601."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if 0 < value < 1e12 else 0.0
    try:
        return datetime.fromisoformat(_word(value).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError, OSError):
        return 0.0
