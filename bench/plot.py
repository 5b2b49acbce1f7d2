"""The picture: evaluated tokens and time to the first token, turn by turn, both systems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.chats import Turn

# Readable on white and on GitHub's dark grey: mid tones on a transparent ground.
OURS, THEIRS, PLAIN = "#2f81f7", "#e8710a", "#858c94"
STYLE: Any = {
    "svg.hashsalt": "chatfold",
    "font.size": 10,
    "text.color": PLAIN,
    "axes.edgecolor": PLAIN,
    "axes.labelcolor": PLAIN,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": PLAIN,
    "ytick.color": PLAIN,
    "grid.color": PLAIN,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def draw(path: Path, ours: Sequence[Turn], theirs: Sequence[Turn], *, window_tokens: int) -> None:
    """Writes an SVG. The same turns give the same bytes."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 6), layout="constrained")
        evaluated, first = figure.subplots(2, 1, sharex=True)
        _evaluated(evaluated, ours, theirs)
        _first_content(first, ours, theirs)
        for axes in (evaluated, first):
            _overflow(axes, theirs)
            axes.grid(axis="y")
            axes.set_xlim(0, len(ours) + 1)
        _legend(figure, evaluated, window_tokens)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def _evaluated(axes: Axes, ours: Sequence[Turn], theirs: Sequence[Turn]) -> None:
    new = [(t.number, t.new_tokens) for t in ours]
    axes.bar(*_xy(new), color=PLAIN, alpha=0.35, width=0.8, label="tokens of the new message")
    _line(axes, [(t.number, t.evaluated) for t in theirs], THEIRS, "llama_cpp.server bare")
    _line(axes, [(t.number, t.evaluated) for t in ours], OURS, "chatfold")
    axes.set_ylabel("prompt tokens evaluated")
    axes.set_ylim(bottom=0)


def _first_content(axes: Axes, ours: Sequence[Turn], theirs: Sequence[Turn]) -> None:
    for turns, colour in ((theirs, THEIRS), (ours, OURS)):
        _line(axes, [(t.number, t.answer.first_content_s) for t in turns], colour, None)
    axes.set_ylabel("time to first token, s")
    axes.set_xlabel("turn")
    axes.set_ylim(bottom=0)


def _line(axes: Axes, points: Sequence[tuple[int, Any]], colour: str, label: str | None) -> None:
    known = [(x, y) for x, y in points if y is not None]
    axes.plot(*_xy(known), color=colour, label=label, linewidth=1.5, marker="o", markersize=2.5)


def _overflow(axes: Axes, theirs: Sequence[Turn]) -> None:
    """A cross at the foot for each turn that the bare server did not answer."""
    failed = [t.number for t in theirs if not t.answer.ok]
    if failed:
        axes.axvline(failed[0], color=THEIRS, linestyle="--", linewidth=1)
        axes.plot(failed, [0] * len(failed), "x", color=THEIRS, markersize=5, clip_on=False)


def _legend(figure: Figure, axes: Axes, window_tokens: int) -> None:
    axes.plot([], [], "x--", color=THEIRS, label=f"no answer: over the window of {window_tokens}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)


def _xy(points: Sequence[tuple[int, Any]]) -> tuple[list[int], list[Any]]:
    return [x for x, _ in points], [y for _, y in points]
