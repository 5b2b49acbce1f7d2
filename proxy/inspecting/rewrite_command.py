"""`chatfold inspect rewrite`: summaries of a chat written again under another policy, compared with
those in use, and put in their place.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import click

from proxy.inspecting import rewrite_pictures as pictures
from proxy.inspecting.asking import CHAT, LEAF, Flags, act, options, run, tell, view
from proxy.inspecting.sources import Source
from proxy.rewrites import KNOBS, NEWEST_DEFAULT, STOPPED

NEWEST_MOST = 10**6
_SET = click.argument("number", type=click.IntRange(1))


@click.group()
def rewrite() -> None:
    """Try a policy: write summaries again under it, compare, use them or discard them.

    The running proxy named with --url does it; the file alone lists and compares.
    """


@rewrite.command()
@options
@CHAT
@click.option("--policy", default="balanced", help="A preset, as `list` names them. [balanced]")
@click.option("--newest", type=click.IntRange(1, NEWEST_MOST), default=NEWEST_DEFAULT)
@click.option("--knob", "knobs", multiple=True, help=f"NAME=VALUE; of {', '.join(KNOBS)}.")
@click.option("--follow", is_flag=True, help="Tell how far it is, to its end.")
@LEAF
def begin(
    conversation: str,
    policy: str,
    newest: int,
    knobs: Sequence[str],
    follow: bool,
    leaf: str,
    **flags: Any,
) -> None:
    """Write the newest summaries in use again, so many of them (3), in the background."""
    values = dict(_knob(knob) for knob in knobs)

    async def work(source: Source) -> None:
        made = await source.begin_rewrite(
            conversation, leaf=leaf, policy=policy, newest=newest, knobs=values
        )
        tell(flags, made, lambda value: "set {id}, {policy}".format(**value))
        if follow:
            await _follow(flags, source, conversation, made["id"])

    run(flags, work)


def _knob(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise click.UsageError(f"--knob must be like summary=200, not {text!r}")
    return name, value


@rewrite.command("list")
@options
@CHAT
@LEAF
def list_(conversation: str, leaf: str, **flags: Any) -> None:
    """The sets written so far, and the policies there are."""
    view(flags, "rewrites", pictures.rewrites, conversation=conversation, leaf=leaf)


@rewrite.command()
@options
@CHAT
@_SET
def compare(conversation: str, number: int, **flags: Any) -> None:
    """A set beside the summaries in whose place it would stand, and what each tells."""
    asked = {"conversation": conversation, "rewrite": str(number)}
    view(flags, "rewrite", pictures.rewrite, **asked)


@rewrite.command()
@options
@CHAT
@_SET
def follow(conversation: str, number: int, **flags: Any) -> None:
    """Tell how far a set is, until it is written or stopped."""
    run(flags, lambda source: _follow(flags, source, conversation, number))


async def _follow(flags: Flags, source: Source, conversation: str, number: int) -> None:
    """Raises ClickException where it stopped before its end."""
    value: dict[str, Any] = {}
    async with aclosing(source.progress(conversation, number)) as states:
        async for value in states:
            tell(flags, value, pictures.progress)
            sys.stdout.flush()
    if not value or value["state"] == STOPPED:
        trouble = value.get("trouble", "")
        raise click.ClickException(f"it stopped before its end{trouble and ': '}{trouble}")


@rewrite.command()
@options
@CHAT
@_SET
def stop(conversation: str, number: int, **flags: Any) -> None:
    """Stop writing. What is written is kept, and `go` goes on from there."""
    _on(flags, conversation, number, "stop")


@rewrite.command()
@options
@CHAT
@_SET
def go(conversation: str, number: int, **flags: Any) -> None:
    """Go on with a set that was stopped, or that a restart interrupted."""
    _on(flags, conversation, number, "go")


@rewrite.command()
@options
@CHAT
@_SET
def use(conversation: str, number: int, **flags: Any) -> None:
    """Put a set in the place of the summaries in use, once the model has read it."""
    _on(flags, conversation, number, "use")


@rewrite.command()
@options
@CHAT
@_SET
def undo(conversation: str, number: int, **flags: Any) -> None:
    """Put back what stood there before a set was used. It can be used again."""
    _on(flags, conversation, number, "undo")


@rewrite.command()
@options
@CHAT
@_SET
def discard(conversation: str, number: int, **flags: Any) -> None:
    """Delete a set, and stop writing it. What was taken into use of it stays."""
    act(flags, lambda s: s.discard_rewrite(conversation, number), "set {discarded} is discarded")


def _on(flags: Flags, conversation: str, number: int, name: str) -> None:
    told = "set {id}, {policy}: {state}"
    act(flags, lambda s: s.act_on_rewrite(conversation, number, name), told)
