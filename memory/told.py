"""A client's own summary as evidence of which chat it tells. Pure.

What chatfold answers to whoever asks for a summary of a stored chat is made of that chat's stored
summaries and of sentences of its messages, letter for letter. So a text that comes back names the
chat that it was made from, where a short answer beside it stands in many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from memory.extract import SPEAKERS

CHARS_LEAST = 120
"""As much as one answer must have to name its chat alone (memory.overlap.ALONE_CHARS)."""

SHARE_LEAST = 0.9
"""Of the text's characters: what a client wraps around it is no more than a title."""

LINE_CHARS_LEAST = 16
"""A shorter line may stand anywhere: it says nothing for or against."""


def tells_of(told: str, texts: Iterable[str]) -> bool:
    """Whether this summary was made of these texts: nearly all its lines stand in one of them, as
    they are or behind the name of who spoke, and they are long enough together that this cannot be
    chance.

    >>> tells_of("User: The hive behind the old mill is blue.", ["The hive behind the old mill..."])
    False
    """
    known = tuple(texts)
    lines = [line for line in _lines(told) if len(line) >= LINE_CHARS_LEAST]
    # A line that stands there twice is still one piece of evidence.
    found = {line for line in lines if any(line in text for text in known)}
    return sum(map(len, found)) >= max(CHARS_LEAST, SHARE_LEAST * sum(map(len, set(lines))))


def _lines(told: str) -> Iterator[str]:
    for line in told.splitlines():
        speaker = next((s for s in SPEAKERS if line.startswith(s)), "")
        yield line.removeprefix(speaker).strip()
