"""The piece of a chat that a side request cites. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

QUOTE_CHARS = 600
"""What a title needs of a message stands at its beginning. LibreChat 0.6 cut it itself, newer
versions cite a paste of 100 pages whole."""

_FORMS = (
    # 0.6 and 0.7
    re.compile(
        r"(?P<head>.*?)\|\|>User:\n\"(?P<user>.*?)\"\n\|\|>Response:\n\"(?P<answer>.*)\"(?P<tail>.*)",
        re.DOTALL,
    ),
    # now
    re.compile(r"(?P<head>.*?)User: (?P<user>.*?)\nAI: ?(?P<answer>.*)(?P<tail>)", re.DOTALL),
)
_LABEL = re.compile(r"\s*Conversation:\s*\Z")


@dataclass(frozen=True, slots=True)
class Quote:
    """A chat's first turn as a side request cites it; "" where it does not."""

    user: str = ""
    answer: str = ""

    def __bool__(self) -> bool:
        return bool(self.user or self.answer)


def quoted(text: str) -> Quote | None:
    """What `text` cites, or None."""
    found = _match(text)
    return Quote(found["user"], found["answer"].strip('"')) if found else None


def shortened(text: str, *, most_chars: int = QUOTE_CHARS) -> str:
    """The same request with only the beginnings of what it cites."""
    found = _match(text)
    if not found:
        return text
    a, b = (_cut(found[name], most_chars) for name in ("user", "answer"))
    return (
        text[: found.start("user")]
        + a
        + text[found.end("user") : found.start("answer")]
        + (b + text[found.end("answer") :])
    )


def instruction_of(text: str) -> str:
    """The request without what it cites: can stand behind the chat itself."""
    found = _match(text)
    return _LABEL.sub("", found["head"]).strip() if found else text


def _match(text: str) -> re.Match[str] | None:
    return next(filter(None, (form.fullmatch(text) for form in _FORMS)), None)


def _cut(text: str, most_chars: int) -> str:
    return text if len(text) <= most_chars else text[:most_chars] + "…"
