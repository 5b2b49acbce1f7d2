"""How many tokens texts have: asked of the server where it can say, else estimated."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from math import ceil

from memory.tokens import TiktokenCounter
from proxy.engines.remote_calibration import Calibration, Sample
from proxy.engines.remote_tokenizer import Tokenizer

KNOWN_TEXTS = 8192
LONG_CHARS = 200_000
"""Texts longer than this in all are not counted a second time, only to learn from it."""


class Counter:
    """Estimates with tiktoken, and learns from the server's own numbers how far off that is."""

    def __init__(self) -> None:
        self._tiktoken = TiktokenCounter(margin=0)
        self._key = secrets.token_bytes(16)
        self._known: OrderedDict[bytes, int] = OrderedDict()
        """By digest: everybody's texts come by here, and none is to be kept."""
        self.calibration = Calibration()

    def forget(self) -> None:
        """What was learned of a model that is there no more."""
        self.calibration = Calibration()

    async def get_ready(self) -> None:
        """Reads the vocabulary, so that nobody's request has to wait for that."""
        await self._tiktoken.count(["."])

    async def estimate(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself, on the long side. Never raises."""
        factor = 1 + self.calibration.margin
        return [ceil(self.calibration.text(n) * factor) for n in await self._raw(texts)]

    async def exact(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
        """As the server counts them. Raises EngineUnavailable."""
        counts = await tokenizer.count(texts)
        if sum(map(len, texts)) <= LONG_CHARS:
            raw = await self._raw(texts)
            self.calibration.add(Sample(sum(raw), 0, sum(counts)))
        return counts

    async def learn(self, texts: Sequence[str], prompt_tokens: int) -> None:
        """From a whole prompt, one text for each message, that the server has counted."""
        unknown = sum(len(text) for text in texts if self._digest(text) not in self._known)
        if unknown <= LONG_CHARS:
            raw = await self._raw(texts)
            self.calibration.add(Sample(sum(raw), len(texts), prompt_tokens))

    async def _raw(self, texts: Sequence[str]) -> list[int]:
        digests = [self._digest(text) for text in texts]
        by_digest = dict(zip(digests, texts, strict=True))
        # Read before the wait: other requests' texts may push these out meanwhile.
        counts = {digest: self._known[digest] for digest in by_digest if digest in self._known}
        new = {digest: text for digest, text in by_digest.items() if digest not in counts}
        counted = dict(zip(new, await self._tiktoken.count([*new.values()]), strict=True))
        self._known |= counted
        while len(self._known) > KNOWN_TEXTS:
            self._known.popitem(last=False)
        counts |= counted
        return [counts[digest] for digest in digests]

    def _digest(self, text: str) -> bytes:
        data = text.encode("utf-8", "surrogatepass")
        return blake2b(data, digest_size=16, key=self._key).digest()
