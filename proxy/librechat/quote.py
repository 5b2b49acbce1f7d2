"""The piece of a chat that a side request cites. Pure, and linear in the text's length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

QUOTE_CHARS = 600
"""What a title needs of a message stands at its beginning. LibreChat 0.6 cut it itself, newer
versions cite a paste of 100 pages whole."""

_LABEL = "Conversation:"


class _Form(NamedTuple):
    """What stands before the user's words, and between them and the answer."""

    label: str
    separator: str
    closing: str = ""
    """Stands behind the answer; "" where the answer goes on to the end."""


_FORMS = (
    # 0.6 and 0.7
    _Form('||>User:\n"', '"\n||>Response:\n"', '"'),
    # now
    _Form("User: ", "\nAI:"),
)


class _Spans(NamedTuple):
    """Where in the text what is cited stands. The head is all before `head`."""

    head: int
    user: slice
    answer: slice


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
    return Quote(text[found.user], text[found.answer].strip('"')) if found else None


def shortened(text: str, *, most_chars: int = QUOTE_CHARS) -> str:
    """The same request with only the beginnings of what it cites."""
    found = _match(text)
    if not found:
        return text
    a, b = (_cut(text[span], most_chars) for span in (found.user, found.answer))
    return (
        text[: found.user.start]
        + a
        + text[found.user.stop : found.answer.start]
        + (b + text[found.answer.stop :])
    )


def instruction_of(text: str) -> str:
    """The request without what it cites: can stand behind the chat itself."""
    found = _match(text)
    return text[: found.head].rstrip().removesuffix(_LABEL).strip() if found else text


def _match(text: str) -> _Spans | None:
    return next(filter(None, (_spans(text, form) for form in _FORMS)), None)


def _spans(text: str, form: _Form) -> _Spans | None:
    """From the first label: what stands behind a later one stands behind that one too."""
    head = text.find(form.label)
    user = head + len(form.label)
    user_end = text.find(form.separator, user) if head >= 0 else -1
    if user_end < 0:
        return None
    answer = user_end + len(form.separator)
    if form.closing:
        end = text.rfind(form.closing, answer)
        return _Spans(head, slice(user, user_end), slice(answer, end)) if end >= 0 else None
    answer += text.startswith(" ", answer)
    return _Spans(head, slice(user, user_end), slice(answer, len(text)))


def _cut(text: str, most_chars: int) -> str:
    return text if len(text) <= most_chars else text[:most_chars] + "…"
