"""What memory is handed by its host: protocols for the model's side, so that memory knows no
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from memory.context import Context


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished background answer. Counts are tokens; `cached_tokens` of the prompt were not
    evaluated.
    """

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: str


class ModelGone(Exception):
    """The model could not do it now (crashed, stopped, unreachable). Nothing is lost; try again
    later.
    """


@dataclass(frozen=True, slots=True)
class Budget:
    """The room there is. `message_tokens` is what the chat template adds around each message,
    `base_tokens` what it adds once (begin of text, the header of the answer)."""

    window_tokens: int
    message_tokens: int
    base_tokens: int


class TokenCounter(Protocol):
    """Counts tokens as the model would see them."""

    @property
    def tokenizer(self) -> str:
        """Names the vocabulary; counts and token ids are good only under the same name."""
        ...

    async def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself, markup counted as plain text."""
        ...

    async def count_tools(self, tools: str) -> int:
        """What these tools (memory.context.Context.tools) add to a prompt."""
        ...


class Completer(Protocol):
    """Writes text in the background: gives way to every user request, and goes on later."""

    async def complete(
        self, owner: str, context: Context, *, conversation: str, max_tokens: int
    ) -> Completion:
        """Raises ModelGone. Cancellable; a cancelled call frees the model at once. `conversation`
        says whose prefix the context may share."""
        ...


class Warmer(Protocol):
    """Evaluates a context in the background, so that its prefix is in the KV cache."""

    async def warm(self, owner: str, context: Context, *, conversation: str) -> int:
        """Returns the number of tokens that had to be evaluated. Raises ModelGone."""
        ...
