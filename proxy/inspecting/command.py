"""`chatfold inspect`: what the pages show and do, in the terminal; on a running proxy, or on the
database file alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live

from memory.store import StoreError
from proxy import wire
from proxy.config import load
from proxy.doctor import DATABASE
from proxy.inspecting import pictures
from proxy.inspecting.asking import CHAT, LEAF, YES, act, options, run, tell, view
from proxy.inspecting.browse import PORT, browse
from proxy.inspecting.rewrite_command import rewrite
from proxy.inspecting.sources import Source, SourceError
from proxy.inspecting.terminal import begins, harmless, show
from proxy.inspecting.views import ENTRIES, FORMS, HITS, TURNS

QUOTE_CHARS = 300


@click.group("inspect", invoke_without_command=True)
@click.option("--datasette", is_flag=True, help="Browse the database with Datasette, read-only.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, help="Its port. [8001]")
@click.option("--config", "file", type=click.Path(path_type=Path), help="With --datasette.")
@click.option("--data", help="With --datasette: directory of the database.")
@click.pass_context
def inspect(
    context: click.Context, datasette: bool, port: int, file: Path | None, data: str | None
) -> None:
    """See what chatfold made of each chat, and change it.

    On the database file alone, also beside a running proxy; with --url on the running proxy, which
    also tells what it is doing. What changes something needs the proxy, or the file for itself.
    """
    if context.invoked_subcommand:
        if datasette or file or data:
            raise click.UsageError("options of a command stand behind it")
        return
    if not datasette:
        raise click.exceptions.NoArgsIsHelpError(context)
    path = load({"data": data}, environ=os.environ, file=file).data / DATABASE
    try:
        browse(path, port=port, tell=click.echo)
    except (SourceError, StoreError) as exc:
        raise click.ClickException(str(exc)) from exc


inspect.add_command(rewrite)


# -- to see --------------------------------------------------------------------------------------


@inspect.command()
@options
def owners(**flags: Any) -> None:
    """Whose conversations there are, who spoke last first."""

    async def work(source: Source) -> None:
        tell(flags, await source.owners(), pictures.owners)

    run(flags, work)


@inspect.command("list")
@options
@click.option("--limit", type=click.IntRange(1, 10000), default=ENTRIES, help="Most. [50]")
@click.option("--offset", type=click.IntRange(0), default=0, help="Leave out so many. [0]")
def list_(limit: int, offset: int, **flags: Any) -> None:
    """The conversations, the one that grew last first."""

    async def work(source: Source) -> None:
        found = await source.view("conversations", limit=str(limit), offset=str(offset))
        if flags["as_json"]:
            click.echo(wire.encode(found["conversations"]))
        else:
            show(*pictures.conversations(found))

    run(flags, work)


@inspect.command()
@options
@click.argument("words", nargs=-1, required=True)
@click.option("--limit", type=click.IntRange(1, 1000), default=HITS, help="Most of each kind. [20]")
def search(words: Sequence[str], limit: int, **flags: Any) -> None:
    """Look for words in turns and summaries."""
    view(flags, "search", pictures.hits, q=" ".join(words), limit=str(limit))


@inspect.command("show")
@options
@CHAT
@LEAF
@click.option("--turns", type=click.IntRange(0), default=TURNS, help="Newest turns; 0: all. [5]")
def show_(conversation: str, leaf: str, turns: int, **flags: Any) -> None:
    """A conversation: pinned facts, summaries in use, its newest turns."""
    asked = {"conversation": conversation, "leaf": leaf, "turns": str(turns)}
    view(flags, "conversation", pictures.conversation, **asked)


@inspect.command()
@options
@CHAT
@LEAF
def timeline(conversation: str, leaf: str, **flags: Any) -> None:
    """A conversation as a picture: turns, and the spans of its summaries."""
    view(flags, "timeline", pictures.timeline, conversation=conversation, leaf=leaf)


@inspect.command()
@options
@CHAT
@LEAF
def summaries(conversation: str, leaf: str, **flags: Any) -> None:
    """All summaries of a conversation, those in use first."""
    view(flags, "summaries", pictures.summaries, conversation=conversation, leaf=leaf)


@inspect.command()
@options
@CHAT
@click.argument("number", type=click.IntRange(0))
@LEAF
def summary(conversation: str, number: int, leaf: str, **flags: Any) -> None:
    """One summary, and the turns behind it, word for word."""
    asked = {"conversation": conversation, "summary": str(number), "leaf": leaf}
    view(flags, "summary", pictures.one_summary, **asked)


@inspect.command()
@options
@CHAT
@LEAF
def branches(conversation: str, leaf: str, **flags: Any) -> None:
    """The tree that edits and regenerated answers grew. Other commands take its --leaf."""
    view(flags, "branches", pictures.branches, conversation=conversation, leaf=leaf)


@inspect.command()
@options
@CHAT
@LEAF
def figures(conversation: str, leaf: str, **flags: Any) -> None:
    """Per turn: tokens evaluated, from the cache and generated; seconds to the first token."""
    view(flags, "figures", pictures.figures, conversation=conversation, leaf=leaf)


@inspect.command()
@options
@CHAT
@LEAF
def context(conversation: str, leaf: str, **flags: Any) -> None:
    """What the model would see before the next message, word for word.

    On the file it is counted with the configured model's own tokens; the model is not loaded.
    """
    view(flags, "context", pictures.context, conversation=conversation, leaf=leaf)


@inspect.command()
@options
@CHAT
@click.argument("turn", type=click.IntRange(1))
@LEAF
def seen(conversation: str, turn: int, leaf: str, **flags: Any) -> None:
    """What the model saw at a turn, and what was new and gone against the turn before."""
    asked = {"conversation": conversation, "turn": str(turn), "leaf": leaf}
    view(flags, "seen", pictures.seen, **asked)


@inspect.command()
@options
@click.option("--follow", is_flag=True, help="Go on until it is interrupted.")
def live(follow: bool, **flags: Any) -> None:
    """What a running proxy is doing: running, waiting, background, cells. Needs --url."""

    async def work(source: Source) -> None:
        states = source.live()
        try:
            if follow and not flags["as_json"] and sys.stdout.isatty():
                with Live(console=Console(), auto_refresh=False) as screen:
                    async for value in states:
                        screen.update(pictures.live(value), refresh=True)
            async for value in states:
                tell(flags, value, pictures.live)
                sys.stdout.flush()
                if not follow:
                    return
        finally:
            await states.aclose()

    run(flags, work)


@inspect.command()
@options
@CHAT
@click.option("--as", "form", type=click.Choice(FORMS), default=FORMS[0], help="[markdown]")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="A file. [stdout]")
@LEAF
def export(conversation: str, form: str, output: Path | None, leaf: str, **flags: Any) -> None:
    """A conversation as a file that others read: LibreChat's form holds every branch."""

    async def work(source: Source) -> None:
        found = await source.view("export", conversation=conversation, leaf=leaf, **{"as": form})
        content = found["content"]
        text = content if isinstance(content, str) else wire.encode(content).decode()
        if output is None:
            click.echo(harmless(text) if sys.stdout.isatty() else text)
        else:
            _write(output, text)

    run(flags, work)


