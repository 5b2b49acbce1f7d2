"""What the store keeps, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

MODEL = "model"
EXTRACTIVE = "extractive"
EDITED = "edited"

FORGOTTEN = "[This message was forgotten.]"
"""What the model reads in a forgotten message's place."""


@dataclass(frozen=True, slots=True)
class Node:
    """One stored message: a node in a conversation's tree.

    `digest` is the chain digest at this message, `parent` the one before it (ROOT at a root).
    `depth` counts messages from the root, the first one being 0. `text` is the text as the model
    wrote it or the user sent it, not the canonical one. `n_tokens` counts the text's tokens (and
    the note's) without the template around it, by the tokenizer named `tokenizer`; `token_ids`
    holds the very tokens an answer was generated as (little-endian int32), None for text that came
    from a client.
    """

    digest: bytes
    parent: bytes
    depth: int
    role: str
    text: str
    n_tokens: int
    tokenizer: str
    token_ids: bytes | None = None
    created_at: float = 0.0
    front: str | None = None
    """The part of the system prompt that stood in front when this user message was answered; None
    for messages that were never the newest."""
    note: str = ""
    """The rest of the system prompt, which stands right before this user message."""


class Span(NamedTuple):
    """Where a summary lies and whether it is in use: all that must be known to choose it."""

    id: int
    first_depth: int
    last_depth: int
    last_digest: bytes
    activated_at: float | None
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Summary:
    """A stored text that stands for the messages `first_depth`..`last_depth` (both included).

    `first_digest` and `last_digest` are the chain digests at both ends. Immutable but for
    `activated_at`: seconds since the epoch at which its context was warm, None before.
    """

    id: int
    conversation: str
    first_depth: int
    last_depth: int
    first_digest: bytes
    last_digest: bytes
    rank: int
    parents: tuple[int, ...]
    text: str
    n_tokens: int
    tokenizer: str
    made_by: str
    """MODEL, EXTRACTIVE or EDITED."""
    model: str
    policy_digest: str
    prompt_version: str
    failed_checks: tuple[str, ...]
    """Names of the checks that the model's own text failed before this text was taken."""
    duration_s: float
    created_at: float
    activated_at: float | None = None
    generation: int = 0
    """Of several that begin at one message those of the greatest generation stand for it. A set
    that was written again and taken into use is of a new one."""


@dataclass(frozen=True, slots=True)
class Rewrite:
    """The summaries of the messages `first_depth`..`last_depth` written again under another policy:
    a set of candidates that no context uses. `before` are the ids of the summaries that stood for
    the same messages when it began, `policy` the knobs as JSON.

    `finished_at` is None until the last candidate is there, `used_at` until the set is taken into
    use. A candidate's id and parents count among the candidates.
    """

    id: int
    conversation: str
    first_depth: int
    last_depth: int
    last_digest: bytes
    policy_name: str
    policy: str
    before: tuple[int, ...]
    created_at: float
    finished_at: float | None = None
    used_at: float | None = None
    candidates: tuple[Summary, ...] = ()

    @property
    def blocks(self) -> tuple[Summary, ...]:
        """Those that would stand in the context: they went into no other."""
        merged = {id_ for c in self.candidates for id_ in c.parents}
        left = (c for c in self.candidates if c.id not in merged)
        return tuple(sorted(left, key=lambda c: c.first_depth))


@dataclass(frozen=True, slots=True)
class Pin:
    """A fact that stands in every context of its conversation."""

    id: int
    text: str
    created_at: float


@dataclass(frozen=True, slots=True)
class Answered:
    """What an answer cost, and what its context was made from: enough to build it again.

    `summaries` are the blocks' ids, `room` the numbers of memory.context.Room in their order,
    `context_digest` memory.context.digest_of what was really sent. `message` is the chain digest of
    the answer. Times are seconds.
    """

    message: bytes
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    queued_s: float
    first_token_s: float
    summaries: tuple[int, ...]
    room: tuple[int, ...]
    pinned: str
    context_digest: bytes
    created_at: float = 0.0

    @property
    def evaluated_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


@dataclass(frozen=True, slots=True)
class Standing:
    """What is stored of a history: the blocks that stand for its beginning (see Store.covering),
    and the messages behind those in use, of the `known` ones that are stored."""

    conversation: str
    known: int
    active: tuple[Summary, ...]
    written: tuple[Summary, ...]
    nodes: tuple[Node, ...]
    pins: tuple[Pin, ...] = ()
