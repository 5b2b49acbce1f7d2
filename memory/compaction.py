"""Which span next, which pair to merge, which summaries hold: pure arithmetic on tokens and
depths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import TypeVar

from memory.policy import Limits
from memory.records import Node, Span, Summary
from memory.transcript import turn_starts

S = TypeVar("S", Span, Summary)


@dataclass(frozen=True, slots=True)
class Summarize:
    """Write a block of rank 0 from the first `n_nodes` of the verbatim nodes."""

    n_nodes: int


@dataclass(frozen=True, slots=True)
class Merge:
    """Make one block of the two adjacent ones at `index` and `index + 1`."""

    index: int


Step = Summarize | Merge


def cover(summaries: Iterable[S], digests: Sequence[bytes]) -> tuple[S, ...]:
    """The summaries that stand for the beginning of this history, end to end from its first
    message.

    A summary holds for a history in which the last message of its span stands at its depth: the
    chain digest there vouches for all before it. Of several that begin at one depth those of the
    newest generation count; of these the one that reaches farthest is taken, then the newest.
    """
    beginning: dict[int, list[S]] = {}
    for s in summaries:
        beginning.setdefault(s.first_depth, []).append(s)
    return cover_from(lambda depth: beginning.get(depth, ()), digests)


def cover_from(
    beginning_at: Callable[[int], Iterable[S]], digests: Sequence[bytes]
) -> tuple[S, ...]:
    """cover() for whoever can look up the summaries that begin at a depth: only those at the ends
    of the chosen ones are asked for, however many there are."""
    chosen: list[S] = []
    depth = 0
    while holding := [s for s in beginning_at(depth) if _holds(s, digests)]:
        chosen.append(max(holding, key=lambda s: (s.generation, s.last_depth, s.id)))
        depth = chosen[-1].last_depth + 1
    return tuple(chosen)


def _holds(s: Span | Summary, digests: Sequence[bytes]) -> bool:
    return s.last_depth < len(digests) and digests[s.last_depth] == s.last_digest


def covered(blocks: Sequence[Summary]) -> int:
    """Number of messages that the blocks stand for."""
    return blocks[-1].last_depth + 1 if blocks else 0


def next_step(
    *,
    blocks: Sequence[Summary],
    weights: Sequence[int],
    nodes: Sequence[Node],
    message_tokens: int,
    limits: Limits,
) -> Step | None:
    """What to do now, or None. `nodes` are the verbatim ones behind the blocks.

    Merging comes first: it makes the context smaller, and a new block would only add to it.
    `weights[i]` is the number of rank-0 blocks that went into block i.
    """
    merge = _merge(blocks, weights, limits)
    if merge is not None:
        return merge
    return _summarize(nodes, message_tokens, limits)


def next_rewrite(
    *,
    blocks: Sequence[Summary],
    weights: Sequence[int],
    nodes: Sequence[Node],
    message_tokens: int,
    limits: Limits,
) -> Step | None:
    """The step by which messages that are all to be summarised get their blocks, as they would have
    under these limits: `nodes` are those behind the blocks. None when nothing is left to do."""
    merge = _merge(blocks, weights, limits)
    if merge is not None or not nodes:
        return merge
    costs = [n.n_tokens + message_tokens for n in nodes]
    starts = turn_starts([n.role for n in nodes])
    # What one compaction takes: down from `high` to `low`, but no more than a block may have.
    most = min(limits.block_tokens, limits.step_tokens)
    ends = [*starts[1:], len(nodes)]
    fitting = [end for end in ends if sum(costs[:end]) <= most]
    return Summarize(max(fitting, default=ends[0]))


def _merge(blocks: Sequence[Summary], weights: Sequence[int], limits: Limits) -> Merge | None:
    if sum(b.n_tokens for b in blocks) <= limits.summaries_tokens:
        return None
    pairs = [i for i in range(len(blocks) - 1) if _may_merge(blocks, weights, i)]
    if not pairs:
        return None
    return Merge(min(pairs, key=lambda i: (max(blocks[i].rank, blocks[i + 1].rank), i)))


def _may_merge(blocks: Sequence[Summary], weights: Sequence[int], i: int) -> bool:
    """No turn is written anew more often than ceil(log2 N) times for the N blocks it is now part
    of.

    Without this bound a large old block would be rewritten with each small new one, and repeated
    rewriting is how facts are lost fastest.
    """
    rank = max(blocks[i].rank, blocks[i + 1].rank) + 1
    return rank <= ceil(log2(weights[i] + weights[i + 1]))


def _summarize(nodes: Sequence[Node], message_tokens: int, limits: Limits) -> Summarize | None:
    """The oldest whole turns, so many that about `low_tokens` stay, at most `block_tokens` at
    once.
    """
    costs = [n.n_tokens + message_tokens for n in nodes]
    total = sum(costs)
    if total <= limits.high_tokens:
        return None
    starts = turn_starts([n.role for n in nodes])
    ends = [*starts[1:], len(nodes)][: max(0, len(starts) - limits.verbatim_turns)]
    chosen, taken, i = 0, 0, 0
    for end in ends:
        turn = sum(costs[i:end])
        if chosen and taken + turn > limits.block_tokens:
            break
        taken, chosen, i = taken + turn, end, end
        if total - taken <= limits.low_tokens:
            break
    return Summarize(chosen) if chosen else None


def weights(blocks: Sequence[Summary], known: Sequence[Summary]) -> tuple[int, ...]:
    """How many rank-0 blocks went into each block, by its parents among the known summaries."""
    by_id = {s.id: s for s in known}

    def weigh(s: Summary) -> int:
        parents = [by_id[p] for p in s.parents if p in by_id]
        return sum(weigh(p) for p in parents) if parents else 1

    return tuple(weigh(b) for b in blocks)
