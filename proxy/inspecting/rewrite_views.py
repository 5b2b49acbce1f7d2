"""Sets of summaries that were written again under another policy, as plain JSON values: which there
are, how far each is, and one beside what stands in its place. Reads only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from memory.records import Rewrite, Summary
from proxy import rewrites as sets
from proxy.inspecting.views import Asked, Desk, NotThere, number, summary, told
from proxy.pages.chats import Chat, read_chat
from proxy.pages.comparing import Comparison, Row, Side
from proxy.tuning.retention import Share

UNFINISHED = "unfinished"
"""Where no proxy is asked: it may be under way there, or stopped."""
CANDIDATE = "candidate"
UNDER_WAY = (sets.WAITING, sets.RUNNING)


async def rewrites(desk: Desk, asked: Asked) -> Any:
    """And the policies that more can be written under, with what can be changed of each."""
    chat = await desk.chat(asked)
    found = await desk.store.rewrites(desk.owner, chat.entry.id)
    return told(chat) | {
        "policies": [
            {"name": name} | {knob: getattr(policy, knob) for knob in sets.KNOBS}
            for name, policy in sets.policies(desk.policy).items()
        ],
        "rewrites": [outline(desk, one) for one in found],
    }


async def rewrite(desk: Desk, asked: Asked) -> Any:
    """Both sides once it is finished. `compared` is None before that, and where the summaries of
    one side were forgotten."""
    chat, one = await set_of(desk, asked)
    before, found = sets.before_of(chat, one), None
    if one.finished_at is not None and before and one.blocks:
        found = _compared(chat, one, await sets.compared(desk.store, chat, one))
    return told(chat) | {
        "rewrite": outline(desk, one) | progress(desk, one),
        "knobs": dict(sets.other_knobs(desk.policy, one)),
        "compared": found,
    }


async def set_of(desk: Desk, asked: Asked) -> tuple[Chat, Rewrite]:
    """A set, and its conversation on a path that its messages lie on. Raises NotThere."""
    conversation, id_ = asked["conversation"], number(asked, "rewrite", 0)
    one = await desk.store.rewrite(desk.owner, conversation, id_)
    leaf = one.last_digest.hex() if one else ""
    chat = await read_chat(desk.store, desk.owner, conversation, leaf) if one else None
    if one is None or chat is None:
        raise NotThere(f"there is no set {id_} of summaries written again in this conversation")
    return chat, one


def outline(desk: Desk, one: Rewrite) -> dict[str, Any]:
    return {
        "id": one.id,
        "policy": one.policy_name,
        "state": _state(desk, one),
        "first_depth": one.first_depth,
        "last_depth": one.last_depth,
        "instead_of": list(one.before),
        "summaries": len(one.blocks),
        "tokens": sum(s.n_tokens for s in one.blocks),
        "created_at": one.created_at,
        "finished_at": one.finished_at,
        "used_at": one.used_at,
    }


def progress(desk: Desk, one: Rewrite) -> dict[str, Any]:
    """How many of its messages have their block, and why it stopped where that is known."""
    n_messages = one.last_depth + 1 - one.first_depth
    run = desk.rewriter.run(desk.owner, one.id) if desk.rewriter else None
    last = max((s.last_depth for s in one.blocks), default=one.first_depth - 1)
    return {
        "state": _state(desk, one),
        "done": run.done if run else last + 1 - one.first_depth,
        "of": n_messages,
        "trouble": desk.rewriter.trouble(desk.owner, one.id) if desk.rewriter else "",
    }


def _state(desk: Desk, one: Rewrite) -> str:
    if desk.rewriter:
        return sets.state_of(desk.rewriter, desk.owner, one)
    if one.used_at is not None:
        return sets.USED
    return sets.DONE if one.finished_at is not None else UNFINISHED


def _compared(chat: Chat, one: Rewrite, found: Comparison) -> dict[str, Any]:
    return {
        "before": _side(found.left),
        "again": _side(found.right),
        "kinds": list(found.kinds),
        "rows": [_row(chat, row) for row in found.rows],
    }


def _side(side: Side) -> dict[str, Any]:
    return asdict(side) | {"kept_in_all": asdict(side.share)}


def _row(chat: Chat, row: Row) -> dict[str, Any]:
    return {
        "first_depth": row.first,
        "last_depth": row.last,
        "first_turn": chat.turn_at(row.first).number,
        "last_turn": chat.turn_at(row.last).number,
        "before": _half(chat, row.left, row.left_total, row.only_left),
        "again": _half(chat, row.right, row.right_total, row.only_right, state=CANDIDATE),
        "in_neither": row.n_neither,
    }


def _half(
    chat: Chat, found: Sequence[Summary], kept: Share, only: Sequence[str], *, state: str = ""
) -> dict[str, Any]:
    values = [summary(chat, s) for s in found]
    return {
        "summaries": [v | {"state": state or v["state"]} for v in values],
        "kept": asdict(kept),
        "only_here": list(only),
    }
