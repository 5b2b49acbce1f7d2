"""The part of a text that a search found, with the words marked. Pure."""

from __future__ import annotations

import re

from memory.search import MAX_QUERY_CHARS, MAX_TERMS

AROUND_CHARS = 90

Piece = tuple[str, bool]


def snippet(text: str, typed: str, *, around_chars: int = AROUND_CHARS) -> list[Piece]:
    """Pieces of the text around the first word found; True marks those that were typed."""
    words = sorted(dict.fromkeys(typed[:MAX_QUERY_CHARS].split()), key=len, reverse=True)
    pattern = "|".join(map(re.escape, words[:MAX_TERMS]))
    first = re.search(pattern, text, re.IGNORECASE) if pattern else None
    at = first.start() if first else 0
    begin, end = max(0, at - around_chars // 2), at + around_chars * 2
    shown = " ".join(text[begin:end].split())
    pieces = [("…", False)] if begin else []
    parts = re.split(f"({pattern})", shown, flags=re.IGNORECASE) if pattern else [shown]
    pieces += [(part, i % 2 == 1) for i, part in enumerate(parts) if part]
    return [*pieces, ("…", False)] if end < len(text) else pieces
