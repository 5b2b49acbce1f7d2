"""Downloads from the Hugging Face hub: one of two doors to httpx, beside `chatfold inspect`.

    HEAD endpoint/REPO/resolve/main/FILE   size, and the SHA-256 where the hub keeps large files
    GET  the same, from where an earlier one broke off; it leads to another server

What is not whole lies in a file of its own that carries the hub's tag of its content: a file that
changed there is never glued to the beginning of an older one. It is checked before it takes the
name under which the model is loaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import httpx

from proxy.hub import HubError, HubFile

ENDPOINT = "https://huggingface.co"
TIMEOUT = httpx.Timeout(30.0, connect=10.0)
REDIRECTS_MOST = 5
TRIES = 5
"""Of those that bring no new byte."""
WAIT_FIRST_S = 1.0
TELL_EVERY_S = 10.0
SHA256 = re.compile(r"[0-9a-f]{64}")

Tell = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Remote:
    """A file as the hub describes it. `tag` is its SHA-256 where that is known."""

    url: str
    size: int
    tag: str


class Broken(Exception):
    """The connection failed: the next try may go on."""


def fetch(
    file: HubFile,
    *,
    environ: Mapping[str, str],
    tell: Tell,
    cache: Path | None = None,
    wait_first_s: float = WAIT_FIRST_S,
) -> Path:
    """The model's file, downloaded with all its parts unless it is there. Blocks for as long as
    that takes, and tells how far it is. Asks nobody when all is there. Raises HubError.

    `environ`: HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to the hub's own tools.
    """
    missing = [part for part in file.parts() if not part.local(cache).is_file()]
    if missing and environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise HubError(f"{missing[0]} is not in the cache, and HF_HUB_OFFLINE forbids to ask")
    if missing:
        with _client(environ) as client:
            for part in missing:
                _fetch(client, part, part.local(cache), environ, tell, wait_first_s)
    return file.local(cache)


def _client(environ: Mapping[str, str]) -> httpx.Client:
    headers = {"user-agent": "chatfold", "accept-encoding": "identity"}
    if token := environ.get("HF_TOKEN"):
        # httpx drops it where a redirect leads to another server.
        headers["authorization"] = f"Bearer {token}"
    return httpx.Client(headers=headers, timeout=TIMEOUT)


def _fetch(
    client: httpx.Client,
    file: HubFile,
    target: Path,
    environ: Mapping[str, str],
    tell: Tell,
    wait_first_s: float,
) -> None:
    endpoint = (environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    url = f"{endpoint}/{file.repo}/resolve/main/{quote(file.path)}"
    remote = _patiently(lambda: _describe(client, file, url), wait_first_s=wait_first_s)
    try:
        with _part(target, remote) as part:
            if not target.is_file():
                _check_room(target, remote.size - _length(part))
                _download(client, remote, part, Progress(file, remote.size, tell), wait_first_s)
                _check_content(part, remote)
                Path(part.name).replace(target)
    except OSError as exc:
        raise HubError(f"{target} cannot be written: {exc.strerror}") from exc


def _describe(client: httpx.Client, file: HubFile, url: str) -> Remote:
    """Follows the hub's own redirects, of renamed repositories; the one that leads elsewhere is the
    download's, and the hub has said by then what it knows."""
    at = httpx.URL(url)
    for _ in range(REDIRECTS_MOST):
        response = _ask(client, at)
        there = at.join(response.headers.get("location", ""))
        if not response.is_redirect or (there.host, there.port) != (at.host, at.port):
            return _described(response, file, url)
        at = there
    raise HubError(f"{url} leads from one redirect to the next")


def _ask(client: httpx.Client, at: httpx.URL) -> httpx.Response:
    try:
        return client.head(at)
    except httpx.RequestError as exc:
        raise Broken(f"{at.host} cannot be reached: {exc}") from exc


def _described(response: httpx.Response, file: HubFile, url: str) -> Remote:
    _check_status(response, file)
    headers = response.headers
    own_size = "" if response.is_redirect else headers.get("content-length", "")
    size = headers.get("x-linked-size", own_size)
    tag = (headers.get("x-linked-etag") or headers.get("etag", "")).removeprefix("W/").strip('"')
    if not size.isdigit() or not re.fullmatch(r"[\w.-]+", tag):
        raise HubError(f"{url} does not answer as the Hugging Face hub does")
    return Remote(url, int(size), tag)


