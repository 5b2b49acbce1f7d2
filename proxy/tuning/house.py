"""Store, keeper and chat path around any engine, as the proxy wires them, without HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from memory.context import Context
from memory.conversations import History
from memory.keeper import Keeper
from memory.policy import Policy
from memory.scribe import Redraft, as_written
from memory.store import Store
from memory.transcript import Message, Transcript
from proxy.background import BackgroundModel, EngineTokens
from proxy.chat import Chats, Plan
from proxy.config import TimeoutsConfig
from proxy.engines.base import Delta, Engine, Sampling
from proxy.metrics import Metrics
from proxy.running import Running
from proxy.wire import ChatRequest

E = TypeVar("E", bound=Engine)


@dataclass(slots=True, eq=False)
class House(Generic[E]):
    """Store, keeper and chat path around an engine, as the proxy wires them. Not the engine's
    owner: whoever made it stops it."""

    engine: E
    store: Store
    keeper: Keeper
    chats: Chats
    events: list[tuple[str, dict[str, object]]]

    @classmethod
    async def open(
        cls, path: Path, engine: E, policy: Policy, *, redraft: Redraft = as_written
    ) -> House[E]:
        """`path` is the store's file, made where there is none. Starts the engine."""
        await engine.start()
        await engine.model()
        metrics, counter = Metrics(), EngineTokens(engine)
        background = BackgroundModel(engine, metrics)
        store = await Store.open(path)
        events: list[tuple[str, dict[str, object]]] = []
        keeper = Keeper(
            store=store,
            completer=background,
            warmer=background,
            counter=counter,
            policy=policy,
            host=counter.host,
            observe=lambda event, /, **fields: events.append((event, fields)),
            redraft=redraft,
        )
        chats = Chats(
            running=Running(),
            engine=engine,
            store=store,
            keeper=keeper,
            counter=counter,
            policy=policy,
            metrics=metrics,
            timeouts=TimeoutsConfig(),
        )
        keeper.start()
        return cls(engine, store, keeper, chats, events)

    async def close(self) -> None:
        await self.keeper.stop()
        await self.store.close()

    async def idle(self) -> None:
        """Until the keeper has nothing left to do."""
        await self.keeper.idle()

    async def ask(
        self,
        owner: str,
        messages: Sequence[Message],
        *,
        system: str = "",
        max_tokens: int | None = None,
        client_id: str | None = None,
    ) -> tuple[str, Plan]:
        """One chat request as the proxy would serve it: the answer and the plan it was made
        from.
        """
        transcript = Transcript(system, tuple(messages))
        request = ChatRequest("any", transcript, Sampling(), max_tokens=max_tokens)
        plan = await self.chats.plan(request, owner, client_id=client_id)
        text = [e.text async for e in self.chats.run(plan) if isinstance(e, Delta)]
        return "".join(text), plan


def verbatim(context: Context) -> list[tuple[str, str]]:
    """The (role, last part) of every message but the system's: what stands word for word."""
    return [(m.role, m.parts[-1]) for m in context.messages if m.role != "system"]


def length(history: History) -> int:
    """How many messages the history has, sent or re-attached."""
    return len(history.digests)
