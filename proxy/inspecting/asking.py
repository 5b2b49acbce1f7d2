"""What every command of `chatfold inspect` shares: its options, where it asks, how it prints."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import click
from rich.console import RenderableType

from memory.context import DoesNotFit
from memory.store import StoreError
from proxy import wire
from proxy.config import Config, load
from proxy.engines.base import EngineError
from proxy.exports import ExportError
from proxy.inspecting.acts import NotDone
from proxy.inspecting.client import ProxySource
from proxy.inspecting.sources import FileSource, Source, SourceError
from proxy.inspecting.terminal import show
from proxy.inspecting.views import BadQuestion, NotThere

WRONG: tuple[type[Exception], ...] = (
    StoreError,
    SourceError,
    NotThere,
    BadQuestion,
    NotDone,
    ExportError,
    EngineError,
    DoesNotFit,
)

Flags = dict[str, Any]
Drawn = RenderableType | Iterable[RenderableType]
Work = Callable[[Source], Awaitable[None]]

_OPTIONS = (
    click.option("--url", default="", help="A running proxy; without it: the database file."),
    click.option("--api-key", help="The proxy's key. [CHATFOLD_API_KEY, or the file's]"),
    click.option("--config", "file", type=click.Path(path_type=Path), help="A TOML file."),
    click.option("--data", help="Directory of the database."),
    click.option("--owner", default="", help="Whose chats, as `owners` prints it. [the only one]"),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
)
LEAF = click.option("--leaf", default="", help="A message's digest: the branch that it lies on.")
YES = click.option("--yes", is_flag=True, help="Do not ask first.")
CHAT = click.argument("conversation")


def options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def view(flags: Flags, name: str, draw: Callable[[Any], Drawn], **asked: str) -> None:
    async def work(source: Source) -> None:
        tell(flags, await source.view(name, **asked), draw)

    run(flags, work)


def act(flags: Flags, act: Callable[[Source], Awaitable[Any]], told: str) -> None:
    async def work(source: Source) -> None:
        tell(flags, await act(source), lambda value: told.format(**value))

    run(flags, work)


def tell(flags: Flags, value: Any, draw: Callable[[Any], Drawn]) -> None:
    """JSON for scripts; else as a person reads it."""
    if flags["as_json"]:
        click.echo(wire.encode(value))
        return
    drawn = draw(value)
    if isinstance(drawn, str):
        click.echo(drawn)
    else:
        show(*([drawn] if hasattr(drawn, "__rich_console__") else drawn))  # type: ignore[misc]


def run(flags: Flags, work: Work) -> None:
    async def whole() -> None:
        async with _source(flags) as source:
            await work(source)

    try:
        asyncio.run(whole())
    except WRONG as exc:
        raise click.ClickException(str(exc)) from exc
    except OSError as exc:
        if isinstance(exc, BrokenPipeError):
            # Whoever read it has had enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        raise click.ClickException(f"{exc.filename}: {exc.strerror}") from exc
    except KeyboardInterrupt:
        raise click.Abort from None


def _source(flags: Flags) -> AbstractAsyncContextManager[Source]:
    given = {"data": flags["data"], "api_key": flags["api_key"]}
    config: Config = load(given, environ=os.environ, file=flags["file"])
    if not flags["url"]:
        return FileSource.open(config, flags["owner"])
    key = next(iter(config.api_keys), "")
    return ProxySource.open(flags["url"], key=key, owner=flags["owner"])
