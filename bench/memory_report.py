"""The figures of bench.memory as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.memory_calls import REGENERATIONS, Edited, Restarted
from bench.memory_crash import Killed, Opened
from bench.memory_prefix import Long
from bench.memory_speed import SLID_MESSAGES, Timed
from bench.memory_windows import Run


@dataclass(frozen=True, slots=True)
class Calls:
    """Summary calls: of each chat by itself, and of what else was done with them."""

    one: int
    other: int
    interleaved: int
    regenerated: int
    edited: Edited
    restarted: Restarted

    @property
    def extra(self) -> int:
        return self.interleaved - self.one - self.other

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def calls(found: Calls, *, turns: int) -> str:
    edited, restarted = found.edited, found.restarted
    return "\n".join(
        [
            f"Summary calls, {turns} turns:",
            f"  one chat {found.one}, another {found.other}; both, turn about: "
            f"{found.interleaved} ({found.extra:+d})",
            f"  each answer made {REGENERATIONS} times more: {found.regenerated} "
            f"({found.regenerated - found.one:+d})",
            f"  question {edited.edited_turn} edited at the end, and {turns} turns from there on: "
            f"{edited.calls_after} more; of the {edited.messages_before_edit} messages before it "
            f"old summaries go on to cover {edited.kept_messages}, the first new block begins at "
            f"message {edited.earliest}, summarised again: {edited.summarised_again}",
            f"  {restarted.restarts} restarts: {restarted.calls_by_restart} calls by them, "
            f"{restarted.calls} in all; contexts with the same bytes before and after: "
            f"{restarted.same_contexts}",
        ]
    )


RUN_HEAD = (
    "                                   evaluated / new       evaluated  dropped by  turns that  "
    "summary\n"
    "                                   mean    all   worst       again  the client   lost some  "
    "  calls"
)


def windows(found: Mapping[int, Sequence[Run]], bare: Run) -> str:
    parts = [f"Windows of {bare.turns} turns, an idle gap after each:", RUN_HEAD]
    for size, runs in found.items():
        parts += [f"  window of the model: {size}", *(_run(run) for run in runs)]
    return "\n".join([*parts, "  beside it", _run(bare)])


def dates(runs: Sequence[Run]) -> str:
    head = (
        f"A system prompt with the time at its end, {runs[0].turns} turns, from the third on (in "
        f"the second, which learns of it: {runs[0].settling} tokens evaluated again). The new time "
        'is not among the "new" tokens, nor among those evaluated again:'
    )
    return "\n".join([head, RUN_HEAD, *(_run(run) for run in runs)])


def _run(run: Run) -> str:
    return (
        f"    {run.name:32} {run.mean:6.3f} {run.total:6.3f} {run.worst:7.2f} {run.again:11} "
        f"{run.dropped_by_client:11} {run.lost:11} {run.summary_calls:8}"
    )


def prefix(found: Long) -> str:
    return "\n".join(
        [
            f"A chat of {found.turns} turns, an idle gap after each:",
            f"  requests that found less in the cache than was warmed: {found.cold_requests}",
            f"  evaluated / new: mean {found.mean:.4f}, all {found.total:.4f}, "
            f"worst {found.worst:.3f}; turns that lost some: {found.lost}",
            f"  longest prompt {found.longest_prompt_tokens} of {found.window_tokens} tokens",
            f"  {found.compactions} compactions, {found.merges} merges, highest rank "
            f"{found.max_rank}; a message was rewritten {found.most_rewritings} times at most "
            f"(bound {found.rewritings_bound})",
            f"  written by: {_pairs(found.made_by)}; failed checks: {_pairs(found.failed_checks)}",
        ]
    )


SPEED_HEAD = (
    "  messages      kB  summaries   total  fastest     cpu  us each |   parse   chain  "
    f"recognise  assemble | last {SLID_MESSAGES} alone"
)


def speed(found: Sequence[Timed]) -> str:
    head = "Parse, recognise and assemble on a warm store, medians in ms:"
    return "\n".join([head, SPEED_HEAD, *(_timed(timed) for timed in found)])


def _timed(t: Timed) -> str:
    return (
        f"  {t.messages:8} {t.body_bytes / 1000:7.0f} {t.summaries:10} {t.total_ms:7.2f} "
        f"{t.fastest_ms:8.2f} {t.cpu_ms:7.2f} {t.total_us_each:8.2f} | {t.parse_ms:7.2f} "
        f"{t.chain_ms:7.2f} {t.recognise_ms:10.2f} {t.assemble_ms:9.2f} | {t.slid_ms:8.2f}"
    )


def crash(killed: Killed, opened: Sequence[Opened]) -> str:
    faults = ", ".join(killed.integrity) or "ok"
    lines = [
        f"kill -9 of {killed.kills} writers: {killed.acknowledged} turns acknowledged, "
        f"{killed.lost} of them lost, {killed.half_turns} half turns, integrity {faults}"
    ]
    lines += [
        f"{o.rounds} x {o.processes} processes opening at once, {o.on}: {o.failures} failures"
        for o in opened
    ]
    return "\n".join(lines)


def _pairs(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "none"
