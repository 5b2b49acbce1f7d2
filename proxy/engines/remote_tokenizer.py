"""Counting by the server's own tokenizer: llama-server's /tokenize, llama_cpp.server's
/extras/tokenize.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from proxy.engines.base import EngineUnavailable
from proxy.engines.remote_http import Http
from proxy.engines.remote_wire import plain

SEPARATORS = ("<|im_end|>", "<|endoftext|>", "</s>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
"""Marks of which a vocabulary has one or another as a token of its own. A tokenizer splits a
text at them before all else, so that what stands between two is tokenized as if it stood alone."""

BATCH_CHARS = 2_000_000


class CannotCount(EngineUnavailable):
    """The server has no such route, or does not let us use it."""


class _Tokens(msgspec.Struct):
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Knows a route and how to ask it. One request counts many texts, where a separator is known:
    a long history is hundreds of them."""

    http: Http
    url: str
    fields: Callable[[str], dict[str, object]]
    separator: str = ""
    extra: int = 0
    """Tokens that the server puts before each text (a begin-of-text mark)."""

    async def tokens(self, text: str) -> list[int]:
        """As the server gives them. Raises CannotCount, EngineUnavailable."""
        body = msgspec.json.encode(self.fields(plain(text)))
        async with self.http.exchange("POST", self.url, body) as answer:
            received = await answer.body()
        try:
            if answer.status == 200:
                return msgspec.json.decode(received, type=_Tokens).tokens
        except (msgspec.DecodeError, UnicodeDecodeError):
            pass
        raise CannotCount("The upstream server does not count tokens.")

    async def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself. Raises EngineUnavailable."""
        counts: list[int] = []
        for batch in _batches(texts):
            counts += await self._count_together(batch)
        return counts

    async def _count_together(self, texts: Sequence[str]) -> list[int]:
        if len(texts) > 1 and self.separator and not any(self.separator in t for t in texts):
            ids = await self.tokens(self.separator.join([*texts, ""]))
            mark = ids[-1] if ids else -1
            counts = [*_runs(ids[self.extra :], mark)]
            if len(counts) == len(texts):
                return counts
        return [len(await self.tokens(text)) - self.extra for text in texts]


async def learned(tokenizer: Tokenizer) -> Tokenizer | None:
    """The same with what the server shows of its vocabulary, None where it does not count. Raises
    EngineUnavailable."""
    try:
        return await _learned(tokenizer)
    except CannotCount:
        return None


async def _learned(tokenizer: Tokenizer) -> Tokenizer:
    extra = len(await tokenizer.tokens(""))
    for mark in SEPARATORS:
        alone = await tokenizer.tokens(mark)
        between = await tokenizer.tokens(f"a{mark}a")
        a = (await tokenizer.tokens("a"))[extra:]
        if len(alone) == extra + 1 and between[extra:] == [*a, alone[-1], *a]:
            return Tokenizer(tokenizer.http, tokenizer.url, tokenizer.fields, mark, extra)
    return Tokenizer(tokenizer.http, tokenizer.url, tokenizer.fields, "", extra)


def of_llama_server(http: Http, root: str) -> Tokenizer:
    def fields(text: str) -> dict[str, object]:
        return {"content": text, "add_special": False, "parse_special": True}

    return Tokenizer(http, root + "/tokenize", fields)


def of_llama_cpp(http: Http, root: str) -> Tokenizer:
    return Tokenizer(http, root + "/extras/tokenize", lambda text: {"input": text})


def _runs(ids: Sequence[int], mark: int) -> Iterator[int]:
    """How many stand before each `mark`."""
    n = 0
    for token in ids:
        if token == mark:
            yield n
            n = 0
        else:
            n += 1


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    start, size = 0, 0
    for i, text in enumerate(texts):
        if size and size + len(text) > BATCH_CHARS:
            yield texts[start:i]
            start, size = i, 0
        size += len(text)
    if texts:
        yield texts[start:]
