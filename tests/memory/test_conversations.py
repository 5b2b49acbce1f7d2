"""From a transcript to its place in the tree, and from an answer to what is stored of it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.context import Context, DoesNotFit, Room
from memory.conversations import (
    ANSWER_TOKENS_LEAST,
    Assembled,
    History,
    answered,
    context_for,
    conversation_id,
    recognise,
    revisit,
    room_for,
    without_store,
)
from memory.policy import Policy
from memory.ports import Budget
from memory.records import EXTRACTIVE, Summary
from memory.store import Store
from memory.transcript import ASSISTANT, ROOT, TOOL, USER, Message, Transcript, chain, extend

POLICY = Policy(name="test", high=200, low=90)
ROOMY = Room(prompt_tokens=10_000, message_tokens=3, base_tokens=2, step_tokens=100)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def store(tmp_path: Path, anyio_backend: str) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "store.db")
    yield opened
    await opened.close()


class Words:
    """TokenCounter: counts `factor` tokens to a word, and remembers what it was asked."""

    def __init__(self, tokenizer: str = "words", factor: int = 1) -> None:
        self.tokenizer = tokenizer
        self.factor = factor
        self.asked: list[str] = []

    async def count(self, texts: Sequence[str]) -> list[int]:
        self.asked += texts
        return [len(t.split()) * self.factor for t in texts]

    async def count_tools(self, tools: str) -> int:
        return len(tools.split()) * self.factor


def talk(*texts: str) -> list[Message]:
    return [Message(ASSISTANT if i % 2 else USER, text) for i, text in enumerate(texts)]


def ids(*tokens: int) -> bytes:
    return b"".join(t.to_bytes(4, "little") for t in tokens)


async def place(
    store: Store,
    messages: Sequence[Message],
    *,
    owner: str = "ann",
    system: str = "Be kind.",
    counter: Words | None = None,
) -> History:
    transcript = Transcript(system, tuple(messages))
    return await recognise(store, counter or Words(), owner, transcript, system=system)


async def answer(
    store: Store, messages: Sequence[Message], text: str, *, token_ids: bytes | None = None
) -> History:
    """One request and its answer, as the proxy serves it; its history."""
    history = await place(store, messages)
    nodes, _ = answered(
        history,
        text=text,
        n_tokens=len(text.split()),
        token_ids=token_ids,
        tokenizer="words",
        created_at=1.0,
    )
    if nodes:
        await store.append("ann", nodes, conversation=history.conversation)
    return history


async def chat(store: Store, *texts: str) -> list[Message]:
    """A whole chat, led turn by turn."""
    messages: list[Message] = []
    for question, text in zip(texts[::2], texts[1::2], strict=True):
        messages.append(Message(USER, question))
        await answer(store, messages, text)
        messages.append(Message(ASSISTANT, text))
    return messages


async def block(
    store: Store, history: History, first: int, last: int, *, active: bool, n_tokens: int = 5
) -> Summary:
    summary = await store.add_summary(
        "ann",
        Summary(
            id=0,
            conversation=history.conversation,
            first_depth=first,
            last_depth=last,
            first_digest=history.digests[first],
            last_digest=history.digests[last],
            rank=0,
            parents=(),
            text=f"Messages {first} to {last}.",
            n_tokens=n_tokens,
            tokenizer="words",
            made_by=EXTRACTIVE,
            model="",
            policy_digest="",
            prompt_version="",
            failed_checks=(),
            duration_s=0.0,
            created_at=0.0,
        ),
    )
    if active:
        await store.activate("ann", [summary.id])
    return summary


def send(history: History, room: Room = ROOMY, policy: Policy = POLICY) -> Assembled:
    return context_for(history, policy, room, tokenizer="words")


def said(context: Context) -> list[tuple[str, str]]:
    return [(m.role, m.text) for m in context.messages if m.role != "system"]


async def texts_of(store: Store, messages: Sequence[Message]) -> list[str]:
    return [n.text for n in await store.nodes("ann", chain(messages))]


# what a client does


@pytest.mark.anyio
async def test_a_first_question_is_a_conversation_of_its_own(store: Store) -> None:
    history = await place(store, talk("hello"))
    assert history.conversation == conversation_id("ann", chain(talk("hello"))[0])
    assert (history.n_stored, len(history.new)) == (0, 1)
    assert history.active == history.written == ()


@pytest.mark.anyio
async def test_the_next_question_finds_all_that_was_said(store: Store) -> None:
    messages = await chat(store, "hello", "Hi.", "how are you?", "Fine.")
    history = await place(store, [*messages, Message(USER, "good")])
    assert history.n_stored == 4
    assert [n.text for n in history.new] == ["good"]
    assert said(send(history).context) == [(m.role, m.text) for m in history.nodes]


@pytest.mark.anyio
async def test_a_conversation_has_one_name_before_and_after_it_is_stored(store: Store) -> None:
    before = await answer(store, talk("hello"), "Hi.")
    after = await place(store, talk("hello", "Hi.", "well?"))
    assert before.conversation == after.conversation


def test_names_of_conversations_do_not_say_whose_they_are() -> None:
    root = chain(talk("hello"))[0]
    assert conversation_id("ann", root) != conversation_id("bob", root)
    assert "ann" not in conversation_id("ann", root)
    assert conversation_id("ann", root) == conversation_id("ann", bytes(root))


@pytest.mark.anyio
async def test_an_answer_given_anew_stands_beside_the_first(store: Store) -> None:
    messages = await chat(store, "hello", "Hi.", "a joke?", "Knock knock.")
    history = await answer(store, messages[:-1], "Two fish in a tank.")
    assert history.new == ()
    assert history.n_stored == 3
    other = [*messages[:-1], Message(ASSISTANT, "Two fish in a tank.")]
    for branch in (messages, other):
        found = await place(store, [*branch, Message(USER, "haha")])
        assert found.n_stored == 4
        assert found.conversation == history.conversation
        assert [n.text for n in found.nodes[:4]] == [m.text for m in branch]


@pytest.mark.anyio
async def test_an_edited_question_goes_on_from_what_was_before_it(store: Store) -> None:
    messages = await chat(store, "hello", "Hi.", "cats?", "Cats.", "more", "More cats.")
    history = await place(store, [*messages[:2], Message(USER, "dogs?")])
    assert history.n_stored == 2
    assert [n.text for n in history.new] == ["dogs?"]
    assert history.conversation == (await place(store, messages)).conversation


@pytest.mark.anyio
async def test_an_edited_answer_is_a_branch_with_the_edited_text(store: Store) -> None:
    messages = await chat(store, "hello", "Hi.", "cats?", "Cats are nice.")
    edited = [*messages[:3], Message(ASSISTANT, "Cats are cruel."), Message(USER, "why?")]
    history = await answer(store, edited, "They play with mice.")
    assert history.n_stored == 3
    assert [n.text for n in history.new] == ["Cats are cruel.", "why?"]
    again = await place(store, [*edited, Message(ASSISTANT, "They play with mice.")])
    assert again.n_stored == 6
    assert [n.text for n in again.nodes][3] == "Cats are cruel."
    assert await texts_of(store, messages) == ["hello", "Hi.", "cats?", "Cats are nice."]


@pytest.mark.anyio
async def test_an_edit_of_the_first_question_is_another_conversation(store: Store) -> None:
    messages = await chat(store, "hello", "Hi.")
    history = await place(store, talk("good day"))
    assert history.conversation != (await place(store, messages)).conversation


@pytest.mark.anyio
async def test_summaries_hold_on_every_branch_that_leaves_behind_them(store: Store) -> None:
    messages = await chat(store, *(f"text {i}" for i in range(12)))
    whole = await place(store, messages)
    first = await block(store, whole, 0, 3, active=True)
    second = await block(store, whole, 4, 7, active=True)
    for at, blocks in ((12, 2), (8, 2), (6, 1), (4, 1), (2, 0)):
        branch = await place(store, [*messages[:at], Message(USER, "another way")])
        assert [b.id for b in branch.active] == [first.id, second.id][:blocks]
        assert branch.nodes[0].depth == 4 * blocks
        assert said(send(branch).context)[-1] == (USER, "another way")


@pytest.mark.anyio
async def test_two_questions_in_a_row_are_one_turn_and_both_are_stored(store: Store) -> None:
    messages = await chat(store, "hello", "Hi.")
    asked = [*messages, Message(USER, "are you"), Message(USER, "there?")]
    history = await answer(store, asked, "Yes.")
    assert [n.text for n in history.new] == ["are you", "there?"]
    assert said(send(history).context)[-1] == (USER, "are you\n\nthere?")
    again = await place(store, [*asked, Message(ASSISTANT, "Yes."), Message(USER, "good")])
    assert again.n_stored == 5


@pytest.mark.anyio
async def test_a_question_that_got_no_answer_can_be_asked_again(store: Store) -> None:
    messages = await chat(store, "hello", "Hi.")
    asked = [*messages, Message(USER, "well?")]
    await answer(store, asked, "  \n")
    assert (await store.status())["messages"] == 2
    history = await answer(store, asked, "Well.")
    assert history.n_stored == 2
    assert (await store.status())["messages"] == 4


@pytest.mark.anyio
@pytest.mark.parametrize("text", ["", " ", "\n\t"])
async def test_an_empty_answer_stores_nothing(store: Store, text: str) -> None:
    history = await place(store, talk("hello"))
    nodes, digests = answered(
        history, text=text, n_tokens=1, token_ids=None, tokenizer="words", created_at=1.0
    )
    assert nodes == ()
    assert digests == history.digests


@pytest.mark.anyio
async def test_an_answer_may_come_back_without_its_white_space(store: Store) -> None:
    await answer(store, talk("hello"), " Hi.\n", token_ids=ids(7, 8))
    history = await place(store, talk("hello", "Hi.", "well?"))
    assert history.n_stored == 2
    assert history.nodes[1].text == " Hi.\n", "as the model wrote it"
    assert send(history).context.messages[2].token_ids == ids(7, 8)


@pytest.mark.anyio
async def test_text_that_utf8_cannot_hold_is_found_again(store: Store) -> None:
    messages = await chat(store, "broken \ud83c emoji", "I see.", "and \udf88", "That too.")
    history = await place(store, [*messages, Message(USER, "well?")])
    assert history.n_stored == 4


# an answer that goes on


@pytest.mark.anyio
async def test_an_answer_that_goes_on_is_stored_as_one(store: Store) -> None:
    partial = talk("count", "one two")
    history = await answer(store, partial, " three")
    assert send(history).context.continues
    whole = talk("count", "one two three")
    assert await texts_of(store, whole) == ["count", "one two three"]
    assert await texts_of(store, partial) == ["count"], "nothing was known of the part"
    again = await place(store, [*whole, Message(USER, "good")])
    assert again.n_stored == 2


@pytest.mark.anyio
async def test_a_stored_answer_that_goes_on_stands_beside_its_beginning(store: Store) -> None:
    await answer(store, talk("count"), "one two", token_ids=ids(1, 2))
    history = await answer(store, talk("count", "one two"), " three", token_ids=ids(3))
    assert history.n_stored == 2
    joined = (await store.nodes("ann", chain(talk("count", "one two three"))))[-1]
    assert joined.text == "one two three"
    assert joined.token_ids == ids(1, 2, 3)
    assert joined.n_tokens == 3
    assert joined.depth == 1
    assert joined.parent == chain(talk("count"))[0]
    assert await texts_of(store, talk("count", "one two")) == ["count", "one two"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("first", "second", "joined"),
    [(ids(1), ids(2), ids(1, 2)), (None, ids(2), None), (ids(1), None, None)],
)
async def test_tokens_are_joined_only_where_both_parts_are_known(
    store: Store, first: bytes | None, second: bytes | None, joined: bytes | None
) -> None:
    await answer(store, talk("count"), "one", token_ids=first)
    await answer(store, talk("count", "one"), " two", token_ids=second)
    node = (await store.nodes("ann", chain(talk("count", "one two"))))[-1]
    assert node.token_ids == joined


@pytest.mark.anyio
async def test_tokens_of_two_models_are_not_joined(store: Store) -> None:
    await answer(store, talk("count"), "one", token_ids=ids(1))
    history = await place(store, talk("count", "one"), counter=Words("other"))
    nodes, _ = answered(
        history, text=" two", n_tokens=1, token_ids=ids(9), tokenizer="other", created_at=1.0
    )
    assert nodes[-1].token_ids is None


@pytest.mark.anyio
async def test_an_answer_that_goes_on_from_text_is_counted_as_it_will_be_sent(store: Store) -> None:
    """The tokens that were generated are not those that the whole has as text."""
    history = await place(store, talk("count", "one"))
    nodes, _ = answered(
        history, text=" two three", n_tokens=9, token_ids=None, tokenizer="words", created_at=1.0
    )
    assert nodes[-1].tokenizer == "", "so it is counted when it is next used"
    await store.append("ann", nodes, conversation=history.conversation)
    assert (await place(store, talk("count", "one two three"))).nodes[-1].n_tokens == 3


@pytest.mark.anyio
async def test_an_answer_can_go_on_twice(store: Store) -> None:
    await answer(store, talk("count"), "one", token_ids=ids(1))
    await answer(store, talk("count", "one"), " two", token_ids=ids(2))
    await answer(store, talk("count", "one two"), " three", token_ids=ids(3))
    node = (await store.nodes("ann", chain(talk("count", "one two three"))))[-1]
    assert node.token_ids == ids(1, 2, 3)


@pytest.mark.anyio
async def test_an_answer_that_does_not_go_on_changes_nothing(store: Store) -> None:
    await answer(store, talk("count"), "one")
    await answer(store, talk("count", "one"), "")
    assert (await store.status())["messages"] == 2


@pytest.mark.anyio
async def test_an_answer_without_a_question_can_go_on(store: Store) -> None:
    history = await answer(store, [Message(ASSISTANT, "Once upon")], " a time.")
    assert [m.role for m in send(history).context.messages][-2:] == [USER, ASSISTANT]
    whole = [Message(ASSISTANT, "Once upon a time.")]
    assert await texts_of(store, whole) == ["Once upon a time."]
    again = await place(store, [*whole, Message(USER, "and then?")])
    assert again.n_stored == 1


# what is counted


@pytest.mark.anyio
async def test_what_is_stored_is_not_counted_again(store: Store) -> None:
    messages = await chat(store, "hello there", "Hi.")
    counter = Words()
    await place(store, [*messages, Message(USER, "and now")], counter=counter)
    assert counter.asked == ["Be kind.", "and now"]


@pytest.mark.anyio
async def test_another_models_counts_and_tokens_are_not_used(store: Store) -> None:
    await answer(store, talk("hello there"), "Hi you.", token_ids=ids(1, 2))
    messages = talk("hello there", "Hi you.", "and now")
    history = await place(store, messages, counter=Words("other", factor=10))
    assert [n.n_tokens for n in history.nodes] == [20, 20, 20]
    assert {n.tokenizer for n in history.nodes} == {"other"}
    assert [n.token_ids for n in history.nodes] == [None] * 3
    back = await place(store, messages)
    assert back.nodes[1].token_ids == ids(1, 2)


@pytest.mark.anyio
async def test_an_answer_that_was_cut_off_is_counted_when_it_is_next_used(store: Store) -> None:
    history = await place(store, talk("hello"))
    nodes, _ = answered(
        history, text="one two three", n_tokens=-1, token_ids=None, tokenizer="", created_at=1.0
    )
    await store.append("ann", nodes, conversation=history.conversation)
    again = await place(store, talk("hello", "one two three", "go on"))
    assert [n.n_tokens for n in again.nodes] == [1, 3, 2]


@pytest.mark.anyio
async def test_a_note_is_counted_with_its_message(store: Store) -> None:
    messages = talk("hello", "Hi.", "and now")
    await answer(store, messages[:1], "Hi.")
    history = await place(store, messages, system="Be kind. Today is Monday.")
    assert history.system.text == "Be kind."
    assert history.nodes[-1].note == "Today is Monday."
    assert history.nodes[-1].n_tokens == 5, "[Today is Monday.] and now"


# without memory

MESSAGES = st.lists(
    st.builds(
        Message,
        st.sampled_from([USER, ASSISTANT]),
        st.text(st.characters(), max_size=8) | st.sampled_from(["ok", ""]),
    ),
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(MESSAGES, st.sampled_from(["", "Be kind.", "Be kind. Today is Monday."]))
def test_without_a_store_a_chat_is_what_it_is_with_an_empty_one(
    messages: list[Message], system: str
) -> None:
    async def both() -> None:
        transcript = Transcript(system, tuple(messages))
        bare = await without_store(Words(), "ann", transcript, system=system)
        with tempfile.TemporaryDirectory() as folder:
            store = await Store.open(Path(folder) / "store.db")
            for split in (True, False):
                found = await recognise(
                    store, Words(), "ann", transcript, system=system, split=split
                )
                nodes = tuple(replace(n, front=None) for n in found.nodes)
                assert replace(found, nodes=nodes, placed=False) == bare
                assert send(found) == send(bare)
            await store.close()

    asyncio.run(both())


@settings(max_examples=40, deadline=None)
@given(MESSAGES, st.text(st.characters(), min_size=1, max_size=8))
def test_what_was_answered_is_found_again_whole(messages: list[Message], text: str) -> None:
    """Whatever was sent: the client's next transcript is known to its last message."""

    async def turn() -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = await Store.open(Path(folder) / "store.db")
            await answer(store, messages, text)
            said = list(messages)
            continued = bool(said) and said[-1].role == ASSISTANT
            before = said.pop().text if continued else ""
            said.append(Message(ASSISTANT, before + text))
            history = await place(store, said)
            assert history.n_stored == (len(said) if text.strip() else 0)
            assert history.digests == chain(said)
            await store.close()

    asyncio.run(turn())