def _check_status(response: httpx.Response, file: HubFile) -> None:
    status = response.status_code
    if status in (401, 403):
        raise HubError(
            f"the hub does not show {file.repo}: its name is wrong, or it wants a token of "
            f"somebody who may read it, in HF_TOKEN ({status})"
        )
    if status == 404:
        raise HubError(f"the hub has no file {file.path} in {file.repo} (404)")
    if status == 429 or status >= 500:
        raise Broken(f"{response.url.host} answered {status}")
    if status >= 400:
        raise HubError(f"{response.url.host} answered {status} for {file}")


@contextmanager
def _part(target: Path, remote: Remote) -> Iterator[BufferedRandom]:
    """What came so far, at its end, and nobody else's meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.{remote.tag[:16]}.part").open("ab+") as part:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise HubError(f"another process is downloading {target.name} just now") from exc
        yield part


def _check_room(target: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < n_bytes:
        raise HubError(
            f"{target.name} needs {_mb(n_bytes)} MB, and {target.parent} has {_mb(free)}"
        )


def _download(
    client: httpx.Client,
    remote: Remote,
    part: BufferedRandom,
    progress: Progress,
    wait_first_s: float,
) -> None:
    def go_on() -> None:
        while _length(part) < remote.size:
            before = _length(part)
            try:
                _receive(client, remote, part, progress)
            except Broken:
                if _length(part) == before:
                    raise

    _patiently(go_on, wait_first_s=wait_first_s)
    part.flush()
    os.fsync(part.fileno())


def _receive(
    client: httpx.Client, remote: Remote, part: BufferedRandom, progress: Progress
) -> None:
    """One GET, from where the part ends. Raises Broken when it ends before the file does."""
    have = _length(part)
    headers = {"range": f"bytes={have}-"} if have else {}
    try:
        with client.stream("GET", remote.url, headers=headers, follow_redirects=True) as response:
            _take_up(response, part, have)
            # As it comes: chunks of a size are collected first, and a break loses what was.
            for chunk in response.iter_raw():
                part.write(chunk)
                progress(_length(part))
                if _length(part) > remote.size:
                    return  # not what was announced, whatever else comes
    except httpx.RequestError as exc:
        raise Broken(f"the download broke off: {exc}") from exc
    if _length(part) < remote.size:
        raise Broken("the download broke off")


def _take_up(response: httpx.Response, part: BufferedRandom, have: int) -> None:
    """Makes the part end where the response begins."""
    if response.status_code == 206:
        if not response.headers.get("content-range", "").startswith(f"bytes {have}-"):
            raise HubError(f"{response.url.host} sends another part of the file than was asked for")
    elif response.status_code == 200:
        part.truncate(0)
    else:
        raise Broken(f"{response.url.host} answered {response.status_code}")


def _check_content(part: BufferedRandom, remote: Remote) -> None:
    part.seek(0)
    right = _length(part) == remote.size
    if right and SHA256.fullmatch(remote.tag):
        right = hashlib.file_digest(part, "sha256").hexdigest() == remote.tag
    if not right:
        Path(part.name).unlink()
        raise HubError(f"what came from {remote.url} is not what the hub announced; try again")


def _patiently(act: Callable[[], T], *, wait_first_s: float) -> T:
    """`act`, again while it is Broken. Raises HubError when that does not help."""
    for n in range(TRIES):
        try:
            return act()
        except Broken as exc:
            if n == TRIES - 1:
                raise HubError(f"{exc}; the same command goes on from here") from exc
            time.sleep(wait_first_s * 2**n)
    raise AssertionError("unreachable")


def _length(part: BufferedRandom) -> int:
    part.flush()
    return os.fstat(part.fileno()).st_size


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f}"


class Progress:
    """A line at the start, at the end, and every few seconds between."""

    def __init__(self, file: HubFile, size: int, tell: Tell) -> None:
        self._file, self._size, self._tell = file, size, tell
        self._told = 0.0

    def __call__(self, n_bytes: int) -> None:
        now = time.monotonic()
        if now - self._told >= TELL_EVERY_S or n_bytes == self._size:
            self._told = now
            share = 100 * n_bytes // max(self._size, 1)
            self._tell(f"{self._file}: {_mb(n_bytes)} of {_mb(self._size)} MB, {share} %")
