"""Contexts: what is sent, what goes when it does not fit, and which bytes stay."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from memory.context import (
    BLOCK_HEADER,
    CUT,
    LEFT_OUT,
    MARKUP_SHARE,
    NO_USER,
    NOTE_TOKENS,
    Context,
    DoesNotFit,
    Room,
    System,
    assemble,
    block_text,
    cut_text,
    fits,
)
from memory.records import EXTRACTIVE, Node, Summary
from memory.system import note_text
from memory.tokens import TiktokenCounter
from memory.transcript import ASSISTANT, ROOT, TOOL, USER, Message, extend, turn_starts

TOKENIZER = "words"
ROLES = st.sampled_from([USER, ASSISTANT, TOOL])
ROOMS = st.builds(
    Room,
    prompt_tokens=st.integers(1, 600),
    message_tokens=st.integers(0, 8),
    base_tokens=st.integers(0, 6),
    step_tokens=st.integers(1, 300),
)


def node(role: str, text: str, n_tokens: int, *, depth: int = 0) -> Node:
    return Node(extend(ROOT, Message(role, text)), ROOT, depth, role, text, n_tokens, TOKENIZER)


def block(i: int, n_tokens: int) -> Summary:
    return Summary(
        id=i + 1,
        conversation="c",
        first_depth=2 * i,
        last_depth=2 * i + 1,
        first_digest=b"",
        last_digest=b"",
        rank=0,
        parents=(),
        text=f"summary {i}",
        n_tokens=n_tokens,
        tokenizer=TOKENIZER,
        made_by=EXTRACTIVE,
        model="",
        policy_digest="",
        prompt_version="",
        failed_checks=(),
        duration_s=0.0,
        created_at=0.0,
    )


def chat(*lengths: int) -> list[Node]:
    """Question and answer in turn, of so many tokens each, four characters to a token."""
    return [
        node(ASSISTANT if i % 2 else USER, f"{i:04}" * n, n, depth=i) for i, n in enumerate(lengths)
    ]


SYSTEMS = st.builds(
    lambda n, n_tools: System("sys " * n, n, "[{}]" if n_tools else "", n_tools),
    st.integers(0, 200),
    st.sampled_from([0, 0, 7, 60]),
)
BLOCKS = st.lists(st.integers(1, 60), max_size=6).map(
    lambda lengths: [block(i, n) for i, n in enumerate(lengths)]
)
NODES = st.lists(st.tuples(ROLES, st.integers(1, 120)), min_size=1, max_size=30).map(
    lambda sizes: [node(role, f"{i:04}" * n, n, depth=i) for i, (role, n) in enumerate(sizes)]
)


def cost(context: Context, room: Room) -> int:
    """The prompt's length by the context's own counts: base, head, and each message once."""
    shape = context.shape
    head = shape.system_tokens + shape.summary_tokens
    has_head = bool(context.messages) and context.messages[0].role == "system"
    sent = [m for m in context.messages if m.role != "system"]
    # Merged neighbours are counted as one message: the count is what the template sees.
    markup = room.base_tokens + room.message_tokens * (len(sent) + has_head)
    return head + shape.verbatim_tokens + markup


def shown(context: Context) -> list[str]:
    """Every text that stands word for word, in order."""
    parts = [p for m in context.messages if m.role != "system" for p in m.parts]
    return [p for p in parts if p not in ("\n\n", NO_USER)]


def dropped(nodes: list[Node], room: Room, *, blocks: tuple[Summary, ...] = ()) -> int:
    system = System("", 0)
    context = assemble(system=system, blocks=blocks, nodes=nodes, room=room, tokenizer=TOKENIZER)
    return context.shape.dropped_messages


# what is sent


@given(SYSTEMS, BLOCKS, NODES, ROOMS)
def test_the_same_input_gives_the_same_context(
    system: System, blocks: list[Summary], nodes: list[Node], room: Room
) -> None:
    one, other = (
        assemble(system=system, blocks=b, nodes=n, room=room, tokenizer=TOKENIZER)
        for b, n in ((blocks, nodes), (tuple(blocks), tuple(replace(n) for n in nodes)))
    )
    assert one == other


@given(SYSTEMS, BLOCKS, NODES, ROOMS)
def test_what_fits_is_sent_whole(
    system: System, blocks: list[Summary], nodes: list[Node], room: Room
) -> None:
    room = replace(room, prompt_tokens=100_000)
    context = assemble(
        system=system, blocks=blocks, nodes=nodes, room=room, tokenizer=TOKENIZER, may_drop=False
    )
    assert shown(context) == [n.text for n in nodes]
    head = [system.text] if system.text else []
    head += [block_text(b.text) for b in blocks]
    assert context.messages[0].parts == tuple(head) or not head
    assert context.shape.dropped_messages == 0
    assert context.shape.summaries == len(blocks)
    assert context.shape.verbatim_turns == len(turn_starts([n.role for n in nodes]))


@given(SYSTEMS, BLOCKS, NODES)
def test_user_and_assistant_take_turns_and_the_user_begins(
    system: System, blocks: list[Summary], nodes: list[Node]
) -> None:
    room = Room(prompt_tokens=300, message_tokens=3, base_tokens=2, step_tokens=50)
    context = assemble(system=system, blocks=blocks, nodes=nodes, room=room, tokenizer=TOKENIZER)
    roles = [m.role for m in context.messages if m.role != "system"]
    assert roles[0] == USER
    assert all(a != b or a == TOOL for a, b in pairwise(roles))
    assert context.continues == (nodes[-1].role == ASSISTANT)


def test_neighbours_of_one_role_become_one_message_and_keep_their_parts() -> None:
    nodes = [node(USER, "first", 1), node(USER, "second", 1), node(ASSISTANT, "answer", 1)]
    context = whole(nodes)
    assert [m.parts for m in context.messages] == [("first", "\n\n", "second"), ("answer",)]
    assert context.messages[0].text == "first\n\nsecond"


def test_an_answer_without_a_question_gets_one() -> None:
    context = whole([node(ASSISTANT, "Hello, how are you?", 5), node(USER, "fine", 1)])
    assert [(m.role, m.text) for m in context.messages] == [
        (USER, NO_USER),
        (ASSISTANT, "Hello, how are you?"),
        (USER, "fine"),
    ]


def test_a_note_stands_right_before_its_message() -> None:
    told = replace(node(USER, "well?", 4), note="Today is Tuesday.")
    context = whole([node(USER, "hi", 1), node(ASSISTANT, "yes", 1), told])
    assert context.messages[-1].parts == (note_text("Today is Tuesday."), "well?")


def test_nothing_at_all_is_a_context_without_messages() -> None:
    context = whole([])
    assert (context.messages, context.continues) == ((), False)


def test_token_ids_are_given_under_their_own_tokenizer_only() -> None:
    exact = replace(node(ASSISTANT, "answer", 1), token_ids=b"\1\0\0\0")
    nodes = [node(USER, "q", 1), exact, node(USER, "r", 1)]
    assert whole(nodes).messages[1].token_ids == b"\1\0\0\0"
    other = assemble(
        system=System("", 0), blocks=(), nodes=nodes, room=ROOMY, tokenizer="another model's"
    )
    assert other.messages[1].token_ids is None
    assert other.tokenizer == "another model's"


def test_token_ids_of_merged_or_cut_messages_are_not_given() -> None:
    exact = replace(node(ASSISTANT, "word " * 50, 50), token_ids=b"\1\0\0\0" * 50)
    merged = whole([node(USER, "q", 1), exact, replace(exact, text="more")])
    assert merged.messages[1].token_ids is None
    room = replace(ROOMY, prompt_tokens=60)
    cut = assemble(
        system=System("", 0),
        blocks=(),
        nodes=[node(USER, "q", 1), exact],
        room=room,
        tokenizer=TOKENIZER,
    )
    assert CUT in cut.messages[1].text
    assert cut.messages[1].token_ids is None


ROOMY = Room(prompt_tokens=100_000, message_tokens=3, base_tokens=2, step_tokens=100)


def whole(nodes: list[Node], blocks: tuple[Summary, ...] = (), system: str = "") -> Context:
    return assemble(
        system=System(system, len(system.split())),
        blocks=blocks,
        nodes=nodes,
        room=ROOMY,
        tokenizer=TOKENIZER,
    )


# which bytes stay


@given(SYSTEMS, BLOCKS, NODES, st.integers(0, 6))
def test_a_new_summary_changes_no_part_before_it(
    system: System, blocks: list[Summary], nodes: list[Node], n: int
) -> None:
    before, after = (
        assemble(system=system, blocks=b, nodes=nodes, room=ROOMY, tokenizer=TOKENIZER).messages
        for b in (blocks[:n], blocks)
    )
    early = before[0].parts if before[0].role == "system" else ()
    late = after[0].parts if after[0].role == "system" else ()
    assert late[: len(early)] == early


@given(SYSTEMS, BLOCKS, NODES, NODES)
def test_a_new_message_changes_no_part_before_it(
    system: System, blocks: list[Summary], nodes: list[Node], more: list[Node]
) -> None:
    before, after = (
        assemble(system=system, blocks=blocks, nodes=n, room=ROOMY, tokenizer=TOKENIZER)
        for n in (nodes, nodes + more)
    )
    *same, last = before.messages
    assert list(after.messages[: len(same)]) == same
    assert after.messages[len(same)].parts[: len(last.parts)] == last.parts


def test_without_a_system_prompt_summaries_stand_alone() -> None:
    context = whole(chat(1, 1), blocks=(block(0, 5), block(1, 5)))
    assert context.messages[0].parts == (
        BLOCK_HEADER + "summary 0",
        BLOCK_HEADER + "summary 1",
    )


def test_results_of_tools_stand_each_by_itself() -> None:
    calls = node(ASSISTANT, "two calls", 2)
    context = whole([node(USER, "hi", 1), calls, node(TOOL, "one", 1), node(TOOL, "two", 1)])
    assert [(m.role, m.text) for m in context.messages] == [
        (USER, "hi"),
        (ASSISTANT, "two calls"),
        (TOOL, "one"),
        (TOOL, "two"),
    ]
    assert not context.continues


def test_a_turn_of_very_many_messages_never_begins_with_a_result_whose_call_is_gone() -> None:
    rounds = [n for _ in range(40) for n in (node(ASSISTANT, "call", 1), node(TOOL, "42", 1))]
    turn = [node(USER, "question", 1), *rounds]
    for prompt_tokens in range(60, 400, 7):
        room = Room(prompt_tokens=prompt_tokens, message_tokens=4, base_tokens=2, step_tokens=9)
        context = assemble(
            system=System("", 0), blocks=(), nodes=turn, room=room, tokenizer=TOKENIZER
        )
        roles = [m.role for m in context.messages if m.role != "system"]
        assert roles == [USER] or roles[:2] == [USER, ASSISTANT] or set(roles[1:]) == {TOOL}
        assert TOOL not in roles or ASSISTANT in roles or roles == [USER, TOOL]
        assert cost(context, room) <= prompt_tokens


def test_tools_take_room_and_are_never_cut() -> None:
    system = System("Be kind. " * 40, 120, '[{"type": "function"}]', 50)
    room = Room(prompt_tokens=120, message_tokens=3, base_tokens=2, step_tokens=10)
    context = assemble(
        system=system, blocks=(), nodes=chat(30, 30, 30), room=room, tokenizer=TOKENIZER
    )
    assert context.tools == system.tools
    assert cost(context, room) <= room.prompt_tokens
    assert CUT in context.messages[0].text


# what goes when it does not fit


@given(SYSTEMS, BLOCKS, NODES, ROOMS)
def test_never_longer_than_the_room_while_anything_can_be_cut(
    system: System, blocks: list[Summary], nodes: list[Node], room: Room
) -> None:
    newest = nodes[turn_starts([n.role for n in nodes])[-1] :]
    markup = room.base_tokens + NOTE_TOKENS + room.message_tokens * (len(newest) + 1)
    markup += system.tools_tokens
    # One token for each text of the newest turn and for the system prompt: no text is cut away.
    assume(room.prompt_tokens >= markup + len(newest) + 1)
    context = assemble(system=system, blocks=blocks, nodes=nodes, room=room, tokenizer=TOKENIZER)
    extra = NOTE_TOKENS if context.shape.dropped_messages else 0
    assert cost(context, room) + extra <= room.prompt_tokens


def lasting(nodes: list[Node], room: Room) -> list[Node]:
    """The newest turn; of one whose markup alone would fill the room, its newest messages."""
    newest = nodes[turn_starts([n.role for n in nodes])[-1] :]
    markup = MARKUP_SHARE * room.message_tokens
    if markup * len(newest) <= room.prompt_tokens:
        return newest
    few = newest[-max(1, room.prompt_tokens // markup) :]
    # Results go with their call, unless there is nothing else.
    return few[next((i for i, n in enumerate(few) if n.role != TOOL), 0) :]


@given(SYSTEMS, BLOCKS, NODES, ROOMS)
def test_the_newest_turn_always_stays(
    system: System, blocks: list[Summary], nodes: list[Node], room: Room
) -> None:
    context = assemble(system=system, blocks=blocks, nodes=nodes, room=room, tokenizer=TOKENIZER)
    newest = lasting(nodes, room)
    said = shown(context)[-len(newest) :]
    for text, n in zip(said, newest, strict=True):
        head, cut, tail = text.partition(CUT)
        assert text == n.text if not cut else n.text.startswith(head) and n.text.endswith(tail)


@given(SYSTEMS, BLOCKS, NODES, ROOMS)
def test_turns_go_before_summaries_and_summaries_before_the_middle_of_texts(
    system: System, blocks: list[Summary], nodes: list[Node], room: Room
) -> None:
    context = assemble(system=system, blocks=blocks, nodes=nodes, room=room, tokenizer=TOKENIZER)
    shape = context.shape
    n_turns = len(turn_starts([n.role for n in nodes]))
    assert 1 <= shape.verbatim_turns <= n_turns
    if shape.dropped_messages:
        assert not fits(system=system, blocks=blocks, nodes=nodes, room=room)
    if shape.summaries < len(blocks):
        assert shape.verbatim_turns == 1
        kept = nodes[shape.dropped_messages :]
        one_more = blocks[len(blocks) - shape.summaries - 1 :]
        assert not fits(system=system, blocks=one_more, nodes=kept, room=room)
    if any(CUT in m.text for m in context.messages):
        assert shape.verbatim_turns == 1
        assert shape.summaries == 0


@given(SYSTEMS, BLOCKS, NODES, ROOMS)
def test_what_goes_is_the_oldest(
    system: System, blocks: list[Summary], nodes: list[Node], room: Room
) -> None:
    context = assemble(system=system, blocks=blocks, nodes=nodes, room=room, tokenizer=TOKENIZER)
    assume(not any(CUT in m.text for m in context.messages))
    n = context.shape.dropped_messages
    assert shown(context) == [m.text for m in nodes[n:]]
    assert n in (*turn_starts([m.role for m in nodes]), len(nodes) - len(lasting(nodes, room)))
    head = context.messages[0].text if context.messages[0].role == "system" else ""
    for i, b in enumerate(blocks):
        assert (block_text(b.text) in head) == (i >= len(blocks) - context.shape.summaries)
    assert (LEFT_OUT.format(n=n) in head) == (n > 0)


def half(room: Room) -> int:
    """A step is at most half of what the turns may have."""
    return (room.prompt_tokens - room.base_tokens - NOTE_TOKENS) // 2


@given(
    st.lists(st.integers(1, 20), min_size=40, max_size=160),
    st.integers(1, 200),
    st.integers(120, 300),
)
def test_the_cut_of_a_growing_chat_moves_once_a_step(
    lengths: list[int], step: int, window: int
) -> None:
    room = Room(prompt_tokens=window, message_tokens=3, base_tokens=2, step_tokens=step)
    nodes = chat(*lengths)
    cuts = [dropped(nodes[:n], room) for n in range(1, len(nodes) + 1, 2)]
    assert cuts == sorted(cuts), "what was left out came back"
    total = sum(n + 3 for n in lengths)
    assert len(set(cuts)) <= total // min(step, half(room)) + 2


@given(
    st.lists(st.integers(1, 40), min_size=4, max_size=80),
    st.integers(1, 200),
    st.integers(120, 300),
)
@example([1, 1, 34, 23, 34], 1, 120)
def test_a_cut_takes_no_more_than_the_excess_a_step_and_a_turn(
    lengths: list[int], step: int, window: int
) -> None:
    room = Room(prompt_tokens=window, message_tokens=3, base_tokens=2, step_tokens=step)
    nodes = chat(*lengths)
    n = dropped(nodes, room)
    # The system message that the note of what was left out stands in has markup too.
    markup = room.base_tokens + NOTE_TOKENS + room.message_tokens
    total = sum(m.n_tokens + 3 for m in nodes) + markup
    gone = sum(m.n_tokens + 3 for m in nodes[:n])
    longest = max(sum(m.n_tokens + 3 for m in nodes[i : i + 2]) for i in range(len(nodes)))
    assert gone <= max(0, total - window + step + longest)


def test_the_cut_stays_while_the_excess_is_within_one_step() -> None:
    room = Room(prompt_tokens=116, message_tokens=0, base_tokens=0, step_tokens=50)
    nodes = chat(*[5] * 40)
    cuts = [dropped(nodes[:n], room) for n in range(2, 41, 2)]
    # 100 tokens fit; above them 50 go at once, above 150 another 50.
    assert cuts == [0] * 10 + [10] * 5 + [20] * 5


def test_a_step_leaves_half_of_what_a_long_system_prompt_leaves() -> None:
    """Else everything but the newest turn would go with every turn."""
    room = Room(prompt_tokens=316, message_tokens=0, base_tokens=0, step_tokens=250)
    kept = []
    for n in range(2, 81, 2):
        context = assemble(
            system=System("long", 200),
            blocks=(),
            nodes=chat(*[5] * n),
            room=room,
            tokenizer=TOKENIZER,
        )
        kept.append(context.shape.verbatim_tokens)
    assert min(kept[10:]) >= 50


@given(SYSTEMS, BLOCKS, NODES, ROOMS)
def test_a_policy_that_refuses_gets_all_or_an_error(
    system: System, blocks: list[Summary], nodes: list[Node], room: Room
) -> None:
    def refusing() -> Context:
        return assemble(
            system=system,
            blocks=blocks,
            nodes=nodes,
            room=room,
            tokenizer=TOKENIZER,
            may_drop=False,
        )

    if fits(system=system, blocks=blocks, nodes=nodes, room=room):
        assert refusing().shape.dropped_messages == 0
    else:
        with pytest.raises(DoesNotFit):
            refusing()


def test_a_long_note_is_cut_like_a_long_message() -> None:
    """A system prompt may bring whole files along; the question must get through."""
    told = replace(node(USER, "What does it say?", 2005), note="file " * 2000)
    room = Room(prompt_tokens=200, message_tokens=3, base_tokens=2, step_tokens=50)
    context = assemble(
        system=System("", 0), blocks=(), nodes=[told], room=room, tokenizer=TOKENIZER
    )
    text = context.messages[-1].text
    assert text.endswith("What does it say?")
    assert len(text.split()) <= 200


def test_a_note_outlives_the_turn_that_carried_it() -> None:
    """What the system prompt says must not be lost with the turn it was told in."""
    nodes = chat(*[10] * 20)
    nodes[2] = replace(nodes[2], note="Today is Tuesday.")
    room = Room(prompt_tokens=150, message_tokens=3, base_tokens=2, step_tokens=30)
    seen = []
    for n in range(3, 20, 2):
        context = assemble(
            system=System("Be kind.", 2), blocks=(), nodes=nodes[:n], room=room, tokenizer=TOKENIZER
        )
        assert "Today is Tuesday." in "".join(m.text for m in context.messages)
        seen.append((context.shape.dropped_messages, context.messages[0].parts))
    assert len({parts for _, parts in seen}) == len({n for n, _ in seen}), "it moves with the cut"


# cutting texts


@given(st.text(min_size=1, max_size=400), st.integers(1, 400), st.integers(0, 400))
def test_a_cut_text_keeps_its_beginning_and_its_end(text: str, n_tokens: int, most: int) -> None:
    cut = cut_text(text, n_tokens, most)
    if n_tokens <= most:
        assert cut == text
        return
    head, _, tail = cut.partition(CUT) if CUT not in text else ("", "", "")
    assert text.startswith(head)
    assert text.endswith(tail)
    assert len(head) >= len(tail) - 1
    assert len(cut) <= len(text) * most / n_tokens + len(CUT)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_a_cut_text_has_no_more_words_than_asked_for(n_tokens: int, most: int) -> None:
    """One token to each word of four letters and its space, the sign of the cut counted as six."""
    text = "word " * n_tokens
    assert len(cut_text(text, n_tokens, most).replace(CUT, " ").split()) <= max(
        0, most - 6
    ) + 2 or (n_tokens <= most)


@pytest.mark.parametrize("n", [1, 12, 4321, 98765, 1234567])
def test_the_note_fits_the_room_kept_for_it(n: int) -> None:
    counts = TiktokenCounter(margin=0)._count((LEFT_OUT.format(n=n), NO_USER))
    assert counts[0] <= NOTE_TOKENS
    # Never together with the note: what is dropped ends where a user speaks.
    assert counts[1] + 4 <= NOTE_TOKENS