@pytest.mark.anyio
async def test_a_path_can_be_looked_at_again_as_it_is_stored(store: Store) -> None:
    messages = await chat(store, "hello", "Hi.", "well?", "Well.")
    history = await place(store, messages)
    again = await revisit(
        store, Words(), "ann", history.conversation, history.digests, system="Be kind."
    )
    assert again == history


# what is sent


@pytest.mark.anyio
async def test_a_summary_that_is_not_warm_is_used_only_when_nothing_else_fits(
    store: Store,
) -> None:
    messages = await chat(store, *(f"text number {i} of many" for i in range(12)))
    whole = await place(store, messages)
    first = await block(store, whole, 0, 3, active=True)
    second = await block(store, whole, 4, 7, active=False)
    history = await place(store, [*messages, Message(USER, "and now")])
    assert [b.id for b in history.active] == [first.id]
    assert [b.id for b in history.written] == [first.id, second.id]
    sent = send(history)
    assert (sent.context.shape.summaries, sent.activates) == (1, ())
    small = replace(ROOMY, prompt_tokens=80)
    sent = send(history, small)
    assert (sent.context.shape.summaries, sent.activates) == (2, (second.id,))
    assert sent.context.shape.dropped_messages == 0
    assert said(sent.context)[0] == (USER, "text number 8 of many")


