"""Chats that send their full history every turn, as chat UIs do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import httpx
from llama_cpp import Llama

from bench.client import Answer, Messages, ask
from bench.servers import model_file


class UserTokens:
    """Counts what a user's message adds to a prompt, with the model's own tokenizer."""

    def __init__(self) -> None:
        self._llama = Llama(str(model_file()), vocab_only=True, verbose=False)

    def count(self, text: str) -> int:
        wrapped = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        return len(self._llama.tokenize(wrapped.encode(), add_bos=False, special=True))


@dataclass
class Turn:
    """One turn as it was measured. `evaluated` is None where the server did not tell."""

    number: int
    new_tokens: int
    answer: Answer
    evaluated: int | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.evaluated is None else self.evaluated / self.new_tokens

    @property
    def total_tokens(self) -> int:
        return (self.answer.prompt_tokens or 0) + (self.answer.completion_tokens or 0)

    def context(self, name: str) -> int | None:
        """A number out of the x-chatfold-context header."""
        pairs = (p.strip().partition("=") for p in self.answer.context.split(";"))
        found = {key: value for key, _, value in pairs}
        return int(found[name]) if name in found else None

    def to_json(self) -> dict[str, Any]:
        ratio = None if self.ratio is None else round(self.ratio, 4)
        counts = {"turn": self.number, "new_tokens": self.new_tokens, "evaluated": self.evaluated}
        return counts | {"evaluated_per_new": ratio} | self.answer.to_json()


@dataclass
class Chat:
    """A growing chat with one server."""

    client: httpx.Client
    max_tokens: int
    messages: Messages = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def with_user(self, text: str) -> Messages:
        return [*self.messages, {"role": "user", "content": text}]

    def say(self, text: str, *, new_tokens: int) -> Turn:
        """One turn. The answer goes into the history as it came; a turn without one is left out of
        it, as chat UIs do.
        """
        answer = ask(self.client, self.with_user(text), max_tokens=self.max_tokens)
        if answer.ok:
            self.messages = [*self.with_user(text), {"role": "assistant", "content": answer.text}]
        turn = Turn(len(self.turns) + 1, new_tokens, answer)
        if answer.prompt_tokens is not None and answer.cached_tokens is not None:
            turn.evaluated = answer.prompt_tokens - answer.cached_tokens
        self.turns.append(turn)
        return turn
