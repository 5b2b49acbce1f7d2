"""Which span next, which pair to merge, which summaries hold."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.compaction import (
    Merge,
    Summarize,
    cover,
    covered,
    next_rewrite,
    next_step,
    weights,
)
from memory.policy import Limits
from memory.records import EXTRACTIVE, Node, Summary
from memory.transcript import ASSISTANT, ROOT, USER, Message, chain, extend, turn_starts

MESSAGE_TOKENS = 3
LIMITS = Limits(
    high_tokens=200,
    low_tokens=90,
    block_tokens=150,
    summaries_tokens=60,
    summary_tokens=20,
    answer_tokens=50,
    verbatim_turns=2,
)
LIMIT_VALUES = st.builds(
    lambda high, low, block, summaries, turns: replace(
        LIMITS,
        high_tokens=high,
        low_tokens=min(low, high - 1),
        block_tokens=block,
        summaries_tokens=summaries,
        verbatim_turns=turns,
    ),
    st.integers(2, 400),
    st.integers(0, 300),
    st.integers(1, 400),
    st.integers(0, 200),
    st.integers(1, 4),
)


def summary(
    id_: int,
    first: int,
    last: int,
    last_digest: bytes = b"",
    *,
    rank: int = 0,
    parents: tuple[int, ...] = (),
    n_tokens: int = 10,
) -> Summary:
    return Summary(
        id=id_,
        conversation="c",
        first_depth=first,
        last_depth=last,
        first_digest=b"",
        last_digest=last_digest,
        rank=rank,
        parents=parents,
        text="",
        n_tokens=n_tokens,
        tokenizer="words",
        made_by=EXTRACTIVE,
        model="",
        policy_digest="",
        prompt_version="",
        failed_checks=(),
        duration_s=0.0,
        created_at=0.0,
    )


def node(role: str, n_tokens: int) -> Node:
    return Node(extend(ROOT, Message(role, "")), ROOT, 0, role, "", n_tokens, "words")


NODES = st.lists(
    st.builds(node, st.sampled_from([USER, ASSISTANT]), st.integers(0, 90)), max_size=40
)


def costs(nodes: list[Node]) -> list[int]:
    return [n.n_tokens + MESSAGE_TOKENS for n in nodes]


def step(nodes: list[Node], limits: Limits) -> Summarize | Merge | None:
    return next_step(
        blocks=(), weights=(), nodes=nodes, message_tokens=MESSAGE_TOKENS, limits=limits
    )


# which summaries hold


@dataclass
class Written:
    """A summary and the whole history that it was written in, up to its last message."""

    summary: Summary
    history: list[Message]


TALK = st.lists(
    st.builds(Message, st.sampled_from([USER, ASSISTANT]), st.sampled_from(["a", "b"])),
    min_size=1,
    max_size=9,
)


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[Message], list[Written]]:
    """A history, and summaries from it and from histories that leave it somewhere."""
    path = draw(TALK)
    written = []
    for id_ in range(1, draw(st.integers(0, 14)) + 1):
        fork = draw(st.integers(0, len(path)))
        history = path[:fork] + draw(TALK) if draw(st.booleans()) else path
        last = draw(st.integers(0, len(history) - 1))
        first = draw(st.integers(0, last))
        digest = chain(history)[last]
        written.append(Written(summary(id_, first, last, digest), history[: last + 1]))
    return path, written


def naive_cover(path: list[Message], written: list[Written]) -> list[int]:
    """Compares whole histories, message by message, where the real thing compares one digest."""
    said = [(m.role, m.text) for m in path]
    ids: list[int] = []
    depth = 0
    while True:
        here = [
            w.summary
            for w in written
            if w.summary.first_depth == depth
            and [(m.role, m.text) for m in w.history] == said[: w.summary.last_depth + 1]
        ]
        if not here:
            return ids
        farthest = max(here, key=lambda s: (s.last_depth, s.id))
        ids.append(farthest.id)
        depth = farthest.last_depth + 1


@given(trees())
def test_only_summaries_of_this_very_history_hold(
    tree: tuple[list[Message], list[Written]],
) -> None:
    path, written = tree
    chosen = cover([w.summary for w in written], chain(path))
    assert [s.id for s in chosen] == naive_cover(path, written)


@given(trees())
def test_what_holds_stands_end_to_end_from_the_first_message(
    tree: tuple[list[Message], list[Written]],
) -> None:
    path, written = tree
    chosen = cover([w.summary for w in written], chain(path))
    assert [s.first_depth for s in chosen] == [0, *(s.last_depth + 1 for s in chosen)][:-1]
    assert covered(chosen) == sum(s.last_depth - s.first_depth + 1 for s in chosen)
    assert covered(chosen) <= len(path)


@given(trees(), TALK)
def test_what_held_holds_as_the_chat_grows(
    tree: tuple[list[Message], list[Written]], more: list[Message]
) -> None:
    path, written = tree
    own = [w.summary for w in written if w.history == path[: len(w.history)]]
    before, after = cover(own, chain(path)), cover(own, chain(path + more))
    assert before == after


def test_a_merged_block_takes_the_place_of_the_two_it_was_made_of() -> None:
    digests = chain([Message(USER, str(i)) for i in range(9)])
    one, two, three = (summary(i + 1, 2 * i, 2 * i + 1, digests[2 * i + 1]) for i in range(3))
    merged = summary(4, 0, 3, digests[3], rank=1, parents=(1, 2))
    assert cover([one, two, three, merged], digests) == (merged, three)
    assert cover([one, two, three], digests) == (one, two, three)
    # An edit behind the first block: the merged one told of what is no longer so.
    assert cover([one, two, three, merged], chain([Message(USER, c) for c in "01x"])) == (one,)


def test_of_two_summaries_of_one_span_the_newest_is_taken() -> None:
    digests = chain([Message(USER, "q"), Message(ASSISTANT, "a")])
    old, new = summary(1, 0, 1, digests[1]), summary(2, 0, 1, digests[1])
    assert cover([old, new], digests) == cover([new, old], digests) == (new,)


def test_of_one_place_the_newest_generation_stands_however_far_others_reach() -> None:
    digests = chain([Message(USER, str(i)) for i in range(8)])
    old = summary(9, 0, 7, digests[7], rank=2)
    again = [
        replace(summary(4, 0, 3, digests[3]), generation=1),
        replace(summary(5, 4, 7, digests[7]), generation=1),
    ]
    assert cover([old, *again], digests) == tuple(again)
    # Where the second does not hold, as on a branch, the first still does.
    assert cover([old, *again], digests[:6]) == (again[0],)


@given(nodes=st.lists(st.integers(1, 80), min_size=1, max_size=30), limits=LIMIT_VALUES)
def test_messages_written_again_get_blocks_end_to_end_and_whole_turns(
    nodes: list[int], limits: Limits
) -> None:
    path = [node(USER if i % 2 == 0 else ASSISTANT, n) for i, n in enumerate(nodes)]
    starts = {*turn_starts([n.role for n in path]), len(path)}
    blocks: list[Summary] = []
    known: list[Summary] = []
    for _ in range(10 * len(path)):
        done = covered(blocks)
        found = next_rewrite(
            blocks=blocks,
            weights=weights(blocks, known),
            nodes=path[done:],
            message_tokens=MESSAGE_TOKENS,
            limits=limits,
        )
        if found is None:
            break
        id_ = len(known) + 1
        if isinstance(found, Merge):
            a, b = blocks[found.index : found.index + 2]
            rank = max(a.rank, b.rank) + 1
            new = summary(id_, a.first_depth, b.last_depth, rank=rank, parents=(a.id, b.id))
            blocks[found.index : found.index + 2] = [new]
        else:
            assert found.n_nodes > 0
            new = summary(id_, done, done + found.n_nodes - 1)
            assert new.last_depth + 1 in starts
            cost = sum(n.n_tokens + MESSAGE_TOKENS for n in path[done : new.last_depth + 1])
            one_turn = not any(done < s <= new.last_depth for s in starts)
            assert cost <= min(limits.block_tokens, limits.step_tokens) or one_turn
            blocks.append(new)
        known.append(new)
    assert found is None
    assert covered(blocks) == len(path)
    assert blocks[0].first_depth == 0
    assert all(a.last_depth + 1 == b.first_depth for a, b in pairwise(blocks))


def test_a_gap_hides_what_is_behind_it() -> None:
    digests = chain([Message(USER, str(i)) for i in range(6)])
    assert cover([summary(1, 2, 3, digests[3])], digests) == ()


def test_without_messages_nothing_holds() -> None:
    assert cover([summary(1, 0, 0, b"x")], ()) == ()
    assert covered(()) == 0


# how far a compaction goes


@given(NODES, LIMIT_VALUES)
def test_nothing_happens_up_to_the_high_mark(nodes: list[Node], limits: Limits) -> None:
    if sum(costs(nodes)) <= limits.high_tokens:
        assert step(nodes, limits) is None


@given(NODES, LIMIT_VALUES)
def test_above_it_something_happens_while_there_are_turns_to_take(
    nodes: list[Node], limits: Limits
) -> None:
    n_turns = len(turn_starts([n.role for n in nodes]))
    if sum(costs(nodes)) > limits.high_tokens and n_turns > limits.verbatim_turns:
        assert isinstance(step(nodes, limits), Summarize)


@given(NODES, LIMIT_VALUES)
def test_only_whole_turns_are_taken_and_never_the_newest(nodes: list[Node], limits: Limits) -> None:
    chosen = step(nodes, limits)
    if chosen is None:
        return
    starts = turn_starts([n.role for n in nodes])
    assert isinstance(chosen, Summarize)
    assert chosen.n_nodes in starts[1:]
    assert len([s for s in starts if s >= chosen.n_nodes]) >= limits.verbatim_turns


@given(NODES, LIMIT_VALUES)
def test_a_block_has_at_most_its_limit_of_text_or_is_one_long_turn(
    nodes: list[Node], limits: Limits
) -> None:
    chosen = step(nodes, limits)
    if isinstance(chosen, Summarize):
        taken = sum(costs(nodes)[: chosen.n_nodes])
        one_turn = chosen.n_nodes == turn_starts([n.role for n in nodes])[1]
        assert taken <= limits.block_tokens or one_turn


@given(NODES, LIMIT_VALUES)
def test_a_compaction_takes_no_turn_more_than_the_low_mark_asks_for(
    nodes: list[Node], limits: Limits
) -> None:
    chosen = step(nodes, limits)
    if isinstance(chosen, Summarize):
        starts = [s for s in turn_starts([n.role for n in nodes]) if s < chosen.n_nodes]
        assert sum(costs(nodes)[starts[-1] :]) > limits.low_tokens


@given(NODES, LIMIT_VALUES)
def test_steps_go_on_until_about_the_low_mark_is_left(nodes: list[Node], limits: Limits) -> None:
    """Less than `low` and a turn stays when all that may be taken in one block is."""
    limits = replace(limits, block_tokens=100_000)
    chosen = step(nodes, limits)
    if isinstance(chosen, Summarize):
        rest = nodes[chosen.n_nodes :]
        n_turns = len(turn_starts([n.role for n in rest]))
        assert sum(costs(rest)) <= limits.low_tokens or n_turns == limits.verbatim_turns


def test_questions_without_an_answer_go_with_the_turn_that_has_one() -> None:
    nodes = [node(role, 40) for role in (USER, USER, USER, ASSISTANT, USER, ASSISTANT)]
    chosen = step(nodes, replace(LIMITS, verbatim_turns=1))
    assert chosen == Summarize(4)


# merging


def test_no_merge_while_the_summaries_are_within_their_budget() -> None:
    blocks = [summary(i, 2 * i, 2 * i + 1, n_tokens=20) for i in range(3)]
    assert merge(blocks, [1, 1, 1]) is None
    assert merge([*blocks, summary(3, 6, 7, n_tokens=1)], [1] * 4) == Merge(0)


def test_the_oldest_pair_of_the_lowest_rank_becomes_one() -> None:
    ranks = [2, 1, 0, 0, 0]
    blocks = [summary(i, 2 * i, 2 * i + 1, rank=r, n_tokens=30) for i, r in enumerate(ranks)]
    assert merge(blocks, [4, 2, 1, 1, 1]) == Merge(2)


def test_an_old_block_is_not_rewritten_for_every_small_new_one() -> None:
    blocks = [summary(0, 0, 7, rank=2, n_tokens=50), summary(1, 8, 9, n_tokens=50)]
    assert merge(blocks, [4, 1]) == Merge(0)  # 3 of 5 blocks: ceil(log2 5)
    assert merge(blocks, [3, 1]) is None  # a third time, for 4 blocks, would be once too many


def test_merging_goes_before_summarising() -> None:
    blocks = [summary(i, 2 * i, 2 * i + 1, n_tokens=40) for i in range(2)]
    nodes = [node(role, 90) for role in (USER, ASSISTANT) * 4]
    both = next_step(
        blocks=blocks, weights=[1, 1], nodes=nodes, message_tokens=MESSAGE_TOKENS, limits=LIMITS
    )
    assert both == Merge(0)


def merge(blocks: list[Summary], weights: list[int]) -> Summarize | Merge | None:
    return next_step(blocks=blocks, weights=weights, nodes=(), message_tokens=3, limits=LIMITS)


def test_a_block_weighs_as_much_as_all_that_went_into_it() -> None:
    leaves = [summary(i, i, i) for i in range(1, 6)]
    pair = summary(6, 1, 2, rank=1, parents=(1, 2))
    three = summary(7, 1, 3, rank=2, parents=(6, 3))
    known = [*leaves, pair, three]
    assert weights([three, leaves[3], pair], known) == (3, 1, 2)


def test_a_block_whose_parents_are_gone_weighs_one() -> None:
    assert weights([summary(9, 0, 3, rank=1, parents=(1, 2))], []) == (1,)


# hundreds of turns


@dataclass
class Growth:
    """A chat with a keeper that has all the time it needs after every turn."""

    limits: Limits
    nodes: list[Node] = field(default_factory=list)
    blocks: list[Summary] = field(default_factory=list)
    known: list[Summary] = field(default_factory=list)
    behind: int = 0
    rewritten: list[int] = field(default_factory=list)
    """How often each message of the chat was summarised anew after its first summary."""
    rank_0: list[Summary] = field(default_factory=list)

    def turn(self, question: int, answer: int, length: int) -> None:
        self.nodes += [node(USER, question), node(ASSISTANT, answer)]
        steps = 0
        while (todo := self._step()) is not None:
            self._carry_out(todo, length)
            steps += 1
            assert steps < 1000, "it never ends"

    @property
    def verbatim(self) -> list[Node]:
        return self.nodes[self.behind :]

    def _step(self) -> Summarize | Merge | None:
        return next_step(
            blocks=self.blocks,
            weights=weights(self.blocks, self.known),
            nodes=self.verbatim,
            message_tokens=MESSAGE_TOKENS,
            limits=self.limits,
        )

    def _carry_out(self, todo: Summarize | Merge, length: int) -> None:
        id_ = len(self.known) + 1
        if isinstance(todo, Summarize):
            first, last = self.behind, self.behind + todo.n_nodes - 1
            made = summary(id_, first, last, n_tokens=length)
            self.behind += todo.n_nodes
            self.rewritten += [0] * todo.n_nodes
            self.blocks.append(made)
            self.rank_0.append(made)
        else:
            one, two = self.blocks[todo.index : todo.index + 2]
            rank = max(one.rank, two.rank) + 1
            made = summary(
                id_,
                one.first_depth,
                two.last_depth,
                rank=rank,
                parents=(one.id, two.id),
                n_tokens=length,
            )
            for i in range(made.first_depth, made.last_depth + 1):
                self.rewritten[i] += 1
            self.blocks[todo.index : todo.index + 2] = [made]
        self.known.append(made)

    def leaves(self, block: Summary) -> int:
        return sum(block.first_depth <= s.first_depth <= block.last_depth for s in self.rank_0)


TURNS = st.lists(
    st.tuples(st.integers(1, 80), st.integers(1, 120), st.integers(5, 24)),
    min_size=30,
    max_size=250,
)


def grown(limits: Limits, turns: list[tuple[int, int, int]]) -> Growth:
    growth = Growth(limits)
    for question, answer, length in turns:
        growth.turn(question, answer, length)
    return growth


@settings(max_examples=25, deadline=None)
@given(TURNS, st.integers(0, 150))
def test_no_turn_is_written_anew_more_often_than_the_logarithm_of_its_blocks(
    turns: list[tuple[int, int, int]], budget: int
) -> None:
    growth = Growth(replace(LIMITS, summaries_tokens=budget))
    for question, answer, length in turns:
        growth.turn(question, answer, length)
        for block in growth.blocks:
            often = max(growth.rewritten[block.first_depth : block.last_depth + 1])
            assert often <= block.rank <= ceil(log2(growth.leaves(block)))


@settings(max_examples=25, deadline=None)
@given(TURNS, st.integers(0, 150))
def test_summaries_keep_to_their_budget_or_are_no_more_than_the_logarithm(
    turns: list[tuple[int, int, int]], budget: int
) -> None:
    """The bound on rewriting is the stronger one. What it leaves over the budget are blocks that
    each hold more than the next: log2 N of them for N blocks of rank 0, and one."""
    growth = grown(replace(LIMITS, summaries_tokens=budget), turns)
    if sum(b.n_tokens for b in growth.blocks) > budget:
        assert len(growth.blocks) <= log2(len(growth.rank_0)) + 1
        ranks = [b.rank for b in growth.blocks]
        assert all(a != b for a, b in pairwise(ranks)), "two of one rank can always be merged"


@settings(max_examples=25, deadline=None)
@given(TURNS)
def test_what_stays_verbatim_is_at_most_the_high_mark_and_one_turn(
    turns: list[tuple[int, int, int]],
) -> None:
    growth = grown(LIMITS, turns)
    rest = growth.verbatim
    n_turns = len(turn_starts([n.role for n in rest]))
    assert sum(costs(rest)) <= LIMITS.high_tokens or n_turns <= LIMITS.verbatim_turns
    assert n_turns >= LIMITS.verbatim_turns
    assert growth.behind + len(rest) == 2 * len(turns)
    assert covered(growth.blocks) == growth.behind


def test_hundreds_of_blocks_end_as_a_handful() -> None:
    growth = Growth(replace(LIMITS, high_tokens=20, low_tokens=10, verbatim_turns=1))
    for _ in range(400):
        growth.turn(5, 5, 20)
    assert len(growth.rank_0) > 350
    assert len(growth.blocks) <= log2(len(growth.rank_0)) + 1
    assert max(growth.rewritten) <= ceil(log2(len(growth.rank_0)))


@pytest.mark.parametrize(("high", "low", "most"), [(6000, 5500, 16.0), (6000, 3000, 3.0)])
def test_the_distance_of_the_marks_decides_how_much_is_evaluated_again(
    high: int, low: int, most: float
) -> None:
    """200 turns of 40 and 110 tokens: each compaction changes the prefix behind the blocks, so that
    without a pause to warm it all that stays verbatim is evaluated again."""
    limits = replace(
        LIMITS, high_tokens=high, low_tokens=low, block_tokens=10_000, summaries_tokens=1600
    )
    growth, again = Growth(limits), 0
    for _ in range(200):
        before = growth.behind
        growth.turn(40, 110, 300)
        again += sum(costs(growth.verbatim)) if growth.behind != before else 0
    assert again <= most * sum(costs(growth.nodes))
