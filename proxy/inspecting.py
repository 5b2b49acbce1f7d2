"""`chatfold inspect`: what the pages show, in the terminal. Reads the file alone, also beside a
running proxy, and changes nothing.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from memory.records import Summary
from memory.store import Store, StoreError
from proxy import wire
from proxy.config import Config, load
from proxy.doctor import DATABASE
from proxy.pages import exporting
from proxy.pages.chats import Chat, context_now, read_chat, read_turns

ENTRIES = 50
TURNS = 5
BEGINS_CHARS = 60

_OPTIONS = (
    click.option("--config", "file", type=click.Path(path_type=Path), help="A TOML file."),
    click.option("--data", help="Directory of the database."),
    click.option("--owner", default="", help="Whose chats, as `owners` prints it. [the only one]"),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
)


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.group()
def inspect() -> None:
    """See what chatfold made of each chat. Changes nothing; works beside a running proxy."""


@inspect.command()
@_options
def owners(**flags: Any) -> None:
    """Whose conversations there are, who spoke last first."""

    async def work(store: Store) -> None:
        found = await store.owners()
        rows = [(o.key, o.n_conversations, _when(o.updated_at)) for o in found]
        _print(flags, [o._asdict() for o in found], _table(("owner", "chats", "last"), rows))

    _run(flags, work)


@inspect.command("list")
@_options
@click.option("--limit", type=click.IntRange(1, 10000), default=ENTRIES, help="Most. [50]")
def list_(limit: int, **flags: Any) -> None:
    """The conversations, the one that grew last first."""

    async def work(store: Store) -> None:
        found = await store.conversations(await _owner(store, flags), limit=limit)
        rows = [
            (e.id, _when(e.updated_at), e.n_messages, e.n_summaries, _begins(e.begins))
            for e in found
        ]
        names = ("conversation", "last", "messages", "summaries", "begins with")
        _print(flags, [e._asdict() for e in found], _table(names, rows))

    _run(flags, work)


@inspect.command()
@_options
@click.argument("words", nargs=-1, required=True)
@click.option("--limit", type=click.IntRange(1, 1000), default=20, help="Most of each kind. [20]")
def search(words: Sequence[str], limit: int, **flags: Any) -> None:
    """Look for words in turns and summaries."""

    async def work(store: Store) -> None:
        found = await store.find(await _owner(store, flags), " ".join(words), limit=limit)
        hits = [
            {"conversation": c, "message": n.depth, "role": n.role, "text": n.text}
            for c, n in found.messages
        ]
        hits += [
            {"conversation": s.conversation, "summary": s.id, "role": "summary", "text": s.text}
            for s in found.summaries
        ]
        rows = [
            (
                h["conversation"],
                h["role"],
                h.get("message", h.get("summary")),
                _begins(str(h["text"])),
            )
            for h in hits
        ]
        _print(flags, hits, _table(("conversation", "who", "number", "text"), rows))

    _run(flags, work)


@inspect.command()
@_options
@click.argument("conversation")
@click.option("--leaf", default="", help="A message's digest: the branch that it lies on.")
@click.option("--turns", type=click.IntRange(0), default=TURNS, help="Newest turns; 0: all. [5]")
def show(conversation: str, leaf: str, turns: int, **flags: Any) -> None:
    """A conversation: its summaries in use, its branches, its newest turns."""

    async def work(store: Store) -> None:
        chat = await _chat(store, flags, conversation, leaf)
        said = await read_turns(store, chat, chat.turns[-turns:])
        messages = [n for one in said for n in one.nodes]
        value = {
            "conversation": chat.entry._asdict(),
            "leaf": chat.leaf.hex(),
            "turns": len(chat.turns),
            "ends": chat.tree.n_ends,
            "summaries": [_summary(chat, s) for s in chat.summaries],
            "messages": [{"number": n.depth, "role": n.role, "text": n.text} for n in messages],
        }
        lines = [
            f"{len(chat.turns)} turns, {len(chat.path)} messages, {chat.n_tokens:,} tokens, "
            f"{chat.tree.n_ends} branches, {len(chat.summaries)} summaries, "
            f"{len(chat.active)} in use"
        ]
        for s in chat.active:
            lines += ["", f"== {_title(chat, s)}", s.text]
        for n in messages:
            lines += ["", f"-- {n.role} #{n.depth}, {_when(n.created_at)}", n.text]
        _print(flags, value, lines)

    _run(flags, work)


@inspect.command()
@_options
@click.argument("conversation")
@click.option("--leaf", default="", help="A message's digest: the branch that it lies on.")
def context(conversation: str, leaf: str, **flags: Any) -> None:
    """What the model would see before the next message, word for word.

    Counted with the configured model's own tokens; the model itself is not loaded.
    """
    from memory.policy import load_policy
    from proxy.background import EngineTokens
    from proxy.tuning.models import vocabulary, window_tokens
    from proxy.tuning.simulation import SimulatedEngine

    config = _config(flags)

    async def work(store: Store) -> None:
        chat = await _chat(store, flags, conversation, leaf)
        known = vocabulary(config)
        engine = SimulatedEngine(window_tokens(config, known), _silent, _silent, known)
        await engine.start()
        policy = load_policy(config.policy)
        found = await context_now(store, EngineTokens(engine), policy, await engine.model(), chat)
        messages = [{"role": m.role, "text": m.text} for m in found.messages]
        shape = asdict(found.shape)
        lines = ["; ".join(f"{name}={value}" for name, value in shape.items())]
        for m in messages:
            lines += ["", f"-- {m['role']}", m["text"]]
        _print(flags, {"context": messages, "shape": shape}, lines)

    _run(flags, work)


@inspect.command()
@_options
@click.argument("conversation")
@click.option(
    "--as",
    "form",
    type=click.Choice(["markdown", "openai", "librechat"]),
    default="markdown",
    help="[markdown]",
)
@click.option("--leaf", default="", help="A message's digest: the branch that it lies on.")
def export(conversation: str, form: str, leaf: str, **flags: Any) -> None:
    """Print a conversation as a file that others read: LibreChat's form holds every branch."""

    async def work(store: Store) -> None:
        chat = await _chat(store, flags, conversation, leaf)
        if form == "librechat":
            twigs = await store.tree(chat.owner, chat.entry.id)
            nodes = await store.nodes(chat.owner, [t.digest for t in twigs])
            click.echo(wire.encode(exporting.librechat(chat.entry.id, chat.entry.begins, nodes)))
            return
        nodes = await store.nodes(chat.owner, chat.digests)
        if form == "openai":
            click.echo(wire.encode(exporting.openai_messages(nodes)))
        else:
            click.echo(exporting.markdown(chat.entry.begins, nodes, chat.active))

    _run(flags, work)


