"""Keeping a server with one sequence busy with the right chat: pure.

Such a server has the prefix of one prompt. Whoever speaks next finds it warm if it is theirs; so
between two requests the chat that is likely to be next is evaluated, in steps that a user need not
wait for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from proxy.engines.remote_wire import Message

CHATS_MOST = 16
STEP_CHARS = 1000
"""About 250 tokens, one or two seconds on a slow machine: what a request may have to wait for, as
the server finishes the prompt it has begun."""


class Rotation:
    """Who spoke after whom, and what each chat's next prompt begins with."""

    def __init__(self) -> None:
        self._after: OrderedDict[str, str] = OrderedDict()
        self._prompts: OrderedDict[str, list[Message]] = OrderedDict()
        self._owners: OrderedDict[str, str] = OrderedDict()
        self._last = ""

    def spoke(self, conversation: str) -> None:
        """A user's request of this conversation."""
        if self._last:
            self._after[self._last] = conversation
            self._after.move_to_end(self._last)
        self._last = conversation
        _trim(self._after)

    def knows(self, conversation: str, messages: list[Message], *, owner: str = "") -> None:
        """What the next request of this conversation will begin with."""
        self._owners[conversation] = owner
        self._owners.move_to_end(conversation)
        _trim(self._owners)
        self._prompts[conversation] = messages
        self._prompts.move_to_end(conversation)
        _trim(self._prompts)

    def forget(self, owner: str) -> None:
        """Nothing of this owner's chats is kept."""
        gone = {one for one, whose in self._owners.items() if whose == owner}
        for conversation in gone:
            del self._owners[conversation]
            self._prompts.pop(conversation, None)
        for one, following in list(self._after.items()):
            if gone & {one, following}:
                del self._after[one]
        self._last = "" if self._last in gone else self._last

    def next(self) -> list[Message]:
        """The beginning of the prompt that is likely to be next: whoever followed the last speaker
        the last time, or the last speaker; empty where it is not known."""
        return self._prompts.get(self._likely(), [])

    def whose(self) -> tuple[str, str]:
        """Owner and conversation of `next`."""
        likely = self._likely()
        return self._owners.get(likely, ""), likely

    def _likely(self) -> str:
        likely = self._after.get(self._last, self._last)
        return likely if self._prompts.get(likely) else self._last


class Resident:
    """The prompt, with its answer, that the server's one sequence holds: as text."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self.whose = ("", "")
        """Owner and conversation."""

    def set(self, messages: Sequence[Message], *, whose: tuple[str, str] = ("", "")) -> None:
        self._messages, self.whose = list(messages), whose

    def clear(self) -> None:
        self._messages, self.whose = [], ("", "")

    def shared_chars(self, messages: Sequence[Message]) -> int:
        """How much of a prompt it holds, counted in characters of the texts."""
        chars = 0
        for ours, theirs in zip(self._messages, messages, strict=False):
            if ours["role"] != theirs["role"]:
                break
            n = _shared(ours["content"], theirs["content"])
            chars += n
            if n < len(theirs["content"]) or n < len(ours["content"]):
                break
        return chars

    def holds(self, messages: Sequence[Message]) -> bool:
        """Whether nothing of the prompt would have to be evaluated."""
        n = len(messages)
        return self._messages[:n] == list(messages)


def steps(messages: Sequence[Message], *, known_chars: int) -> Iterator[list[Message]]:
    """Beginnings of the prompt, each some steps longer than the one before; the last is all of it.

    known     |        step        step        rest
    ----------+-----------+-----------+------------+
    """
    total = sum(len(m["content"]) for m in messages)
    for chars in range(known_chars + STEP_CHARS, total - STEP_CHARS // 2, STEP_CHARS):
        yield _beginning(messages, chars)
    yield list(messages)


def _beginning(messages: Sequence[Message], chars: int) -> list[Message]:
    kept: list[Message] = []
    for message in messages:
        if chars <= 0:
            break
        kept.append({"role": message["role"], "content": message["content"][:chars]})
        chars -= len(message["content"])
    if kept and kept[-1]["role"] == "system":
        # Templates want a user's message.
        kept.append({"role": "user", "content": ""})
    return kept


def _shared(a: str, b: str) -> int:
    if a.startswith(b) or b.startswith(a):
        return min(len(a), len(b))
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def _trim(some: OrderedDict[str, Any]) -> None:
    while len(some) > CHATS_MOST:
        some.popitem(last=False)
