"""Views as tables and pictures for a terminal. Pure: JSON value in, what rich prints out.

The timeline, a column a turn (or several, where there are more turns than columns):

    rank 1 ██████████
    rank 0 █████░░░░░█████      in use; ░ merged or replaced; ▒ not warm yet
    turns  ▂▃▅▂▁▃▂▂▄▂▃▂▅▁▃▂▂    as high as they have tokens; dim: told by a summary
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from proxy.inspecting.terminal import begins, said, table, text, thousands, when

COLUMNS_MOST = 72
BARS = "▁▂▃▄▅▆▇█"
SPANS = {"active": ("█", "green"), "waiting": ("▒", "yellow"), "past": ("░", "dim")}
BAR_COLUMNS = 24
CHANGES = {"same": ("dim", ""), "new": ("bold green", "+ "), "gone": ("bold red", "- ")}

Value = Mapping[str, Any]


def owners(value: Sequence[Value]) -> RenderableType:
    rows = [(o["key"], o["n_conversations"], when(o["updated_at"])) for o in value]
    return table(("owner", "chats", "last"), rows, right="chats")


def conversations(value: Value) -> Iterator[RenderableType]:
    rows = [
        (
            e["id"],
            when(e["updated_at"]),
            e["n_messages"],
            e["n_summaries"],
            begins(e["begins"]),
        )
        for e in value["conversations"]
    ]
    names = ("conversation", "last", "messages", "summaries", "begins with")
    yield table(names, rows, right="messages summaries")
    if (left := value["total"] - len(rows)) > 0:
        yield text(f"{left:,} more: --limit, --offset", "dim")


def hits(value: Value) -> RenderableType:
    rows = [
        (h["conversation"], h["role"], h["number"], begins(h["text"])) for h in value["messages"]
    ]
    rows += [(h["conversation"], "summary", h["id"], begins(h["text"])) for h in value["summaries"]]
    return table(("conversation", "who", "number", "text"), rows, right="number")


def conversation(value: Value) -> Iterator[RenderableType]:
    yield heading(value)
    for pin in value["pins"]:
        yield said(f"pinned {pin['id']}", pin["text"], "bold magenta")
    for s in value["summaries"]:
        yield said(titled(s), s["text"], "bold green")
    yield from messages(value["messages"])


def heading(value: Value) -> Text:
    entry = value["conversation"]
    counts = (
        f"{value['turns']:,} turns, {value['tokens']:,} tokens, "
        f"{value['ends']:,} branches, {entry['n_summaries']:,} summaries"
    )
    return text(f"{entry['id']}: {counts}, last {when(entry['updated_at'])}\n", "bold")


def messages(found: Sequence[Value]) -> Iterator[RenderableType]:
    for m in found:
        yield said(
            f"{m['role']} #{m['number']}, turn {m['turn']}, {when(m['created_at'])}",
            m["text"],
            "bold cyan" if m["role"] == "user" else "bold",
        )


def titled(s: Value) -> str:
    failed = f", failed: {', '.join(s['failed_checks'])}" if s["failed_checks"] else ""
    state = {"active": "in use", "waiting": "not warm yet", "past": "merged or replaced"}
    turns = f"turns {s['first_turn']} to {s['last_turn']}"
    return f"summary {s['id']}, {turns}, rank {s['rank']}, {s['made_by']}, " + (
        f"{state[s['state']]}{failed}"
    )


def timeline(value: Value) -> Iterator[RenderableType]:
    yield heading(value)
    yield picture(value["timeline"], value["summaries"])
    yield summaries(value)


def summaries(value: Value) -> RenderableType:
    rows = [
        (
            s["id"],
            f"{s['first_turn']}-{s['last_turn']}",
            s["rank"],
            text(s["state"], SPANS[s["state"]][1]),
            s["made_by"],
            s["n_tokens"],
            f"{s['duration_s']:.1f}",
            ", ".join(s["failed_checks"]),
            begins(s["text"]),
        )
        for s in value["summaries"]
    ]
    names = ("id", "turns", "rank", "state", "by", "tokens", "seconds", "failed", "begins with")
    return table(names, rows, right="id rank tokens seconds")


def picture(turns: Sequence[Value], found: Sequence[Value]) -> Text:
    size = max(1, -(-len(turns) // COLUMNS_MOST))
    columns = [turns[i : i + size] for i in range(0, len(turns), size)]
    out = Text()
    for rank in sorted({s["rank"] for s in found}, reverse=True):
        out.append(f"rank {rank:<3}")
        for column in columns:
            out.append(*_span([s for s in found if s["rank"] == rank], column))
        out.append("\n")
    most = max((sum(t["n_tokens"] for t in column) for column in columns), default=1) or 1
    out.append("turns   ")
    for column in columns:
        height = sum(t["n_tokens"] for t in column) * (len(BARS) - 1) // most
        style = "dim" if column[-1]["state"] == "told" else "bold cyan"
        out.append(BARS[height], style=style)
    out.append(f"  {size} a column\n" if size > 1 else "\n")
    return out


def _span(found: Sequence[Value], column: Sequence[Value]) -> tuple[str, str]:
    first, last = column[0]["number"], column[-1]["number"]
    states = [s["state"] for s in found if s["first_turn"] <= last and first <= s["last_turn"]]
    state = next((state for state in SPANS if state in states), None)
    return SPANS[state] if state else (" ", "")


def one_summary(value: Value) -> Iterator[RenderableType]:
    s = value["summary"]
    yield said(titled(s), s["text"], "bold green")
    made = f"{s['n_tokens']:,} tokens, {s['duration_s']:.1f} s, {when(s['created_at'])}"
    parents = f"; made from {', '.join(map(str, s['parents']))}" if s["parents"] else ""
    into = value["merged_into"]
    merged = f"; merged into {', '.join(map(str, into))}" if into else ""
    yield text(f"{made}{parents}{merged}\n", "dim")
    yield from messages(value["messages"])


def branches(value: Value) -> Iterator[RenderableType]:
    yield heading(value)
    rows = [
        (
            b["leaf"],
            text("*" if b["shown"] else "", "bold green"),
            b["turns"],
            f"{b['first']}-{b['last']}",
            when(b["created_at"]),
            "  " * b["indent"] + begins(b["begins"]),
        )
        for b in value["branches"]
    ]
    yield table(("--leaf", "", "turns", "messages", "last", "begins with"), rows, right="turns")


def figures(value: Value) -> Iterator[RenderableType]:
    yield heading(value)
    found = value["figures"]
    most = max((f["evaluated_tokens"] for f in found), default=1) or 1
    rows = [
        (
            f["turn"],
            thousands(f["evaluated_tokens"]),
            thousands(f["cached_tokens"]),
            thousands(f["generated_tokens"]),
            f"{f['queued_s']:.2f}",
            f"{f['first_token_s']:.2f}",
            text("█" * (f["evaluated_tokens"] * BAR_COLUMNS // most), "cyan"),
        )
        for f in found
    ]
    names = ("turn", "evaluated", "cached", "generated", "queued_s", "first_token_s", "")
    yield table(names, rows, right=" ".join(names[:-1]))


def context(value: Value) -> Iterator[RenderableType]:
    shape = "; ".join(f"{name}={number}" for name, number in value["shape"].items())
    yield text(f"{shape}; window_tokens={value['window_tokens']}\n", "dim")
    for m in value["context"]:
        yield said(f"-- {m['role']}", m["text"])


def seen(value: Value) -> Iterator[RenderableType]:
    exact = {
        True: "built again, and equal to what was sent, to the character",
        False: "built again; what was sent was different",
        None: "nothing was recorded of what was sent",
    }
    yield text(f"turn {value['turn']}: {exact[value['exact']]}\n", "bold")
    for piece in value["pieces"]:
        style, sign = CHANGES[piece["change"]]
        lines = piece["text"].split("\n")
        body = "\n".join(f"{sign}{line}" for line in lines) if sign else piece["text"]
        yield text(f"-- {piece['role']}, {piece['change']}", style)
        yield text(body, "" if piece["change"] == "same" else style.removeprefix("bold "))
        yield ""


def live(value: Value) -> RenderableType:
    engine, background = value["engine"], value["background"]
    classes = ("chat", "side", "background")
    rows = [("model", engine.get("trouble") or engine.get("model") or "-")]
    for name in ("running", "waiting"):
        counts = engine.get(name) or {}
        rows.append((name, ", ".join(f"{cls} {counts.get(cls, 0)}" for cls in classes)))
    rows.append(("background", f"{background['running']} running, {background['pending']} pending"))
    if cells := engine.get("cells"):
        used = engine["cells_used"]
        rows.append(("KV cells", f"{used:,} of {cells:,} ({100 * used // cells} %)"))
        rows.append(("sequences", thousands(engine["sequences_used"])))
        size = engine["snapshot_bytes"] / 1e6
        rows.append(("snapshots", f"{engine['snapshots']:,} ({size:,.0f} MB)"))
    return table(("", ""), rows)