def _silent(context: object) -> str:
    return ""


def _config(flags: dict[str, Any]) -> Config:
    return load({"data": flags["data"]}, environ=os.environ, file=flags["file"])


def _run(flags: dict[str, Any], work: Callable[[Store], Awaitable[None]]) -> None:
    async def whole() -> None:
        store = await Store.open_read_only(_config(flags).data / DATABASE)
        try:
            await work(store)
        finally:
            await store.close()

    try:
        asyncio.run(whole())
    except StoreError as exc:
        raise click.ClickException(str(exc)) from exc
    except BrokenPipeError:
        # Whoever read it has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


async def _owner(store: Store, flags: dict[str, Any]) -> str:
    if flags["owner"]:
        return str(flags["owner"])
    found = await store.owners()
    if len(found) > 1:
        raise click.ClickException(
            f"there are {len(found)} owners: choose one with --owner "
            "(`chatfold inspect owners` names them)"
        )
    return found[0].key if found else ""


async def _chat(store: Store, flags: dict[str, Any], conversation: str, leaf: str) -> Chat:
    chat = await read_chat(store, await _owner(store, flags), conversation, leaf)
    if chat is None:
        raise click.ClickException(f"there is no conversation {conversation!r} of this owner")
    return chat


def _title(chat: Chat, s: Summary) -> str:
    first, last = chat.turn_at(s.first_depth).number, chat.turn_at(s.last_depth).number
    failed = f", failed: {', '.join(s.failed_checks)}" if s.failed_checks else ""
    return f"summary {s.id}: turns {first} to {last}, rank {s.rank}, {s.made_by}{failed}"


def _summary(chat: Chat, s: Summary) -> dict[str, Any]:
    value = asdict(s) | {"state": chat.state(s)}
    return value | {name: value[name].hex() for name in ("first_digest", "last_digest")}


def _print(flags: dict[str, Any], value: Any, lines: Sequence[str]) -> None:
    """JSON for scripts; else lines, through a pager where somebody sits at a terminal."""
    if flags["as_json"]:
        click.echo(wire.encode(value))
    elif sys.stdout.isatty():
        click.echo_via_pager("\n".join(map(_harmless, lines)) + "\n")
    else:
        click.echo("\n".join(map(_harmless, lines)))


def _table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Columns as wide as their longest cell."""
    cells = [list(names), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _begins(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= BEGINS_CHARS else line[: BEGINS_CHARS - 1] + "…"


def _harmless(text: str) -> str:
    """Control characters in a chat would steer the reader's terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "-"
