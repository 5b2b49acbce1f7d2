"""A request as the engine thread sees it, and the classes that say who goes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from proxy.engines.embedded.protocol import Submit, TokenLogprob
from proxy.engines.embedded.sampling import Grammar, Sampler
from proxy.engines.embedded.sequences import Sequence as KVSequence
from proxy.engines.embedded.text import Aligned, TextStream

CHAT, SIDE, BACKGROUND = 0, 1, 2
CLASSES = ("chat", "side", "background")


@dataclass(slots=True, eq=False)
class Request:
    """A request in the engine, or one of its further answers (`choice` 1 and up), which share its
    `id`. `tokens` is the prompt and what was generated behind it.

    `reason` says how it ended, "" while it has not; `choices` is one list for all answers of a
    request.
    """

    submit: Submit
    tokens: list[int]
    arrived_at: float
    id: int = field(init=False)
    owner: str = field(init=False)
    priority: int = field(init=False)
    n_prompt: int = 0
    max_new: int = 0
    sequence: KVSequence | None = None
    stops: tuple[int, ...] = ()
    """Lengths of the sequence at which a batch must end."""
    sampler: Sampler | None = None
    text: TextStream = field(default_factory=TextStream)
    evaluated_prompt: int = 0
    began_at: float = 0.0
    first_token_at: float = 0.0
    refused_at: int = -1
    """The cache's `openings` when no room was found."""
    paused: bool = False
    told_at: float = 0.0
    """When its progress was last told."""
    said: int = 0
    read: int = 0
    """Texts given out of all answers together, and those that the reader has taken; kept by the
    first answer."""
    grammar: Grammar | None = None
    choice: int = 0
    choices: list[Request] = field(default_factory=list)
    reason: str = ""
    logprobs: Aligned[TokenLogprob] = field(init=False)

    def __post_init__(self) -> None:
        self.id, self.owner = self.submit.id, self.submit.owner
        self.priority = self.submit.priority
        self.text = TextStream(self.submit.stop)
        self.logprobs = Aligned(self.text)
        self.choices = self.choices or [self]

    def another(self) -> Request:
        """One more answer to the prompt, before the first token of this one is chosen."""
        other = Request(
            submit=self.submit,
            tokens=list(self.tokens),
            arrived_at=self.arrived_at,
            n_prompt=self.n_prompt,
            max_new=self.max_new,
            grammar=self.grammar.copy() if self.grammar else None,
            choice=len(self.choices),
            choices=self.choices,
        )
        self.choices.append(other)
        return other

    def forget(self) -> None:
        """From here on it leaves nothing behind, wherever it goes on."""
        self.submit, self.stops = replace(self.submit, keep=False), ()

    @property
    def warms(self) -> bool:
        return self.submit.max_tokens == 0

    @property
    def keep(self) -> bool:
        """Whether its tokens stay in the cache. Nobody comes back to the further answers."""
        return self.submit.keep and not self.choice

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.n_prompt :]

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def missing(self) -> int:
        """Tokens still to evaluate before the next one can be chosen."""
        return len(self.tokens) - len(self.sequence.tokens) if self.sequence else len(self.tokens)

    @property
    def held_back(self) -> bool:
        """Whether its reader has too much unread already: it stays out of the batches."""
        first = self.choices[0]
        return first.said - first.read >= self.submit.unread_most

    @property
    def reusable(self) -> list[int]:
        """What of its tokens need not be evaluated where it is in the cache. The last token of one
        that is answered is evaluated again, for its logits; warming wants none.
        """
        return self.tokens if self.warms else self.tokens[:-1]

    @property
    def decodes(self) -> bool:
        """Whether its last generated token is all there is to evaluate."""
        return self.missing == 1 and len(self.tokens) > self.n_prompt

    def next_tokens(self, n: int) -> list[int]:
        """The next to evaluate: `n`, or fewer where there is a stop."""
        assert self.sequence is not None
        start = len(self.sequence.tokens)
        return self.tokens[start : min([start + n, *(s for s in self.stops if s > start)])]

    @property
    def cached_tokens(self) -> int:
        return max(0, self.n_prompt - self.evaluated_prompt)


def by_class(requests: Sequence[Request]) -> tuple[int, ...]:
    """How many of them each class has."""
    counts = [0] * len(CLASSES)
    for r in requests:
        counts[r.priority] += 1
    return tuple(counts)
