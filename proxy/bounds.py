"""How long an engine's answer may keep its reader waiting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from proxy.config import TimeoutsConfig
from proxy.engines.base import EngineUnavailable, Event, Waiting


async def within_bounds(
    events: AsyncIterator[Event], timeouts: TimeoutsConfig
) -> AsyncIterator[Event]:
    """The same events, but for those that tell of a wait: an answer that waits again has the time
    that it had for its first token. Raises EngineUnavailable when an event does not come in its
    time.
    """
    first_s = limit_s = timeouts.queue_s + timeouts.first_token_s
    while True:
        try:
            async with asyncio.timeout(limit_s):
                event = await anext(events)
        except StopAsyncIteration:
            return
        except TimeoutError as exc:
            sentence = f"The model gave no token for {limit_s:g} seconds."
            raise EngineUnavailable(sentence) from exc
        if isinstance(event, Waiting):
            limit_s = first_s
        else:
            yield event
            limit_s = timeouts.between_tokens_s