def _write(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")


# -- to change -----------------------------------------------------------------------------------


@inspect.command()
@options
@CHAT
@click.argument("words", nargs=-1, required=True)
def pin(conversation: str, words: Sequence[str], **flags: Any) -> None:
    """Pin a fact: it stands in every context of the conversation."""
    act(flags, lambda s: s.pin(conversation, " ".join(words)), "pinned as {id}")


@inspect.command()
@options
@CHAT
@click.argument("number", type=click.IntRange(1))
def unpin(conversation: str, number: int, **flags: Any) -> None:
    """Take a pinned fact back. `show` tells its number."""
    act(flags, lambda s: s.unpin(conversation, number), "unpinned {unpinned}")


@inspect.command()
@options
@CHAT
@click.argument("number", type=click.IntRange(1))
@click.option("--text", default="", help="The new text. [asked for in your editor]")
@LEAF
def correct(conversation: str, number: int, text: str, leaf: str, **flags: Any) -> None:
    """Give a summary a text of yours. The old one stays in the history."""

    async def work(source: Source) -> None:
        asked = {"conversation": conversation, "summary": str(number), "leaf": leaf}
        old = (await source.view("summary", **asked))["summary"]["text"]
        new = text or click.edit(old)
        if new is None or new.strip() == old.strip():
            raise click.ClickException("nothing was changed")
        done = await source.correct(conversation, number, new, leaf=leaf)
        tell(flags, done, lambda v: f"summary {v['id']} takes the place of {v['instead_of']}")

    run(flags, work)


@inspect.command()
@options
@click.argument("conversation", default="")
@click.option("--message", type=click.IntRange(0), help="Only the message of this number.")
@click.option("--everything", is_flag=True, help="All conversations of the owner.")
@LEAF
@YES
def forget(
    conversation: str,
    message: int | None,
    everything: bool,
    leaf: str,
    yes: bool,
    **flags: Any,
) -> None:
    """Forget a conversation, one message of it, or everything; down to the bytes. Asks first."""
    if everything == bool(conversation):
        raise click.UsageError("name a conversation, or --everything")
    if everything and message is not None:
        raise click.UsageError("--message needs a conversation")

    async def work(source: Source) -> None:
        if everything:
            n = (await source.view("conversations", limit="1"))["total"]
            _ask(f"Forget all {n:,} conversations of this owner?", yes)
            done = await source.forget_all()
        elif message is None:
            entry = (await source.view("conversation", conversation=conversation))["conversation"]
            begin = begins(entry["begins"], chars=QUOTE_CHARS)
            _ask(f"{begin}\nForget this conversation, {entry['n_messages']:,} messages?", yes)
            done = await source.forget(conversation)
        else:
            asked = {"conversation": conversation, "message": str(message), "leaf": leaf}
            node = await source.view("message", **asked)
            _ask(f"{begins(node['text'], chars=QUOTE_CHARS)}\nForget this message?", yes)
            done = await source.forget_message(conversation, node["digest"])
        tell(flags, done, lambda v: f"{v['deleted_messages']:,} messages forgotten")

    run(flags, work)


@inspect.command("import")
@options
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False, exists=True))
def import_(path: Path, **flags: Any) -> None:
    """Take in an export of LibreChat or ChatGPT, or OpenAI messages. Twice changes nothing."""
    told = "{messages:,} messages of {conversations:,} conversations are in memory"
    act(flags, lambda s: s.take_import(path.read_bytes()), told)


def _ask(question: str, yes: bool) -> None:
    """Raises ClickException where the answer is no, or nobody is there to give one."""
    try:
        agreed = yes or click.confirm(harmless(question), err=True)
    except click.Abort:
        agreed = False
    if not agreed:
        raise click.ClickException("nothing was forgotten (--yes does it without asking)")
