"""The table for the terminal and the page for the browser, from the same rows. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from proxy.tuning.measures import Row, best
from proxy.tuning.retention import KINDS
from proxy.tuning.speeds import Speeds
from proxy.tuning.svg import STYLE, Bar, Point, bars, scatter

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Report:
    """One run's outcome. `depth` is "planning" or "model"; `speeds_from` says where the speeds come
    from."""

    rows: tuple[Row, ...]
    chats: tuple[tuple[str, int], ...]
    """Name and turns of each."""
    window_tokens: int
    model: str
    depth: str
    speeds: Speeds
    speeds_from: str
    pause_s: float
    suggestion: tuple[str, ...] = ()

    @property
    def best(self) -> frozenset[str]:
        return best(self.rows)


COLUMNS = (
    ("policy", "* marks those that no other beats in first token, work after answers and kept"),
    ("first p50", "seconds to the first token, median of the turns"),
    ("p95", "the same, exceeded in one turn of twenty"),
    ("worst", "the same, the longest wait of all"),
    ("eval/turn", "tokens evaluated while the user waits, mean"),
    ("p95", "the same, exceeded in one turn of twenty"),
    ("behind", "tokens evaluated after an answer, mean"),
    ("prompt", "tokens of the prompt, mean"),
    ("after s", "seconds of work after an answer, mean"),
    ("busy", "share of the pauses after answers in which the machine works"),
    ("sums", "summaries written"),
    ("kept", "share of names, numbers, dates, identifiers and instructions that can be read"),
    ("reach", "share of questions whose evidence or answer can be read (LoCoMo)"),
)


def cells(row: Row, marked: frozenset[str]) -> tuple[str, ...]:
    return (
        row.policy + (" *" if row.policy in marked else ""),
        f"{row.first_token_p50_s:.2f}",
        f"{row.first_token_p95_s:.2f}",
        f"{row.first_token_worst_s:.2f}",
        f"{row.evaluated_mean:.0f}",
        f"{row.evaluated_p95}",
        f"{row.background_mean:.0f}",
        f"{row.prompt_mean:,.0f}",
        f"{row.background_s:.1f}",
        f"{row.busy:.0%}",
        f"{row.summaries}",
        _percent(row.retention),
        _percent(row.reach.value if row.reach else None),
    )


def table(report: Report) -> str:
    """Lines of equal columns, numbers to the right."""
    head = tuple(name for name, _ in COLUMNS)
    lines = [head, *(cells(row, report.best) for row in report.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def headline(report: Report) -> str:
    turns = sum(n for _, n in report.chats)
    chats = f"{len(report.chats)} chat{'s' if len(report.chats) > 1 else ''}"
    how = "replayed with the model" if report.depth == "model" else "planned without the model"
    return (
        f"{chats}, {turns:,} turns, {how} in a window of {report.window_tokens:,} tokens "
        f"({report.model}); times from {report.speeds_from}, pauses of {report.pause_s:g} s"
    )


def page(report: Report) -> str:
    """One HTML file that needs nothing else, on a screen, on a phone, on paper."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("tune.html.j2").render(
        report=report,
        headline=headline(report),
        columns=COLUMNS,
        lines=[cells(row, report.best) for row in report.rows],
        style=STYLE,
        pareto=pareto(report),
        rest=at_rest(report),
        work=_work(report),
        kinds=[(kind, _by_kind(report, kind)) for kind in KINDS],
        has_reach=any(row.reach for row in report.rows),
        reach=_reach(report),
    )


def pareto(report: Report) -> str:
    """What the user waits for against what is kept."""
    return _against(
        report,
        [row.first_token_mean_s for row in report.rows],
        "seconds to the first token, mean",
        "Speed against retention",
    )


def at_rest(report: Report) -> str:
    """What the machine does behind the user's back against what is kept."""
    return _against(
        report,
        [row.background_s for row in report.rows],
        "seconds of work after an answer, mean",
        "Rest against retention",
    )


def _against(report: Report, xs: Sequence[float], x_label: str, title: str) -> str:
    points = [
        Point(row.policy, x, round(100 * (row.retention or 0), 1), row.policy in report.best)
        for row, x in zip(report.rows, xs, strict=True)
    ]
    y_label = "facts still in the context, %"
    return scatter(points, x_label=x_label, y_label=y_label, title=title, y_most=100)


def _work(report: Report) -> str:
    found = [
        Bar(
            row.policy,
            row.evaluated_mean,
            row.background_mean,
            f"{row.evaluated_mean:.0f} + {row.background_mean:.0f}",
        )
        for row in report.rows
    ]
    return bars(found, title="Tokens evaluated in a turn: while the user waits, and behind it")


def _by_kind(report: Report, kind: str) -> str:
    shares = [(row.policy, row.kept[kind]) for row in report.rows]
    if not any(share.of for _, share in shares):
        return ""
    found = [
        Bar(name, share.value or 0.0, 0.0, f"{_percent(share.value)} of {share.of:,}")
        for name, share in shares
    ]
    return bars(found, title=f"Share of the {kind} that can still be read")


def _reach(report: Report) -> str:
    found = [
        Bar(
            row.policy,
            row.reach.verbatim,
            row.reach.covered,
            f"{row.reach.verbatim} + {row.reach.covered} of {row.reach.of}",
        )
        for row in report.rows
        if row.reach
    ]
    return bars(found, title="Questions whose evidence, or whose answer's words, can be read")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