@pytest.mark.anyio
async def test_a_note_that_such_a_summary_hides_is_told_behind_it(store: Store) -> None:
    messages: list[Message] = []
    systems = ["Be kind.", "Be kind. Today is Monday.", *["Be kind. Today is Monday."] * 4]
    for i, system in enumerate(systems):
        messages.append(Message(USER, f"question number {i} of many"))
        history = await place(store, messages, system=system)
        nodes, _ = answered(
            history, text="Yes.", n_tokens=1, token_ids=None, tokenizer="words", created_at=1.0
        )
        await store.append("ann", nodes, conversation=history.conversation)
        messages.append(Message(ASSISTANT, "Yes."))
    await block(store, await place(store, messages), 0, 7, active=False)
    asked = [*messages, Message(USER, "and now")]
    history = await place(store, asked, system=systems[-1])
    roomy = send(history).context
    small = send(history, replace(ROOMY, prompt_tokens=70)).context
    assert (roomy.shape.summaries, small.shape.summaries) == (0, 1)
    for context in (roomy, small):
        assert "".join(m.text for m in context.messages).count("Today is Monday.") == 1


@pytest.mark.anyio
async def test_a_policy_that_refuses_says_so(store: Store) -> None:
    history = await place(store, talk("word " * 100))
    small = replace(ROOMY, prompt_tokens=50)
    with pytest.raises(DoesNotFit):
        send(history, small, replace(POLICY, overflow="refuse"))
    assert send(history, small).context.messages


