"""A running proxy as a Source, over its HTTP API. The only file here that imports httpx."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import msgspec

from proxy import wire
from proxy.inspecting.paths import CHAT, VIEWS
from proxy.inspecting.sources import SourceError

CONNECT_S = 5.0
ANSWER_S = 60.0
"""For a view: counting a long chat's tokens waits for the model."""
UPKEEP_S = 660.0
"""Forgetting rewrites the database: longer than the store's own bound, which says more."""
SILENCE_S = 60.0
"""The live stream says something, if only a ping, far more often."""

UNAUTHORIZED, FORBIDDEN, NOT_FOUND = 401, 403, 404
DATA = "data: "


class ProxySource:
    """Source. `owner` is an owner's name or a user's id, "" for the only one or the key's own."""

    def __init__(self, client: httpx.AsyncClient, url: str, owner: str) -> None:
        self._client = client
        self._url = url
        self._owner = owner

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, *, key: str, owner: str) -> AsyncIterator[ProxySource]:
        """Connects to nothing yet. Raises SourceError for what is no URL."""
        headers = {"accept": "application/json", "user-agent": "chatfold"}
        headers |= {"authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
        # No proxy of the environment's: what is asked for is on this machine or near it.
        async with httpx.AsyncClient(headers=headers, timeout=timeout, trust_env=False) as client:
            yield cls(client, base_of(url), owner)

    async def owners(self) -> Any:
        return await self._ask("GET", "/owners")

    async def view(self, name: str, **asked: str) -> Any:
        path, _ = VIEWS[name]
        words = {k: v for k, v in asked.items() if f"{{{k}}}" in path}
        query = {k: v for k, v in asked.items() if k not in words}
        return await self._ask("GET", _filled(path, **words), query=query)

    def live(self) -> AsyncGenerator[Any, None]:
        return self._events("/live")

    def progress(self, conversation: str, rewrite: int) -> AsyncGenerator[Any, None]:
        return self._events(_of_rewrite(conversation, rewrite, "/events"))

    async def _events(self, path: str) -> AsyncGenerator[Any, None]:
        url, query = f"{self._url}/api{path}", {"owner": self._owner}
        bound = httpx.Timeout(SILENCE_S, connect=CONNECT_S)
        try:
            async with self._client.stream("GET", url, params=query, timeout=bound) as response:
                if response.status_code != httpx.codes.OK:
                    raise self._failure(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    if line.startswith(DATA):
                        yield self._json(line.removeprefix(DATA).encode())
        except httpx.HTTPError as exc:
            raise self._unreachable(exc) from exc

    async def pin(self, conversation: str, text: str) -> Any:
        path = _filled(f"{CHAT}/pins", conversation=conversation)
        return await self._ask("POST", path, value={"text": text})

    async def unpin(self, conversation: str, pin: int) -> Any:
        path = _filled(f"{CHAT}/pins/{{pin}}", conversation=conversation, pin=str(pin))
        return await self._ask("DELETE", path)

    async def correct(self, conversation: str, summary: int, text: str, *, leaf: str) -> Any:
        path = VIEWS["summary"][0]
        path = _filled(path, conversation=conversation, summary=str(summary))
        return await self._ask("PUT", path, value={"text": text}, query={"leaf": leaf})

    async def forget_message(self, conversation: str, digest: str) -> Any:
        path = _filled(VIEWS["message"][0], conversation=conversation, message=digest)
        return await self._ask("DELETE", path, answer_s=UPKEEP_S)

    async def forget(self, conversation: str) -> Any:
        path = _filled(CHAT, conversation=conversation)
        return await self._ask("DELETE", path, answer_s=UPKEEP_S)

    async def forget_all(self) -> Any:
        return await self._ask("DELETE", VIEWS["conversations"][0], answer_s=UPKEEP_S)

    async def take_import(self, data: bytes) -> Any:
        return await self._ask("POST", "/import", content=data, answer_s=UPKEEP_S)

    async def begin_rewrite(
        self, conversation: str, *, leaf: str, policy: str, newest: int, knobs: dict[str, str]
    ) -> Any:
        path = _filled(VIEWS["rewrites"][0], conversation=conversation)
        value = {"policy": policy, "newest": newest, "knobs": knobs}
        return await self._ask("POST", path, value=value, query={"leaf": leaf})

    async def act_on_rewrite(self, conversation: str, rewrite: int, act: str) -> Any:
        return await self._ask("POST", _of_rewrite(conversation, rewrite, f"/{act}"))

    async def discard_rewrite(self, conversation: str, rewrite: int) -> Any:
        return await self._ask("DELETE", _of_rewrite(conversation, rewrite))

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        value: Any = None,
        content: bytes | None = None,
        answer_s: float = ANSWER_S,
    ) -> Any:
        """Raises SourceError."""
        body = content if value is None else wire.encode(value)
        try:
            response = await self._client.request(
                method,
                f"{self._url}/api{path}",
                params={"owner": self._owner} | (query or {}),
                content=body,
                headers={} if body is None else {"content-type": "application/json"},
                timeout=httpx.Timeout(answer_s, connect=CONNECT_S),
            )
        except httpx.HTTPError as exc:
            raise self._unreachable(exc) from exc
        if response.status_code != httpx.codes.OK:
            raise self._failure(response.status_code, response.content)
        return self._json(response.content)

    def _json(self, body: bytes) -> Any:
        try:
            return msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise self._stranger() from exc

    def _unreachable(self, exc: httpx.HTTPError) -> SourceError:
        why = str(exc) or type(exc).__name__
        return SourceError(f"the proxy at {self._url} cannot be reached: {why}")

    def _stranger(self) -> SourceError:
        return SourceError(f"what answers at {self._url} is no chatfold, or one of another version")

    def _failure(self, status: int, body: bytes) -> SourceError:
        try:
            error = msgspec.json.decode(body)["error"]
            said, code, param = str(error["message"]), error["code"], error["param"]
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
            return self._stranger()
        if status == NOT_FOUND and code == "unknown_url":
            return self._stranger()
        if status == UNAUTHORIZED:
            said = (
                f"the proxy at {self._url} wants an API key: --api-key, CHATFOLD_API_KEY or the "
                "configuration file"
            )
        hint = " (--owner; `chatfold inspect owners` names them)" if param == "owner" else ""
        return SourceError(f"{said}{hint}")


def base_of(url: str) -> str:
    """The proxy's own address, also of a URL as LibreChat is given it. Raises SourceError."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        usable = False
    if not usable or "@" in url:
        raise SourceError(f"--url must be like http://127.0.0.1:8080, not {url!r}")
    return url.split("?")[0].split("#")[0].rstrip("/").removesuffix("/v1")


def _of_rewrite(conversation: str, rewrite: int, below: str = "") -> str:
    path = VIEWS["rewrite"][0] + below
    return _filled(path, conversation=conversation, rewrite=str(rewrite))


def _filled(path: str, **words: str) -> str:
    return path.format(**{name: quote(word, safe="") for name, word in words.items()})
