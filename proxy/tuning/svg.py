"""Plots as SVG text: points with names, and bars. Pure; the same figures give the same bytes.

Everything that could be told by colour alone is told by a name beside it too: the page is printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

WIDTH = 640
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 16, 44
LABEL_PX = 8.0
"""Width of a letter of a label; they are set in 12 px."""
LINE_PX = 15
BAR_PX = 16

STYLE = """
svg { font: 12px system-ui, sans-serif; color: #444; }
svg text { fill: currentColor; }
svg .axis { stroke: currentColor; stroke-width: 1; opacity: .5; fill: none; }
svg .grid { stroke: currentColor; stroke-width: 1; opacity: .14; }
svg .best { fill: #2f81f7; stroke: #2f81f7; }
svg .beaten { fill: none; stroke: #858c94; stroke-width: 1.5; }
svg .a { fill: #2f81f7; }
svg .b { fill: #e8a33d; }
svg .name { font-weight: 600; }
@media (prefers-color-scheme: dark) { svg { color: #c9d1d9; } }
@media print { svg { color: #222; } }
"""


@dataclass(frozen=True, slots=True)
class Point:
    name: str
    x: float
    y: float
    best: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """Two parts on one line; `text` stands behind them."""

    name: str
    first: float
    second: float
    text: str


def scatter(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    title: str,
    y_most: float = float("inf"),
    height: int = 360,
) -> str:
    """Points with their names, the best filled. Left and up is better. No y is above `y_most`."""
    if not points:
        return ""
    xs = _ticks([p.x for p in points], least_span=0.1)
    ys = _ticks([p.y for p in points], least_span=0.1)
    ys = [y for y in ys if y <= y_most or y == ys[0]]
    plot = _Plot(xs, ys, height)
    out = [plot.axes(x_label, y_label)]
    for p, (x, y, anchor) in zip(points, plot.labels(points), strict=True):
        kind = "best" if p.best else "beaten"
        out.append(
            f'<circle class="{kind}" cx="{plot.x(p.x):.1f}" cy="{plot.y(p.y):.1f}" r="5"/>'
            f'<text class="name" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
            f"{escape(p.name)}</text>"
        )
    return _svg(out, height, title)


def bars(rows: Sequence[Bar], *, title: str) -> str:
    """A line for each, its parts behind each other."""
    names = max((len(r.name) for r in rows), default=0) * LABEL_PX + 16
    texts = max((len(r.text) for r in rows), default=0) * LABEL_PX + 8
    most = max((r.first + r.second for r in rows), default=0.0) or 1.0
    longest = max(60.0, WIDTH - names - texts - 8)
    out = []
    for i, r in enumerate(rows):
        y = 6 + i * (BAR_PX + 10)
        # The share first: what is divided by next to nothing is infinite.
        a, b = r.first / most * longest, r.second / most * longest
        middle = y + BAR_PX - 4
        out.append(
            f'<text class="name" x="{names - 8:.1f}" y="{middle}" text-anchor="end">'
            f"{escape(r.name)}</text>"
            f'<rect class="a" x="{names:.1f}" y="{y}" width="{a:.1f}" height="{BAR_PX}"/>'
            f'<rect class="b" x="{names + a:.1f}" y="{y}" width="{b:.1f}" height="{BAR_PX}"/>'
            f'<text x="{names + a + b + 6:.1f}" y="{middle}">{escape(r.text)}</text>'
        )
    return _svg(out, 6 + len(rows) * (BAR_PX + 10), title)


def standalone(svg: str) -> str:
    """The same as a file of its own, with its style."""
    head, _, rest = svg.partition(">")
    return f"{head}><style>{STYLE}</style>{rest}\n"


@dataclass(frozen=True, slots=True)
class _Plot:
    xs: Sequence[float]
    ys: Sequence[float]
    height: int

    def x(self, value: float) -> float:
        share = (value - self.xs[0]) / (self.xs[-1] - self.xs[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.ys[0]) / (self.ys[-1] - self.ys[0])
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)

    def axes(self, x_label: str, y_label: str) -> str:
        bottom, right = self.height - BOTTOM, WIDTH - RIGHT
        out = [f'<path class="axis" d="M{LEFT},{TOP} V{bottom} H{right}"/>']
        for x in self.xs:
            out.append(
                f'<text x="{self.x(x):.1f}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>'
            )
        for y in self.ys:
            out.append(
                f'<path class="grid" d="M{LEFT},{self.y(y):.1f} H{right}"/>'
                f'<text x="{LEFT - 8}" y="{self.y(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
            )
        middle = (TOP + bottom) / 2
        out.append(
            f'<text x="{(LEFT + right) / 2}" y="{self.height - 8}" text-anchor="middle">'
            f"{escape(x_label)}</text>"
            f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text>"
        )
        return "".join(out)

    def labels(self, points: Sequence[Point]) -> list[tuple[float, float, str]]:
        """A place for each name where it covers no other: right of its point, or left where the
        plot ends, moved down as far as need be."""
        taken: list[tuple[float, float, float]] = []
        places: dict[int, tuple[float, float, str]] = {}
        for i, p in sorted(enumerate(points), key=lambda pair: -pair[1].y):
            x, y, width = self.x(p.x), self.y(p.y) + 4, len(p.name) * LABEL_PX
            right = x + 10 + width <= WIDTH
            start = x + 10 if right else x - 10 - width
            while any(
                abs(y - ty) < LINE_PX and start < tx + tw and tx < start + width
                for tx, ty, tw in taken
            ):
                y += 2
            taken.append((start, y, width))
            places[i] = (start if right else start + width, y, "start" if right else "end")
        return [places[i] for i in range(len(points))]


def _ticks(values: Sequence[float], *, least_span: float) -> list[float]:
    """Round numbers that hold all values, three to eight of them; 0 is the first where it is
    near."""
    low, high = min(values), max(values)
    span = max(high - low, least_span * max(abs(high), 1e-6), 1e-6)
    low = 0.0 if 0 <= low < span else low - span * 0.1
    high += span * 0.1
    step = 10 ** floor(log10((high - low) / 4))
    step = next(step * k for k in (1, 2, 2.5, 5, 10) if (high - low) / (step * k) <= 6)
    first = floor(low / step)
    ticks = [round((first + i) * step, 10) for i in range(12)]
    last = next(i for i, t in enumerate(ticks) if t >= high)
    return ticks[: max(2, last) + 1]


def _svg(parts: Sequence[str], height: float, title: str) -> str:
    body = "".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
        f"{body}</svg>"
    )
