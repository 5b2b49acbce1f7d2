"""What there is to see of the stored chats, as plain JSON values: the same for the terminal on the
file alone, for the HTTP API and so for the terminal on a running proxy. Reads only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from memory.policy import Policy
from memory.ports import TokenCounter
from memory.records import Answered, Node, Summary
from memory.rewriting import Rewriter
from memory.store import Store
from proxy.engines.base import ModelInfo
from proxy.pages import exporting
from proxy.pages.changes import changes
from proxy.pages.chats import Chat, context_now, read_chat, read_turns, seen_at
from proxy.pages.trees import Turn

ENTRIES = 50
ENTRIES_MOST = 10_000
HITS = 20
HITS_MOST = 1000
TURNS = 5
BEGINS_CHARS = 200
DIGITS_MOST = 9

FORMS = ("markdown", "openai", "librechat")

Asked = Mapping[str, str]
"""Words of the path and of the query."""


class NotThere(LookupError):
    """What was asked for is not stored, or not this owner's. `str()` is a sentence."""


class BadQuestion(ValueError):
    """A word of the query says nothing. `str()` is a sentence."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What a view is made from. `model` gives the tokens of the model in use; it raises
    EngineUnavailable while that is not loaded. `rewriter` is a running proxy's."""

    store: Store
    owner: str
    policy: Policy
    model: Callable[[], Awaitable[tuple[TokenCounter, ModelInfo]]]
    rewriter: Rewriter | None = None

    async def chat(self, asked: Asked) -> Chat:
        """The conversation that is asked for, on the branch of `leaf`. Raises NotThere."""
        name, leaf = asked["conversation"], asked.get("leaf", "")
        found = await read_chat(self.store, self.owner, name, leaf)
        if found is None:
            branch = f" with the message {leaf!r}" if leaf else ""
            raise NotThere(f"there is no conversation {name!r}{branch} of this owner")
        return found


async def conversations(desk: Desk, asked: Asked) -> Any:
    limit = number(asked, "limit", ENTRIES, most=ENTRIES_MOST)
    offset = number(asked, "offset", 0)
    found = await desk.store.conversations(desk.owner, limit=limit, offset=offset)
    return {
        "total": await desk.store.n_conversations(desk.owner),
        "conversations": [entry._asdict() for entry in found],
    }


async def search(desk: Desk, asked: Asked) -> Any:
    limit = number(asked, "limit", HITS, most=HITS_MOST)
    found = await desk.store.find(desk.owner, asked.get("q", ""), limit=limit)
    return {
        "messages": [{"conversation": c} | message(n) for c, n in found.messages],
        "summaries": [
            {"conversation": s.conversation, "id": s.id, "text": s.text} for s in found.summaries
        ],
    }


async def conversation(desk: Desk, asked: Asked) -> Any:
    """Counts, pinned facts, summaries in use, and the newest turns: `turns` of them, 0 for all."""
    chat = await desk.chat(asked)
    n = number(asked, "turns", TURNS)
    return told(chat) | {
        "pins": [asdict(pin) for pin in await desk.store.pins(desk.owner, chat.entry.id)],
        "summaries": [summary(chat, s) for s in chat.active],
        "messages": await said(desk, chat, chat.turns[-n:]),
    }


async def one_message(desk: Desk, asked: Asked) -> Any:
    chat = await desk.chat(asked)
    at = number(asked, "message", 0)
    if at >= len(chat.path):
        raise NotThere(f"there is no message {at} on this branch")
    (node,) = await desk.store.nodes(desk.owner, [chat.digests[at]])
    return message(node)


async def timeline(desk: Desk, asked: Asked) -> Any:
    """Every turn, and the spans of all summaries that hold here."""
    chat = await desk.chat(asked)
    return told(chat) | {
        "timeline": [
            asdict(turn) | {"state": "told" if turn.last < chat.n_covered else "verbatim"}
            for turn in chat.turns
        ],
        "summaries": [summary(chat, s) for s in chat.summaries],
    }


async def summaries(desk: Desk, asked: Asked) -> Any:
    chat = await desk.chat(asked)
    ordered = sorted(chat.summaries, key=lambda s: (s not in chat.active, -s.last_depth, -s.id))
    return told(chat) | {"summaries": [summary(chat, s) for s in ordered]}


async def one_summary(desk: Desk, asked: Asked) -> Any:
    """With the turns behind it."""
    chat = await desk.chat(asked)
    found = summary_of(chat, number(asked, "summary", 0))
    behind = [t for t in chat.turns if found.first_depth <= t.last and t.first <= found.last_depth]
    return told(chat) | {
        "summary": summary(chat, found),
        "merged_into": [s.id for s in chat.summaries if found.id in s.parents],
        "messages": await said(desk, chat, behind),
    }


async def branches(desk: Desk, asked: Asked) -> Any:
    chat = await desk.chat(asked)
    found = chat.tree.branches()
    nodes = await desk.store.nodes(desk.owner, [b.begins_with for b in found])
    begins = {node.digest: node.text[:BEGINS_CHARS] for node in nodes}
    return told(chat) | {
        "branches": [
            {
                "leaf": b.leaf.hex(),
                "indent": b.indent,
                "turns": b.n_turns,
                "first": b.first_depth,
                "last": b.last_depth,
                "created_at": b.created_at,
                "shown": b.begins_with in chat.digests,
                "is_end": b.is_end,
                "begins": begins.get(b.begins_with, ""),
            }
            for b in found
        ]
    }


