"""What is replayed: a chat that happened, turn by turn. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import groupby

from memory.records import Summary
from memory.transcript import ASSISTANT, Message, chain


@dataclass(frozen=True, slots=True)
class Question:
    """Something one might ask at the chat's end: its answer, and what was said that holds it."""

    answer: str
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request: the messages before `n_messages`, and the answer, which is the message there."""

    n_messages: int
    system: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat as it was. `messages` never has two answers in a row. `token_ids` holds, by place, the
    tokens of answers as they were generated, good for the tokenizer of that name; `summaries` those
    that a store had of it."""

    name: str
    messages: tuple[Message, ...]
    systems: tuple[str, ...] = ("",)
    """The system prompt of each exchange; the last one goes on."""
    token_ids: dict[int, bytes] = field(default_factory=dict)
    tokenizer: str = ""
    summaries: tuple[Summary, ...] = ()
    questions: tuple[Question, ...] = ()

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        ends = [i for i, m in enumerate(self.messages) if i and m.role == ASSISTANT]
        last = len(self.systems) - 1
        return tuple(Exchange(end, self.systems[min(n, last)]) for n, end in enumerate(ends))

    @property
    def digest(self) -> str:
        """Names the chat by all that was said in it."""
        head = "\0".join(self.systems).encode("utf-8", "surrogatepass")
        digests = chain(self.messages)
        return blake2b(head + (digests[-1] if digests else b""), digest_size=8).hexdigest()

    def first(self, n_turns: int) -> Chat:
        """The beginning of it, without questions about the rest. 0 takes all."""
        ends = [e.n_messages for e in self.exchanges]
        if not n_turns or n_turns >= len(ends):
            return self
        return Chat(
            self.name,
            self.messages[: ends[n_turns - 1] + 1],
            self.systems[:n_turns],
            self.token_ids,
            self.tokenizer,
            self.summaries,
        )


def one_answer_each(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The same with answers that follow each other made one."""
    out: list[Message] = []
    for role, run in groupby(messages, key=lambda m: m.role):
        if role == ASSISTANT:
            out.append(Message(ASSISTANT, "\n".join(m.text.strip() for m in run)))
        else:
            out += run
    return tuple(out)
