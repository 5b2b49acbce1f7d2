"""Views as a person reads them: tables and texts, through a pager where somebody sits at a
terminal. In a pipe there are no colours, no pager, and no line is cut or wrapped.
"""

from __future__ import annotations

import io
import shutil
import sys
import time
from collections.abc import Sequence

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

PIPE_COLUMNS = 100_000
BEGINS_CHARS = 60

Cell = object
"""A Text, or what `str` makes of anything else."""


def show(*parts: RenderableType) -> None:
    """Prints; what is longer than the terminal is paged."""
    if not sys.stdout.isatty():
        click.echo("\n".join(map(str.rstrip, _written(parts, PIPE_COLUMNS).splitlines())))
        return
    size = shutil.get_terminal_size()
    text = _written(parts, size.columns, styled=True)
    if text.count("\n") < size.lines:
        click.echo(text, nl=False, color=True)
    else:
        click.echo_via_pager(text, color=True)


def _written(parts: Sequence[RenderableType], columns: int, *, styled: bool = False) -> str:
    file = io.StringIO()
    console = Console(
        file=file,
        width=columns,
        force_terminal=styled,
        no_color=None if styled else True,
        highlight=False,
        markup=False,
        emoji=False,
    )
    for part in parts:
        console.print(part)
    return file.getvalue()


def table(names: Sequence[str], rows: Sequence[Sequence[Cell]], *, right: str = "") -> Table:
    """`right` names the columns of numbers, with spaces between."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in names:
        justify = "right" if name in right.split() else "left"
        made.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        made.add_row(*[cell if isinstance(cell, Text) else text(cell) for cell in row])
    return made


def text(value: object, style: str = "") -> Text:
    return Text(harmless("" if value is None else str(value)), style=style)


def said(heading: str, body: str, style: str = "bold") -> Group:
    """A heading and what stands below it, word for word."""
    return Group(text(heading, style), text(body), "")


def begins(body: str, *, chars: int = BEGINS_CHARS) -> str:
    line = " ".join(body.split())
    return line if len(line) <= chars else line[: chars - 1] + "…"


def harmless(body: str) -> str:
    """Control characters in a chat would steer the reader's terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in body)


def when(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "-"


def thousands(value: float | None) -> str:
    return "-" if value is None else f"{value:,}"
