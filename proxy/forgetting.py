"""What an owner forgets leaves the store, the model, and the work that is under way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.datastructures import State


async def forgotten(state: State, owner: str, delete: Callable[[], Awaitable[int]]) -> int:
    """What `delete` gives: how much left the store. No summary is written of this owner's chats
    meanwhile. What the model's cache and its snapshots hold of the owner goes in any case, also
    where `delete` raises because bytes may remain in the store's file.
    """
    async with state.keeper.away_from(owner):
        state.rewriter.cancel(owner)
        try:
            return await delete()
        finally:
            await forget_in_memory(state, owner)


async def forget_in_memory(state: State, owner: str) -> None:
    """What is held of this owner's chats outside the store. It is the same for all of them."""
    state.running.forget(owner)
    await state.engine.forget(owner)