async def figures(desk: Desk, asked: Asked) -> Any:
    """What each answer of the branch cost. A turn with several answers tells their sums."""
    chat = await desk.chat(asked)
    known = await desk.store.answers(desk.owner, chat.digests)
    rows = []
    for turn in chat.turns:
        own = [known[d] for d in chat.digests[turn.first : turn.last + 1] if d in known]
        if own:
            rows.append({"turn": turn.number} | _cost(own))
    return told(chat) | {"figures": rows}


def _cost(answers: Sequence[Answered]) -> dict[str, Any]:
    return {
        "evaluated_tokens": sum(a.evaluated_tokens for a in answers),
        "cached_tokens": sum(a.cached_tokens for a in answers),
        "generated_tokens": sum(a.generated_tokens for a in answers),
        "queued_s": round(sum(a.queued_s for a in answers), 4),
        "first_token_s": round(answers[0].first_token_s, 4),
    }


async def context(desk: Desk, asked: Asked) -> Any:
    """What the model would see before the next message, word for word."""
    chat = await desk.chat(asked)
    counter, info = await desk.model()
    found = await context_now(desk.store, counter, desk.policy, info, chat)
    return {
        "context": [{"role": m.role, "text": m.text} for m in found.messages],
        "shape": asdict(found.shape),
        "window_tokens": info.budget.window_tokens,
    }


async def seen(desk: Desk, asked: Asked) -> Any:
    """What the model saw at a turn, and what of it was new and gone since the turn before.
    `exact`: whether it is equal, to the character, to what was sent; None where nothing was
    recorded."""
    chat = await desk.chat(asked)
    at = number(asked, "turn", 0)
    if not 1 <= at <= len(chat.turns):
        raise NotThere(f"there is no turn {at}: this branch has {len(chat.turns)}")
    counter, info = await desk.model()
    now = await seen_at(desk.store, counter, info, chat, chat.turns[at - 1])
    if now is None:
        return {"turn": at, "exact": None, "pieces": []}
    last = chat.turns[at - 2] if at > 1 else None
    before = await seen_at(desk.store, counter, info, chat, last) if last else None
    pieces = changes(before[0] if before else None, now[0])
    return {
        "turn": at,
        "exact": now[1],
        "pieces": [{"change": change, "role": r, "text": text} for change, r, text in pieces],
    }


async def export(desk: Desk, asked: Asked) -> Any:
    """A file's name, and what stands in it: a text, or a value to be written as JSON."""
    chat, form = await desk.chat(asked), asked.get("as", FORMS[0])
    id_, title = chat.entry.id, chat.entry.begins
    if form == "librechat":
        twigs = await desk.store.tree(desk.owner, id_)
        nodes = await desk.store.nodes(desk.owner, [t.digest for t in twigs])
        whole = exporting.librechat(id_, title, nodes)
        return {"name": exporting.file_name(id_, "-librechat.json"), "content": whole}
    nodes = await desk.store.nodes(desk.owner, chat.digests)
    if form == "openai":
        path = exporting.openai_messages(nodes)
        return {"name": exporting.file_name(id_, ".json"), "content": path}
    if form == "markdown":
        text = exporting.markdown(title, nodes, chat.active)
        return {"name": exporting.file_name(id_, ".md"), "content": text}
    raise BadQuestion(f"as must be one of {', '.join(FORMS)}")


def told(chat: Chat) -> dict[str, Any]:
    """What every view of one conversation begins with."""
    return {
        "conversation": chat.entry._asdict(),
        "leaf": chat.leaf.hex(),
        "turns": len(chat.turns),
        "tokens": chat.n_tokens,
        "ends": chat.tree.n_ends,
    }


def summary(chat: Chat, s: Summary) -> dict[str, Any]:
    value = asdict(s) | {
        "state": chat.state(s),
        "first_turn": chat.turn_at(s.first_depth).number,
        "last_turn": chat.turn_at(s.last_depth).number,
    }
    return value | {name: value[name].hex() for name in ("first_digest", "last_digest")}


def summary_of(chat: Chat, id_: int) -> Summary:
    """Raises NotThere."""
    found = chat.summary(id_)
    if found is None:
        raise NotThere(f"there is no summary {id_} on this branch")
    return found


async def said(desk: Desk, chat: Chat, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    found = await read_turns(desk.store, chat, turns)
    return [message(n) | {"turn": one.turn.number} for one in found for n in one.nodes]


def message(node: Node) -> dict[str, Any]:
    return {
        "number": node.depth,
        "role": node.role,
        "text": node.text,
        "tokens": node.n_tokens,
        "created_at": node.created_at,
        "digest": node.digest.hex(),
    }


def number(asked: Asked, name: str, default: int, *, most: int | None = None) -> int:
    """Raises BadQuestion."""
    text = asked.get(name, "") or str(default)
    if not (text.isascii() and text.isdigit() and len(text) <= DIGITS_MOST):
        raise BadQuestion(f"{name} must be a whole number, not {text!r}")
    return int(text) if most is None else min(int(text), most)