@pytest.mark.anyio
async def test_what_is_behind_the_summaries_follows_them(store: Store) -> None:
    messages = await chat(store, *(f"text {i}" for i in range(8)))
    whole = await place(store, messages)
    await block(store, whole, 0, 1, active=True)
    await block(store, whole, 2, 5, active=False)
    history = await place(store, messages)
    assert [n.depth for n in history.behind(history.active)] == [2, 3, 4, 5, 6, 7]
    assert [n.depth for n in history.behind(history.written)] == [6, 7]


@pytest.mark.parametrize(
    ("max_tokens", "spare", "prompt"),
    [
        (None, 0, 800),  # the policy's answer
        (50, 0, 950),  # a request that asks for less gets less
        (5000, 0, 800),  # and for more no more
        (0, 0, 1000 - ANSWER_TOKENS_LEAST),
        (None, 100, 700),
        (None, 5000, 1),
    ],
)
def test_the_room_for_a_prompt_is_what_the_answer_leaves(
    max_tokens: int | None, spare: int, prompt: int
) -> None:
    limits = Policy(answer=200).limits(1000)
    room = room_for(Budget(1000, 3, 2), limits, max_tokens=max_tokens, spare_tokens=spare)
    assert room == Room(prompt, 3, 2, limits.step_tokens)


