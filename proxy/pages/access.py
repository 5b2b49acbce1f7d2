"""Who may see a page, whose chats it shows, and which requests may act. No I/O.

A browser sends what it knows to whoever asks for it by the right name. So a page without a key is
only for connections from this very machine, under one of its own names (a name of somebody else's
may lead here too: DNS rebinding), and what changes something needs a token that only our own
pages hold, and must not come from another origin.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from proxy.errors import ApiError
from proxy.headers import authorize, owner_of

COOKIE = "chatfold_session"
SESSIONS_MOST = 256
SESSION_S = 12 * 3600.0
"""A session that nobody used for so long is over."""

OWNER_NAME = re.compile(r"[0-9a-f]{24}(?::[0-9a-f]{24})?")
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
"""A request with one of these came through another server, from who knows where."""


@dataclass(frozen=True, slots=True)
class Visitor:
    """Somebody who may come in. `owner` is whose chats are shown, "" until one was chosen;
    `token` goes into every form. `local` needs no key and may choose among all owners."""

    owner: str
    token: str
    local: bool = False


class Refused(Exception):
    """The pages are not for this request. `word` names the sentence that says why."""

    def __init__(self, word: str, status: int = 403) -> None:
        super().__init__(word)
        self.word = word
        self.status = status


class LoginNeeded(Exception):
    """The pages are for whoever has a key."""


@dataclass(slots=True)
class _Session:
    owner: str
    local: bool
    used_at: float


class Sessions:
    """Who is logged in, in memory: a restart ends all. Lives on the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._secret = secrets.token_bytes(32)
        self._clock = clock
        self._open: OrderedDict[str, _Session] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Sessions open={len(self._open)}>"

    def begin(self, owner: str, *, local: bool) -> str:
        """The cookie's value for a new session."""
        while len(self._open) >= SESSIONS_MOST:
            self._open.popitem(last=False)
        id_ = secrets.token_urlsafe(32)
        self._open[id_] = _Session(owner, local, self._clock())
        return id_

    def end(self, id_: str) -> None:
        self._open.pop(id_, None)

    def visitor(self, id_: str, *, local: bool) -> Visitor | None:
        """Who has this cookie. A session that began without a key is good only without one."""
        session = self._open.get(id_)
        if session is None or (session.local and not local):
            return None
        now = self._clock()
        if now - session.used_at > SESSION_S:
            self.end(id_)
            return None
        session.used_at = now
        self._open.move_to_end(id_)
        return Visitor(session.owner, self.token(id_), local)

    def token(self, id_: str) -> str:
        """What a form of this session carries; for "" that of who has none."""
        return hmac.new(self._secret, id_.encode(), hashlib.sha256).hexdigest()


def visitor_of(
    sessions: Sessions,
    *,
    headers: Mapping[str, str],
    cookie: str,
    client: str,
    keys: Sequence[str],
    inspect: str,
) -> Visitor:
    """Raises LoginNeeded or Refused. `inspect` is the setting, `client` the address that asks."""
    if inspect == "off":
        raise Refused("inspect_off", 404)
    local = not keys and inspect == "on"
    if local:
        _require_local(headers, client)
    elif not keys:
        raise Refused("no_key_set")
    if found := sessions.visitor(cookie, local=local):
        return found
    if local:
        return Visitor("", sessions.token(""), local=True)
    raise LoginNeeded


def _require_local(headers: Mapping[str, str], client: str) -> None:
    if not is_loopback(client) or any(name in headers for name in FORWARDED):
        raise Refused("not_local")
    if not is_loopback(host_name(headers.get("host", ""))):
        raise Refused("wrong_host")


def is_loopback(name: str) -> bool:
    """Whether an address, or a host's name, can only mean this machine."""
    if name.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def host_name(host: str) -> str:
    """A Host header's name without its port; "" where it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def owner_for(key: str, user: str, keys: Sequence[str]) -> str:
    """Whose chats somebody sees who logs in with this key. `user` is "", the id of one of its
    users, or an owner's name under this key, as `chatfold inspect` prints it. Raises ApiError.
    """
    bearer = {"authorization": f"Bearer {key}"}
    if error := authorize(bearer, keys):
        raise error
    own = owner_of(bearer)
    if OWNER_NAME.fullmatch(user):
        if user.partition(":")[0] != own:
            raise ApiError(403, "This owner is not one of the key's.")
        return user
    return owner_of(bearer, user or None)


def require_own_act(headers: Mapping[str, str], *, token: str, sent: str) -> None:
    """That what would change something was asked for by a page of ours. Raises Refused."""
    if not hmac.compare_digest(token.encode(), sent.encode("utf-8", "surrogatepass")):
        raise Refused("foreign_act")
    require_own_origin(headers)


def require_own_origin(headers: Mapping[str, str]) -> None:
    """That no page of another origin's asks: browsers say so with whatever changes something.
    Raises Refused."""
    site = headers.get("sec-fetch-site", "same-origin")
    origin = headers.get("origin")
    # Behind a server that speaks TLS the scheme differs; the name and port say who asks.
    foreign = origin is not None and urlsplit(origin).netloc != headers.get("host", "")
    if foreign or site not in ("same-origin", "none"):
        raise Refused("foreign_act")
