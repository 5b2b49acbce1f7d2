"""What a request's headers say: whose it is, whether it may pass, which conversation it is of."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from proxy.errors import ApiError, unauthorized

USER_ID = "x-user-id"
CONVERSATION_ID = "x-conversation-id"
MESSAGE_ID = "x-message-id"
PARENT_ID = "x-parent-id"
"""As librechat.yaml can send them (`endpoints.openAI.headers`)."""

MAX_ID_CHARS = 200


@dataclass(frozen=True, slots=True)
class Hints:
    """Ids that a client may send. They can help to find a conversation; nothing may need them."""

    conversation: str | None = None
    message: str | None = None
    parent: str | None = None


def bearer_token(headers: Mapping[str, str]) -> str:
    """The API key as the client sent it, "" where it sent none. `headers` has lower-case keys or
    ignores case."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def authorize(headers: Mapping[str, str], keys: Sequence[str]) -> ApiError | None:
    """None when the request may pass: its key is one of `keys`, or there are none.

    Compares with every key in constant time, so that the time taken tells nothing.
    """
    if not keys:
        return None
    token = _sent(bearer_token(headers))
    hits = [hmac.compare_digest(token, key.encode()) for key in keys]
    return None if any(hits) else unauthorized()


def owner_of(headers: Mapping[str, str], user: str | None = None) -> str:
    """Whose data it is: a stable name made of the API key and the user id, which it hides.

    The user id is the `x-user-id` header, which the operator sets, or else `user` of the body.
    """
    key = _digest(_sent(bearer_token(headers)))
    # The same bytes for the same id, whether it comes in a header or in the body's JSON.
    user_id = _sent(_id(headers, USER_ID) or "") or (user or "").encode("utf-8", "surrogatepass")
    return f"{key}:{_digest(user_id)}" if user_id else key


def hints(headers: Mapping[str, str], *, conversation_header: str = CONVERSATION_ID) -> Hints:
    """The ids in the headers, as far as they are there and make sense."""
    return Hints(
        conversation=_id(headers, conversation_header.lower()),
        message=_id(headers, MESSAGE_ID),
        parent=_id(headers, PARENT_ID),
    )


def _id(headers: Mapping[str, str], name: str) -> str | None:
    # An id that LibreChat does not know comes as "", or as the placeholder's own text.
    value = headers.get(name, "").strip()
    usable = value and len(value) <= MAX_ID_CHARS and not value.startswith("{{")
    return value if usable and value not in ("null", "undefined") else None


def _sent(value: str) -> bytes:
    """A header value's bytes as they were sent: Starlette reads them as latin-1."""
    try:
        return value.encode("latin-1")
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogatepass")


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=12, person=b"chatfold-owner").hexdigest()