@pytest.mark.anyio
async def test_an_answer_is_stored_under_the_last_message(store: Store) -> None:
    history = await place(store, talk("hello"))
    nodes, digests = answered(
        history, text="Hi.", n_tokens=4, token_ids=ids(1), tokenizer="words", created_at=7.0
    )
    question, reply = nodes
    assert (question.parent, reply.parent) == (ROOT, question.digest)
    assert reply.digest == digests[-1] == extend(question.digest, Message(ASSISTANT, "Hi."))
    assert {n.created_at for n in nodes} == {7.0}
    assert (reply.n_tokens, reply.token_ids, reply.tokenizer) == (4, ids(1), "words")
    assert question.front == "Be kind."


# tools

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.mark.anyio
async def test_a_turn_with_tools_is_found_again_step_by_step(store: Store) -> None:
    asked = [Message(USER, "The weather in Paris?")]
    await answer(store, asked, CALL, token_ids=ids(7, 8))
    resulted = [*asked, Message(ASSISTANT, CALL), Message(TOOL, "sunny")]
    history = await place(store, resulted)
    assert (history.n_stored, len(history.new)) == (2, 1)
    assert history.nodes[1].token_ids == ids(7, 8)
    await answer(store, resulted, "It is sunny.")
    later = [*resulted, Message(ASSISTANT, "It is sunny."), Message(USER, "And Rome?")]
    history = await place(store, later)
    assert history.n_stored == 4
    assert [n.role for n in history.nodes] == [USER, ASSISTANT, TOOL, ASSISTANT, USER]


