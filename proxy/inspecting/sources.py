"""Where the terminal's views come from: the database file alone, or a running proxy."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

from memory.context import Context
from memory.policy import load_policy
from memory.ports import TokenCounter
from memory.store import Store, StoreUnavailable
from proxy.background import EngineTokens
from proxy.config import Config
from proxy.doctor import DATABASE
from proxy.engines.base import ModelInfo
from proxy.engines.embedded.snapshots import forget_files
from proxy.headers import owner_of
from proxy.inspecting import acts
from proxy.inspecting.paths import VIEWS
from proxy.inspecting.views import Desk, NotThere, summary_of
from proxy.pages.chats import Chat, digest_in
from proxy.pages.importing import import_file

MODEL_NEEDED = (
    "summaries are written again, and taken into use, by a running proxy: name it with --url (the "
    "file alone lists and compares what was written)"
)


class SourceError(Exception):
    """It cannot be had from here, or not now. `str()` is a sentence that says what to do."""


class Source(Protocol):
    """All that can be seen and done. Values are plain JSON, the same from every source."""

    async def owners(self) -> Any: ...

    async def view(self, name: str, **asked: str) -> Any:
        """One of VIEWS. Raises SourceError, NotThere, BadQuestion, StoreError."""
        ...

    def live(self) -> AsyncGenerator[Any, None]:
        """What the proxy is doing, now and whenever it changes."""
        ...

    async def pin(self, conversation: str, text: str) -> Any: ...

    async def unpin(self, conversation: str, pin: int) -> Any: ...

    async def correct(self, conversation: str, summary: int, text: str, *, leaf: str) -> Any: ...

    async def forget_message(self, conversation: str, digest: str) -> Any: ...

    async def forget(self, conversation: str) -> Any: ...

    async def forget_all(self) -> Any: ...

    async def take_import(self, data: bytes) -> Any: ...

    async def begin_rewrite(
        self, conversation: str, *, leaf: str, policy: str, newest: int, knobs: dict[str, str]
    ) -> Any: ...

    async def act_on_rewrite(self, conversation: str, rewrite: int, act: str) -> Any:
        """`use`, `undo`, `stop` or `go`."""
        ...

    async def discard_rewrite(self, conversation: str, rewrite: int) -> Any: ...

    def progress(self, conversation: str, rewrite: int) -> AsyncGenerator[Any, None]:
        """How far a set is, now and whenever it changes, to its end."""
        ...


class FileSource:
    """The file alone. Reads beside a running proxy; what changes something needs the file for
    itself, since a proxy would neither warm what was changed nor forget what it holds in memory."""

    def __init__(self, config: Config, owner: str, store: Store) -> None:
        self._config = config
        self._owner = owner
        self._store = store

    @classmethod
    @asynccontextmanager
    async def open(cls, config: Config, owner: str) -> AsyncIterator[FileSource]:
        """Raises StoreError."""
        source = cls(config, owner, await Store.open_read_only(config.data / DATABASE))
        try:
            yield source
        finally:
            await source._store.close()

    async def owners(self) -> Any:
        return [owner._asdict() for owner in await self._store.owners()]

    async def view(self, name: str, **asked: str) -> Any:
        _, work = VIEWS[name]
        return await work(await self._desk(), asked)

    async def live(self) -> AsyncGenerator[Any, None]:
        raise SourceError("live shows what a running proxy does: name it with --url")
        yield

    async def pin(self, conversation: str, text: str) -> Any:
        chat = await self._chat(conversation)
        async with self._alone() as store:
            made = await acts.pin(store, chat, text)
        return {"id": made.id, "text": made.text}

    async def unpin(self, conversation: str, pin: int) -> Any:
        chat = await self._chat(conversation)
        async with self._alone() as store:
            if not await store.unpin(chat.owner, conversation, pin):
                raise NotThere(f"there is no pinned fact {pin} in this conversation")
        return {"unpinned": pin}

    async def correct(self, conversation: str, summary: int, text: str, *, leaf: str) -> Any:
        chat, (counter, _) = await self._chat(conversation, leaf), await self._model()
        old = summary_of(chat, summary)
        async with self._alone() as store:
            new = await acts.correct(store, counter, chat, old, text)
        return {"id": new.id, "instead_of": old.id}

    async def forget_message(self, conversation: str, digest: str) -> Any:
        chat = await self._chat(conversation)
        if not chat.tree.path(digest_in(digest)):
            raise NotThere("there is no such message in this conversation")
        async with self._alone() as store:
            n = await store.forget_message(chat.owner, digest_in(digest))
        return self._forgotten(chat.owner, n)

    async def forget(self, conversation: str) -> Any:
        chat = await self._chat(conversation)
        async with self._alone() as store:
            n = await store.forget_conversation(chat.owner, conversation)
        return self._forgotten(chat.owner, n)

    async def forget_all(self) -> Any:
        owner = await self._whose()
        async with self._alone() as store:
            n = await store.forget_owner(owner)
        return self._forgotten(owner, n)

    async def take_import(self, data: bytes) -> Any:
        owner = await self._whose()
        async with self._alone() as store:
            found = await import_file(store, owner, data)
        return {"conversations": found.conversations, "messages": found.messages}

    async def begin_rewrite(
        self, conversation: str, *, leaf: str, policy: str, newest: int, knobs: dict[str, str]
    ) -> Any:
        raise SourceError(MODEL_NEEDED)

    async def act_on_rewrite(self, conversation: str, rewrite: int, act: str) -> Any:
        raise SourceError(MODEL_NEEDED)

    async def discard_rewrite(self, conversation: str, rewrite: int) -> Any:
        raise SourceError(MODEL_NEEDED)

    async def progress(self, conversation: str, rewrite: int) -> AsyncGenerator[Any, None]:
        raise SourceError(MODEL_NEEDED)
        yield

    def _forgotten(self, owner: str, n: int) -> Any:
        forget_files(self._config.data / "snapshots", owner)
        return {"deleted_messages": n}

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[Store]:
        """Closes the reading store: it would be in the way. Nothing is read behind this."""
        await self._store.close()
        try:
            store = await Store.open_alone(self._config.data / DATABASE)
        except StoreUnavailable as exc:
            raise SourceError(
                f"the database is in use ({exc}): if a proxy runs on it, name that with --url, so "
                "that it learns of the change"
            ) from exc
        try:
            yield store
        finally:
            await store.close()

    async def _whose(self) -> str:
        if self._owner:
            return self._owner
        found = await self._store.owners()
        if len(found) > 1:
            raise SourceError(
                f"there are {len(found)} owners: choose one with --owner "
                "(`chatfold inspect owners` names them)"
            )
        return found[0].key if found else owner_of({})

    async def _desk(self) -> Desk:
        policy = load_policy(self._config.policy)
        return Desk(self._store, await self._whose(), policy, self._model)

    async def _chat(self, conversation: str, leaf: str = "") -> Chat:
        return await (await self._desk()).chat({"conversation": conversation, "leaf": leaf})

    async def _model(self) -> tuple[TokenCounter, ModelInfo]:
        """The configured model's own tokens; the model itself is not loaded."""
        from proxy.tuning.models import vocabulary, window_tokens
        from proxy.tuning.simulation import SimulatedEngine

        known = vocabulary(self._config)
        engine = SimulatedEngine(window_tokens(self._config, known), _silent, _silent, known)
        await engine.start()
        return EngineTokens(engine), await engine.model()


def _silent(context: Context) -> str:
    return ""
