"""Finding a window that slid: where in the stored history its first message stands.

A client that drops its oldest messages sends a window that begins in the middle of a stored path.

    stored   m0 m1 m2 m3 m4 m5 m6 a6
    sent              m3 m4 m5 m6 a6 | new
                      run of matches

A wrong re-attachment is worse than none: it would put one chat's past into another. So a run must
hold enough that could not be chance, and the longest run wins, then the newest. A run that holds
less is enough where the client sends a summary that was made of what stands before it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from memory.store import Store
from memory.told import tells_of
from memory.transcript import ASSISTANT, Message, canonical, chain, message_digest

log = logging.getLogger("chatfold.memory")

ANCHORS_MOST = 3
ANCHOR_REACH = 16
"""Among how many first messages an anchor is looked for: the longest is the least likely to stand
elsewhere too."""
CANDIDATES_MOST = 24

RUN_LEAST = 2
"""Messages that must match, unless one alone is evidence enough."""
CHARS_LEAST = 40
"""Characters of the matching messages together."""
ALONE_CHARS = 120
"""An answer of this length that stands nowhere else in the owner's history may match alone."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """The window continues `conversation` behind the message with the digest `parent`; its first
    `run` messages are stored there."""

    conversation: str
    parent: bytes
    run: int


@dataclass(frozen=True, slots=True)
class _Place:
    """A stored message that equals message `index` of the window."""

    conversation: str
    digest: bytes
    depth: int
    index: int
    others: int


async def attach(
    store: Store,
    owner: str,
    messages: Sequence[Message],
    *,
    known: int,
    hinted: str | None,
    told: str = "",
) -> Attachment | None:
    """Where the window belongs, if that is better than the `known` messages that match from a root.

    `hinted` is the conversation that the client's own id stood for before: it lowers the evidence
    that is needed and decides between equals, and never decides against the content. `told` is the
    client's own summary of what it dropped: evidence where the messages alone are not enough.
    """
    best = None
    for index in _anchors(messages):
        best = await _best(store, owner, messages, index, known=known, hinted=hinted)
        # A run that is longer would hold this anchor too.
        if best:
            break
    if best is None and told and messages:
        best = await _by_summary(store, owner, messages, told, known=known)
    if best:
        log.info(
            "a window of %d messages continues conversation %s: %d messages match",
            len(messages),
            best.conversation,
            best.run,
        )
    return best


def _anchors(messages: Sequence[Message]) -> list[int]:
    """Messages to look for, the least likely to stand elsewhere too first. One of the first two is
    always among them: the longest may all be new, or stand in another chat as well."""
    reach = range(min(len(messages), ANCHOR_REACH))
    longest = sorted(reach, key=lambda i: -len(canonical(messages[i])))
    first = [i for i in longest if i < RUN_LEAST][:1]
    return list(dict.fromkeys([*longest[:ANCHORS_MOST], *first]))


async def _best(
    store: Store,
    owner: str,
    messages: Sequence[Message],
    index: int,
    *,
    known: int,
    hinted: str | None,
) -> Attachment | None:
    """The longest run that holds message `index`, then the hinted one, then the newest."""
    best: Attachment | None = None
    for place in await _places(store, owner, messages[index], index):
        found = await _follow(store, owner, messages, place)
        if found is None or found.run <= known or not _enough(messages, found, place, hinted):
            continue
        if best is None or (found.run, found.conversation == hinted) > (
            best.run,
            best.conversation == hinted,
        ):
            best = found
    return best


async def _places(store: Store, owner: str, message: Message, index: int) -> list[_Place]:
    """Stored twins of one message of the window, newest first."""
    twins = await store.by_message_digest(owner, message_digest(message), limit=CANDIDATES_MOST)
    # A twin less deep than the anchor cannot have the window's beginning before it.
    return [
        _Place(conversation, node.digest, node.depth, index, len(twins) - 1)
        for conversation, node in twins
        if node.depth > index
    ]


async def _follow(
    store: Store, owner: str, messages: Sequence[Message], place: _Place
) -> Attachment | None:
    """The run that begins with the window's first message if this place is right; else None."""
    head = await store.path(owner, place.digest, after_depth=place.depth - place.index - 1)
    if not head:
        return None
    parent = head[0].parent
    found = await store.deepest(owner, chain(messages, parent))
    # A chain that is known up to the anchor vouches for every message before it.
    if found is None or found[1] < place.index:
        return None
    return Attachment(found[0], parent, found[1] + 1)


def _enough(
    messages: Sequence[Message], found: Attachment, place: _Place, hinted: str | None
) -> bool:
    """Whether so many equal messages in a row can hardly be chance."""
    run = messages[: found.run]
    if found.conversation == hinted:
        return True
    if len(run) >= RUN_LEAST:
        return sum(len(canonical(m)) for m in run) >= CHARS_LEAST
    alone = run[0]
    return place.others == 0 and alone.role == ASSISTANT and len(canonical(alone)) >= ALONE_CHARS


async def _by_summary(
    store: Store, owner: str, messages: Sequence[Message], told: str, *, known: int
) -> Attachment | None:
    """The one conversation whose stored past the summary was made of, at the newest place where the
    window's first message stands behind that past. None where two conversations could be meant."""
    found: dict[str, Attachment] = {}
    for place in await _places(store, owner, messages[0], 0):
        if place.conversation in found:
            continue
        attachment = await _follow(store, owner, messages, place)
        if attachment and attachment.run > known and await _told(store, owner, attachment, told):
            found[place.conversation] = attachment
    return found.popitem()[1] if len(found) == 1 else None


async def _told(store: Store, owner: str, attachment: Attachment, told: str) -> bool:
    """Whether the summary was made of what stands before the run: its messages, and the summaries
    that stand for some of them on this very path."""
    path = {node.digest: node.text for node in await store.path(owner, attachment.parent)}
    summaries = await store.summaries(owner, attachment.conversation)
    blocks = [s.text for s in summaries if s.last_digest in path]
    return tells_of(told, [*blocks, *path.values()])
