"""Summaries written again under another policy: which policies there are, and the acts, for the
pages and the API alike."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from memory.keeper import Job
from memory.policy import Policy, load_policy, presets_folder
from memory.records import Rewrite, Summary
from memory.rewriting import Rewriter, RewriterBusy, planned, stored_policy
from memory.store import Store
from proxy.errors import ApiError, bad_request
from proxy.pages.chats import Chat, front_of
from proxy.pages.comparing import Comparison, compare

KNOBS = ("summary", "block", "summaries", "method", "ask_on", "merge_from", "language", "prompt")
"""What shapes a summary's text or span. The other knobs say when a compaction begins."""
KNOB_CHARS = 4000
NEWEST_DEFAULT = 3
"""Summaries in use that are written again where nobody says how many: minutes, not hours."""

WAITING, RUNNING, STOPPED, DONE, USED = "waiting", "running", "stopped", "done", "used"


def policies(configured: Policy) -> dict[str, Policy]:
    """The one in use, then the presets that make summaries, by name."""
    names = sorted(path.stem for path in presets_folder().glob("*.toml"))
    found = {configured.name: configured} | {
        name: load_policy(name) for name in names if name != configured.name
    }
    return {name: policy for name, policy in found.items() if policy.compact}


def policy_of(configured: Policy, name: str, knobs: Mapping[str, Any]) -> Policy:
    """A policy by its name in `policies`, with other values for some KNOBS; what is empty stays.
    Numbers may come as text. Raises ApiError."""
    chosen = policies(configured).get(name)
    if chosen is None:
        raise bad_request(f"There is no policy {name[:40]!r} that makes summaries.")
    types = {f.name: str(f.type) for f in fields(Policy)}
    changed = {}
    for knob, value in knobs.items():
        if knob not in KNOBS:
            raise bad_request(f"{knob[:40]!r} cannot be chosen here: {', '.join(KNOBS)} can.")
        if isinstance(value, str) and len(value) > KNOB_CHARS:
            raise bad_request(f"{knob} has more than {KNOB_CHARS} characters.")
        if value not in ("", None):
            changed[knob] = _number(value) if types[knob] == "float" else value
    try:
        policy = replace(chosen, **changed)
    except (ValueError, TypeError) as exc:
        raise bad_request(f"This policy cannot be used: {exc}") from exc
    name = policy.name if policy.digest == chosen.digest else f"{policy.name}*"
    return replace(policy, name=name)


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


async def job_of(store: Store, chat: Chat, default_system: str) -> Job:
    system = await front_of(store, chat, default_system)
    return Job(chat.owner, chat.entry.id, chat.digests, system)


async def begin(state: Any, chat: Chat, policy: Policy, *, newest: int) -> Rewrite:
    """Writes the `newest` summaries in use again, in the background. Raises ApiError, StoreError
    and EngineUnavailable."""
    rewriter: Rewriter = state.rewriter
    info = await state.engine.model()
    job = await job_of(state.store, chat, info.default_system)
    try:
        rewriter.require_room(chat.owner)
        plan = planned(job, policy, chat.active, newest=newest, now=time.time())
        stored: Rewrite = await state.store.begin_rewrite(chat.owner, plan)
        rewriter.begin(job, stored, policy)
    except RewriterBusy as exc:
        raise ApiError(409, _sentence(exc), code="busy") from exc
    except ValueError as exc:
        raise bad_request(_sentence(exc)) from exc
    return stored


async def go_on(state: Any, chat: Chat, rewrite: Rewrite) -> None:
    """With a set that was interrupted. `chat` is on a path that the set's messages lie on."""
    info = await state.engine.model()
    job = await job_of(state.store, chat, info.default_system)
    if rewrite.finished_at is not None or state.rewriter.run(chat.owner, rewrite.id):
        return
    try:
        state.rewriter.begin(job, rewrite, stored_policy(rewrite))
    except RewriterBusy as exc:
        raise ApiError(409, _sentence(exc), code="busy") from exc
    except ValueError as exc:
        raise bad_request(_sentence(exc)) from exc


async def use(state: Any, chat: Chat, rewrite: Rewrite) -> None:
    """The candidates take the place of what stands there, once their context is warm. Raises
    ApiError and StoreError."""
    await _put(state, chat, state.store.use_rewrite(chat.owner, chat.entry.id, rewrite.id))


async def undo(state: Any, chat: Chat, rewrite: Rewrite) -> None:
    """What stood there before the set was used takes its place again. Raises as `use`."""
    await _put(state, chat, state.store.undo_rewrite(chat.owner, chat.entry.id, rewrite.id))


async def _put(state: Any, chat: Chat, placing: Awaitable[None]) -> None:
    try:
        await placing
    except ValueError as exc:
        raise ApiError(409, _sentence(exc), code="conflict") from exc
    info = state.engine.info
    state.keeper.wake(await job_of(state.store, chat, info.default_system if info else ""))


async def discard(state: Any, owner: str, conversation: str, id_: int) -> bool:
    """Also stops the writing."""
    state.rewriter.cancel(owner, id_)
    found: bool = await state.store.discard_rewrite(owner, conversation, id_)
    return found


def state_of(rewriter: Rewriter, owner: str, rewrite: Rewrite) -> str:
    run = rewriter.run(owner, rewrite.id)
    if run:
        return RUNNING if run.at_work else WAITING
    if rewrite.used_at is not None:
        return USED
    return DONE if rewrite.finished_at is not None else STOPPED


def before_of(chat: Chat, rewrite: Rewrite) -> list[Summary]:
    """The summaries that stood there when it began; those that a forgotten message took along are
    missing."""
    return [s for s in chat.summaries if s.id in rewrite.before]


def other_knobs(configured: Policy, rewrite: Rewrite) -> list[tuple[str, Any]]:
    """Those of KNOBS in which the set's policy differs from the configured one."""
    try:
        policy = stored_policy(rewrite)
    except ValueError:
        return []
    values = [(knob, getattr(policy, knob)) for knob in KNOBS]
    return [(knob, value) for knob, value in values if value != getattr(configured, knob)]


async def compared(store: Store, chat: Chat, rewrite: Rewrite) -> Comparison:
    """Raises StoreError."""
    digests = chat.digests[rewrite.first_depth : rewrite.last_depth + 1]
    nodes = await store.nodes(chat.owner, digests)
    before = before_of(chat, rewrite)
    made = _with_parents(before, chat.summaries)
    return await asyncio.to_thread(
        compare, before, rewrite.blocks, nodes, all_left=made, all_right=rewrite.candidates
    )


def _with_parents(blocks: Sequence[Summary], known: Sequence[Summary]) -> list[Summary]:
    by_id, found, due = {s.id: s for s in known}, {}, list(blocks)
    while due:
        s = due.pop()
        found[s.id] = s
        due += [by_id[p] for p in s.parents if p in by_id and p not in found]
    return list(found.values())


def _sentence(exc: Exception) -> str:
    text = str(exc)
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
