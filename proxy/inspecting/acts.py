"""What can be changed of a stored chat, wherever it is asked for: on the pages, through the API,
in the terminal. Writes to the store only; warming and forgetting in the model is the caller's.
"""

from __future__ import annotations

import time
from dataclasses import replace

from memory.context import block_text
from memory.ports import TokenCounter
from memory.records import EDITED, Pin, Summary
from memory.store import NotStored, Store
from proxy.pages.chats import Chat

PIN_CHARS = 500
SUMMARY_CHARS = 20_000


class NotDone(ValueError):
    """An act that makes no sense. `str()` is a sentence."""


async def pin(store: Store, chat: Chat, text: str) -> Pin:
    """Raises NotDone."""
    fact = " ".join(text.split())
    if not 0 < len(fact) <= PIN_CHARS:
        raise NotDone(f"A pinned fact has 1 to {PIN_CHARS} characters.")
    try:
        return await store.pin(chat.owner, chat.entry.id, fact)
    except ValueError as exc:
        raise NotDone(f"{str(exc).capitalize()}.") from exc


async def correct(
    store: Store, counter: TokenCounter, chat: Chat, old: Summary, text: str
) -> Summary:
    """A summary of another text for the same span. It is used once its context is warm. Raises
    NotDone, and EngineUnavailable."""
    if chat.state(old) == "past":
        raise NotDone(f"Summary {old.id} is no longer in use.")
    text = text.replace("\r\n", "\n").strip()
    if not 0 < len(text) <= SUMMARY_CHARS:
        raise NotDone(f"A summary has 1 to {SUMMARY_CHARS} characters.")
    (n_tokens,) = await counter.count([block_text(text)])
    new = replace(
        old,
        id=0,
        text=text,
        n_tokens=n_tokens,
        tokenizer=counter.tokenizer,
        made_by=EDITED,
        model="",
        policy_digest="",
        prompt_version="",
        failed_checks=(),
        duration_s=0.0,
        created_at=time.time(),
        activated_at=None,
    )
    try:
        return await store.add_summary(chat.owner, new, shown=[old.id])
    except NotStored as exc:
        raise NotDone(f"Summary {old.id} was forgotten.") from exc
