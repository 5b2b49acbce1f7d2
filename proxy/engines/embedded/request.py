"""A request as the engine thread sees it, and the classes that say who goes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from proxy.engines.embedded.llama import Sampler
from proxy.engines.embedded.protocol import Submit
from proxy.engines.embedded.sequences import Sequence as KVSequence
from proxy.engines.embedded.text import TextStream

CHAT, SIDE, BACKGROUND = 0, 1, 2
CLASSES = ("chat", "side", "background")


@dataclass(slots=True, eq=False)
class Request:
    """A request in the engine. `tokens` is the prompt and what was generated behind it."""

    submit: Submit
    tokens: list[int]
    arrived_at: float
    n_prompt: int = 0
    max_new: int = 0
    sequence: KVSequence | None = None
    sampler: Sampler | None = None
    text: TextStream = field(default_factory=TextStream)
    evaluated_prompt: int = 0
    began_at: float = 0.0
    first_token_at: float = 0.0
    paused: bool = False
    said: int = 0
    read: int = 0
    """Texts given out, and those of them that the reader has taken."""

    @property
    def id(self) -> int:
        return self.submit.id

    @property
    def owner(self) -> str:
        return self.submit.owner

    @property
    def priority(self) -> int:
        return self.submit.priority

    @property
    def warms(self) -> bool:
        return self.submit.max_tokens == 0

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.n_prompt :]

    @property
    def missing(self) -> int:
        """Tokens still to evaluate before the next one can be chosen."""
        return len(self.tokens) - len(self.sequence.tokens) if self.sequence else len(self.tokens)

    @property
    def held_back(self) -> bool:
        """Whether its reader has too much unread already: it stays out of the batches."""
        return self.said - self.read >= self.submit.unread_most

    @property
    def decodes(self) -> bool:
        """Whether its last generated token is all there is to evaluate."""
        return self.missing == 1 and len(self.tokens) > self.n_prompt

    def next_tokens(self, n: int) -> list[int]:
        """The next `n` to evaluate."""
        assert self.sequence is not None
        start = len(self.sequence.tokens)
        return self.tokens[start : start + n]

    @property
    def cached_tokens(self) -> int:
        return max(0, self.n_prompt - self.evaluated_prompt)


def by_class(requests: Sequence[Request]) -> tuple[int, ...]:
    """How many of them each class has."""
    return tuple(sum(r.priority == c for r in requests) for c in range(len(CLASSES)))