@pytest.mark.anyio
async def test_a_tools_result_finds_what_its_turn_was_told_though_the_prompt_has_changed(
    store: Store,
) -> None:
    asked, told = [Message(USER, "Is the rent due?")], "Be kind.\nIt is 10:00:01.\nRent: 900."
    history = await recognise(store, Words(), "ann", Transcript(told, tuple(asked)), system=told)
    nodes, _ = answered(
        history, text=CALL, n_tokens=2, token_ids=None, tokenizer="words", created_at=1.0
    )
    await store.append("ann", nodes, conversation=history.conversation)
    resulted = (*asked, Message(ASSISTANT, CALL), Message(TOOL, "no"))
    later = told.replace(":01", ":04")
    history = await recognise(store, Words(), "ann", Transcript(later, resulted), system=later)
    assert history.system.text == told
    assert not any(n.note for n in history.nodes)


@pytest.mark.anyio
async def test_a_result_is_counted_with_the_words_around_it(store: Store) -> None:
    counter = Words()
    await place(store, [*talk("hi", CALL), Message(TOOL, "sunny")], counter=counter)
    assert "<tool_response>\nsunny\n</tool_response>" in counter.asked


@pytest.mark.anyio
async def test_tools_stand_in_the_context_and_are_counted(store: Store) -> None:
    tools = '[{"name": "one two three"}]'
    transcript = Transcript("Be kind.", tuple(talk("hi")))
    history = await recognise(store, Words(), "ann", transcript, system="Be kind.", tools=tools)
    assert history.system.tools_tokens == len(tools.split())
    context = context_for(history, POLICY, ROOMY, tokenizer="words").context
    assert context.tools == tools
    without = await place(store, talk("hi"))
    assert context_for(without, POLICY, ROOMY, tokenizer="words").context.tools == ""


@pytest.mark.anyio
async def test_a_system_prompt_that_changes_between_call_and_result_is_not_told_twice(
    store: Store,
) -> None:
    """The turn goes on: what stands before its question would break the prefix if it changed."""
    first = await place(store, talk("hi"), system="Be kind. Now: 10:00.")
    nodes, _ = answered(
        first, text="ok", n_tokens=1, token_ids=None, tokenizer="words", created_at=1.0
    )
    await store.append("ann", nodes, conversation=first.conversation)
    asked = talk("hi", "ok", "weather?")
    second = await place(store, asked, system="Be kind. Now: 10:01.")
    nodes, _ = answered(
        second, text=CALL, n_tokens=1, token_ids=None, tokenizer="words", created_at=1.0
    )
    await store.append("ann", nodes, conversation=second.conversation)
    resulted = [*asked, Message(ASSISTANT, CALL), Message(TOOL, "sunny")]
    third = await place(store, resulted, system="Be kind. Now: 10:02.")
    before = context_for(second, POLICY, ROOMY, tokenizer="words").context.messages
    after = context_for(third, POLICY, ROOMY, tokenizer="words").context.messages
    assert after[: len(before)] == before
