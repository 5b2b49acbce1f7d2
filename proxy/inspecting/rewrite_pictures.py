"""Summaries written again, for a terminal: tables, two columns side by side. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from proxy.inspecting.pictures import Value, heading
from proxy.inspecting.terminal import Cell, table, text, thousands, when

BEFORE, AGAIN = "before", "again"
SIDES = ((BEFORE, "dim"), (AGAIN, "green"))
FACTS_SHOWN = 12


def rewrites(value: Value) -> Iterator[RenderableType]:
    yield heading(value)
    rows = [
        (
            one["id"],
            one["policy"],
            one["state"],
            f"{one['first_depth']}-{one['last_depth']}",
            one["summaries"],
            one["tokens"],
            when(one["created_at"]),
        )
        for one in value["rewrites"]
    ]
    names = ("set", "policy", "state", "messages", "summaries", "tokens", "begun")
    yield table(names, rows, right="set summaries tokens")
    knobs = [name for name in value["policies"][0] if name != "prompt"] if value["policies"] else []
    yield text("\n--policy, and what --knob can change of it", "bold")
    yield table(knobs, [[policy[name] for name in knobs] for policy in value["policies"]])


def rewrite(value: Value) -> Iterator[RenderableType]:
    yield heading(value)
    one, found = value["rewrite"], value["compared"]
    yield text(f"set {one['id']}, {one['policy']}: {progress(one)}", "bold")
    if value["knobs"]:
        changed = "; ".join(f"{name}={knob}" for name, knob in value["knobs"].items())
        yield text(f"against the policy in use: {changed}", "dim")
    yield ""
    if found is None:
        if one["finished_at"]:
            yield text("the summaries of one side were forgotten: nothing to compare")
        return
    yield table(("", BEFORE, AGAIN), _totals(found), right=f"{BEFORE} {AGAIN}")
    yield ""
    rows: list[list[Cell]] = []
    for row in found["rows"]:
        span = f"{row['first_turn']}-{row['last_turn']}"
        rows.append([text(span, "bold"), *[_half(row[side], style) for side, style in SIDES]])
    yield table(("turns", BEFORE, AGAIN), rows)


def _totals(found: Value) -> list[list[str]]:
    rows = [
        ["summaries", *[thousands(found[side]["n_summaries"]) for side, _ in SIDES]],
        ["tokens", *[thousands(found[side]["n_tokens"]) for side, _ in SIDES]],
        ["written by the model", *[thousands(found[side]["n_by_model"]) for side, _ in SIDES]],
        ["seconds to write", *[f"{found[side]['seconds']:.1f}" for side, _ in SIDES]],
        ["kept in all", *[_share(found[side]["kept_in_all"]) for side, _ in SIDES]],
    ]
    kinds = [[kind, *[_share(found[s]["kept"][kind]) for s, _ in SIDES]] for kind in found["kinds"]]
    return rows + kinds


def _share(share: Value) -> str:
    of = share["of"]
    return f"{share['kept']}/{of} ({100 * share['kept'] // of} %)" if of else "-"


def _half(half: Value, style: str) -> Text:
    """The summaries of one side over the same turns, one below the other, then what they alone
    tell."""
    made = Text()
    for s in half["summaries"]:
        failed = f", failed: {', '.join(s['failed_checks'])}" if s["failed_checks"] else ""
        made.append_text(text(f"{s['n_tokens']:,} tokens, {s['made_by']}{failed}\n", style))
        made.append_text(text(f"{s['text']}\n"))
    made.append_text(text(f"keeps {_share(half['kept'])}\n", "dim"))
    only, more = half["only_here"][:FACTS_SHOWN], len(half["only_here"]) - FACTS_SHOWN
    if only:
        tail = f" and {more} more" if more > 0 else ""
        made.append_text(text(f"only here: {', '.join(only)}{tail}\n", style))
    return made


def progress(value: Value) -> str:
    told = f"{value['state']}, {value['done']} of {value['of']} messages"
    if value["trouble"]:
        told = f"{told} ({value['trouble']})"
    doing = value.get("doing")
    if not doing or not doing["of_tokens"]:
        return told
    if doing["read_tokens"] < doing["of_tokens"]:
        return f"{told}; {doing['read_tokens']:,} of {doing['of_tokens']:,} tokens read"
    return f"{told}; {doing['written_tokens']:,} tokens written"
