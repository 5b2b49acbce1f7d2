"""Transcripts, chains and turns: what a client sent, as values. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

USER = "user"
ASSISTANT = "assistant"
TOOL = "tool"

_TAGS = {USER: b"u", ASSISTANT: b"a", TOOL: b"t"}
"""The role as one byte in a digest. Stores hold digests: none of these may ever change."""

DIGEST_BYTES = 20
"""Length of every digest: blake2b (RFC 7693) cut at construction to 160 bits."""

ROOT = bytes(DIGEST_BYTES)
"""The digest before the first message: the parent of every conversation's root."""


# Not a frozen dataclass: with every request thousands of these are made, and a dataclass sets each
# field by a call, which takes eight times as long. Without gc: two texts cannot make a cycle.
class Message(msgspec.Struct, frozen=True, gc=False):
    """One message of the chain. `role` is USER, ASSISTANT or TOOL; the system prompt is not part
    of it. An assistant's calls of tools are part of its text (memory.calls), a tool's text is its
    result.
    """

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Transcript:
    """The messages of one request after normalisation.

    `system` is the merged system prompt, "" where the client sent none. `messages` holds user,
    assistant and tool messages in the order sent, unmerged. When `continues` is true the last
    message is an assistant's partial answer that the model is asked to carry on with.
    """

    system: str
    messages: tuple[Message, ...]

    @property
    def continues(self) -> bool:
        return bool(self.messages) and self.messages[-1].role == ASSISTANT


def canonical(message: Message) -> str:
    """The text by which two messages are the same.

    Clients trim the answers they store, so assistant text counts modulo surrounding white space.
    """
    return message.text.strip() if message.role == ASSISTANT else message.text


def extend(parent: bytes, message: Message) -> bytes:
    """d_i = H(d_{i-1}, role_i, canonical text_i)."""
    return _hash(parent, message)


def message_digest(message: Message) -> bytes:
    """The digest of one message by itself, wherever it stands: finds overlapping windows."""
    return _hash(b"", message)


def chain(messages: Iterable[Message], parent: bytes = ROOT) -> tuple[bytes, ...]:
    """One digest per message boundary. Equal chains mean equal histories."""
    digests = []
    for message in messages:
        parent = _hash(parent, message)
        digests.append(parent)
    return tuple(digests)


def turn_starts(roles: Sequence[str]) -> tuple[int, ...]:
    """Indices at which a turn begins: a user message that does not follow another user message.

    A leading assistant message belongs to a turn of its own. Two user messages in a row are one
    turn: the first of them never got an answer. Tools' results lie inside the turn of their call.

    >>> turn_starts(["user", "assistant", "user", "user", "assistant"])
    (0, 2)
    """
    return tuple(
        i for i, role in enumerate(roles) if i == 0 or (role == USER and roles[i - 1] != USER)
    )


def _hash(parent: bytes, message: Message) -> bytes:
    # The role goes in as one tag byte, so that no text can imitate another role's message. Joined
    # first and hashed at once: one call a message instead of three, where thousands are chained.
    text = canonical(message).encode("utf-8", "surrogatepass")
    return blake2b(parent + _TAGS[message.role] + text, digest_size=DIGEST_BYTES).digest()
