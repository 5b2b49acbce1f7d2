"""Windows that slid: recognised by what they hold, attached where they belong or not at all."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from memory.conversations import History, answered, recognise, without_store
from memory.overlap import ALONE_CHARS, CHARS_LEAST, Attachment, attach
from memory.store import Store
from memory.transcript import ASSISTANT, USER, Message, Transcript, chain

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def store(tmp_path: Path, anyio_backend: str) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "store.db")
    yield opened
    await opened.close()


class Words:
    """TokenCounter."""

    tokenizer = "words"

    async def count(self, texts: Sequence[str]) -> list[int]:
        return [len(t.split()) for t in texts]


def talk(*texts: str) -> list[Message]:
    return [Message(ASSISTANT if i % 2 else USER, text) for i, text in enumerate(texts)]


def chat(topic: str, turns: int) -> list[Message]:
    """Question and answer in turn; every message says where it stands."""
    return talk(
        *(
            f"{topic}: what about point number {i // 2} of the whole list?"
            if i % 2 == 0
            else f"{topic}: point number {i // 2} is settled, and here is how it was done."
            for i in range(2 * turns)
        )
    )


async def place(
    store: Store, owner: str, messages: list[Message], *, client_id: str | None = None
) -> History:
    transcript = Transcript("", tuple(messages))
    return await recognise(store, Words(), owner, transcript, system="", client_id=client_id)


async def keep(
    store: Store, owner: str, messages: list[Message], *, client_id: str | None = None
) -> str:
    """Stores a chat that ends with an answer, from its root; its conversation."""
    *asked, last = messages
    history = await without_store(Words(), owner, Transcript("", tuple(asked)), system="")
    nodes, _ = answered(
        history, text=last.text, n_tokens=5, token_ids=None, tokenizer="words", created_at=1.0
    )
    return await store.append(owner, nodes, conversation=None, client_id=client_id)


async def assert_attached(
    store: Store, owner: str, window: list[Message], whole: list[Message], **hint: str
) -> None:
    history = await place(store, owner, window, **hint)
    assert history.digests == chain(whole)


async def assert_alone(
    store: Store, owner: str, window: list[Message], *, client_id: str | None = None
) -> None:
    """The window is a conversation of its own."""
    history = await place(store, owner, window, client_id=client_id)
    assert history.digests == chain(window)


NEW = Message(USER, "And what comes next?")


# what is recognised


@pytest.mark.parametrize("dropped", range(1, 17))
async def test_a_window_is_recognised_wherever_it_begins(store: Store, dropped: int) -> None:
    """With a question or with an answer."""
    whole = chat("garden", 10)
    conversation = await keep(store, "ann", whole)
    history = await place(store, "ann", [*whole[dropped:], NEW])
    assert history.conversation == conversation
    assert history.digests == chain([*whole, NEW])
    assert [n.text for n in history.nodes] == [m.text for m in [*whole, NEW]]
    assert history.n_stored == len(whole)


async def test_a_window_with_much_that_is_new_is_recognised_by_what_is_old(store: Store) -> None:
    whole = chat("garden", 10)
    await keep(store, "ann", whole)
    edited = [*whole[6:12], *chat("another way", 3), NEW]
    await assert_attached(store, "ann", edited, [*whole[:6], *edited])


async def test_a_regenerated_answer_of_a_window_is_recognised(store: Store) -> None:
    whole = chat("garden", 10)
    await keep(store, "ann", whole)
    await assert_attached(store, "ann", whole[8:-1], whole[:-1])


async def test_the_answers_of_a_window_may_have_lost_their_white_space(store: Store) -> None:
    whole = chat("garden", 10)
    spaced = [Message(m.role, f" {m.text}\n") if m.role == ASSISTANT else m for m in whole]
    await keep(store, "ann", spaced)
    await assert_attached(store, "ann", [*whole[7:], NEW], [*whole, NEW])


async def test_a_window_is_found_on_the_branch_that_it_shows(store: Store) -> None:
    whole = chat("garden", 6)
    branch = [*whole[:6], *chat("the pond instead", 3)]
    conversation = await keep(store, "ann", whole)
    assert await keep(store, "ann", branch) == conversation
    await assert_attached(store, "ann", [*branch[5:], NEW], [*branch, NEW])
    await assert_attached(store, "ann", [*whole[5:], NEW], [*whole, NEW])


async def test_what_was_decided_is_logged(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    whole = chat("garden", 6)
    conversation = await keep(store, "ann", whole)
    with caplog.at_level(logging.INFO, "chatfold.memory"):
        await place(store, "ann", [*whole[4:], NEW])
    assert caplog.messages == [
        f"a window of 9 messages continues conversation {conversation}: 8 messages match"
    ]


# which of several


async def test_of_two_chats_with_common_text_the_right_one_is_found(store: Store) -> None:
    shared = chat("the usual questions", 3)
    one = [*chat("garden", 3), *shared, *chat("roses", 1)]
    two = [*chat("kitchen", 3), *shared, *chat("tiles", 1)]
    await keep(store, "ann", one)
    await keep(store, "ann", two)
    for whole in (one, two):
        await assert_attached(store, "ann", [*whole[6:], NEW], [*whole, NEW])


async def test_the_longest_run_wins_over_the_newest(store: Store) -> None:
    shared = chat("the usual questions", 3)
    long = [*chat("garden", 3), *shared]
    await keep(store, "ann", long)
    await keep(store, "ann", [*chat("kitchen", 3), *shared[:4]])
    await assert_attached(store, "ann", [*shared, NEW], [*long, NEW])


async def test_between_equal_runs_the_newest_wins(store: Store) -> None:
    shared = chat("the usual questions", 3)
    for topic in ("garden", "kitchen"):
        newest = [*chat(topic, 2), *shared]
        await keep(store, "ann", newest)
    await assert_attached(store, "ann", [*shared, NEW], [*newest, NEW])


async def test_a_repeated_ok_is_decided_by_the_longest_run_and_then_by_recency(
    store: Store,
) -> None:
    whole = [*chat("garden", 2), *talk("ok", "Fine, let us go on with the next step.") * 5]
    await keep(store, "ann", whole)
    last = Message(USER, "ok, and now the one with the nails and hammers")
    # Three of the five stand at two, three, four and five in a row: the newest three are meant.
    await assert_attached(store, "ann", [*whole[-6:], last], [*whole, last])
    other = [*chat("kitchen", 2), *whole[-4:]]
    await keep(store, "ann", other)
    # Five in a row stand only in the first chat, though the second is newer.
    await assert_attached(store, "ann", [*whole[-10:], last], [*whole, last])
    await assert_attached(store, "ann", [*whole[-4:], last], [*other, last])


async def test_long_text_that_another_chat_holds_too_does_not_hide_the_right_place(
    store: Store,
) -> None:
    """The new question was asked elsewhere before: a frequent prompt, pasted again."""
    pasted = Message(USER, "Please go through the following text and mend its spelling. " * 20)
    whole = chat("garden", 6)
    await keep(store, "ann", whole)
    await keep(store, "ann", [*chat("kitchen", 6), pasted, Message(ASSISTANT, "Done.")])
    await assert_attached(store, "ann", [*whole[7:], pasted], [*whole, pasted])


async def test_a_chance_match_with_the_root_of_another_chat_loses_to_a_longer_run(
    store: Store,
) -> None:
    whole = [*chat("garden", 3), *talk("hello", "Hello! How can I help?"), *chat("roses", 2)]
    await keep(store, "ann", whole)
    await keep(store, "ann", talk("hello", "Hello! How can I help?", "Nothing.", "Well then."))
    await assert_attached(store, "ann", [*whole[6:], NEW], [*whole, NEW])


async def test_a_chat_known_from_its_root_is_not_taken_for_a_window(store: Store) -> None:
    shared = chat("the usual questions", 3)
    await keep(store, "ann", [*chat("garden", 3), *shared, *chat("roses", 1)])
    await keep(store, "ann", shared)
    await assert_alone(store, "ann", [*shared, NEW])


# what is not enough


async def test_one_short_answer_is_no_evidence(store: Store) -> None:
    whole = [*chat("garden", 3), *talk("thanks", "You are welcome.")]
    await keep(store, "ann", whole)
    await assert_alone(store, "ann", [whole[-1], NEW])


async def test_short_messages_are_no_evidence_however_they_follow_each_other(
    store: Store,
) -> None:
    await keep(store, "ann", [*chat("garden", 3), *talk("ok", "Fine.", "yes", "Good.")])
    window = talk("ok", "Fine.", "yes", "Good.")
    assert sum(len(m.text) for m in window) < CHARS_LEAST
    await assert_alone(store, "ann", [*window, NEW])


async def test_a_long_question_alone_is_no_evidence(store: Store) -> None:
    """Whoever asks the same again in a new chat wants a new chat."""
    asked = Message(USER, "Write me a letter to the city about the noise. " * 10)
    await keep(store, "ann", [*chat("garden", 3), asked, Message(ASSISTANT, "Dear city, ...")])
    await assert_alone(store, "ann", [asked])
    await assert_alone(store, "ann", [asked, Message(ASSISTANT, "Another letter"), NEW])


async def test_one_long_answer_that_stands_nowhere_else_is_evidence(store: Store) -> None:
    long = Message(ASSISTANT, "The roses want sun, water and a good word now and then. " * 3)
    assert len(long.text) >= ALONE_CHARS
    whole = [*chat("garden", 3), Message(USER, "What do roses want?"), long]
    await keep(store, "ann", whole)
    await assert_attached(store, "ann", [long, NEW], [*whole, NEW])
    await keep(store, "ann", [*chat("kitchen", 3), Message(USER, "Once more?"), long])
    await assert_alone(store, "ann", [long, NEW])


async def test_a_new_chat_is_a_new_chat(store: Store) -> None:
    await keep(store, "ann", chat("garden", 6))
    for window in ([NEW], chat("kitchen", 3), [Message(ASSISTANT, "Hello!"), NEW], []):
        await assert_alone(store, "ann", window)


async def test_a_turn_deleted_in_the_middle_stays_deleted(store: Store) -> None:
    whole = chat("garden", 6)
    await keep(store, "ann", whole)
    for first in range(2, 8, 2):
        without = [*whole[:first], *whole[first + 2 :], NEW]
        await assert_alone(store, "ann", without)


async def test_a_deleted_turn_of_a_window_stays_deleted(store: Store) -> None:
    whole = chat("garden", 8)
    await keep(store, "ann", whole)
    without = [*whole[4:8], *whole[10:], NEW]
    await assert_attached(store, "ann", without, [*whole[:4], *without])


async def test_a_window_whose_first_message_was_edited_belongs_nowhere(store: Store) -> None:
    whole = chat("garden", 6)
    await keep(store, "ann", whole)
    await assert_alone(store, "ann", [Message(USER, "Something else"), *whole[5:], NEW])


# whose it is


async def test_another_owners_history_is_never_used(store: Store) -> None:
    whole = chat("garden", 6)
    theirs = await keep(store, "ann", whole, client_id="c1")
    for hint in (None, "c1"):
        window = [*whole[3:], NEW]
        history = await place(store, "bob", window, client_id=hint)
        assert history.conversation != theirs
        assert history.digests == chain(window)
        assert history.n_stored == 0


async def test_each_owner_finds_the_own_copy(store: Store) -> None:
    shared = chat("the usual questions", 4)
    anns, bobs = [*chat("garden", 2), *shared], [*chat("kitchen", 2), *shared]
    await keep(store, "ann", anns)
    await keep(store, "bob", bobs)
    await assert_attached(store, "ann", [*shared, NEW], [*anns, NEW])
    await assert_attached(store, "bob", [*shared, NEW], [*bobs, NEW])


# the client's own id


async def test_an_id_makes_little_evidence_enough(store: Store) -> None:
    whole = [*chat("garden", 3), *talk("thanks", "You are welcome.")]
    await keep(store, "ann", whole, client_id="c1")
    window = [whole[-1], NEW]
    await assert_alone(store, "ann", window)
    await assert_alone(store, "ann", window, client_id="unknown")
    await assert_attached(store, "ann", window, [*whole, NEW], client_id="c1")


async def test_an_id_decides_between_equals(store: Store) -> None:
    shared = chat("the usual questions", 3)
    one, two = [*chat("garden", 2), *shared], [*chat("kitchen", 2), *shared]
    await keep(store, "ann", one, client_id="c1")
    await keep(store, "ann", two, client_id="c2")
    window = [*shared, NEW]
    await assert_attached(store, "ann", window, [*one, NEW], client_id="c1")
    await assert_attached(store, "ann", window, [*two, NEW], client_id="c2")


async def test_an_id_that_contradicts_the_content_loses(store: Store) -> None:
    garden, kitchen = chat("garden", 6), chat("kitchen", 6)
    await keep(store, "ann", garden, client_id="c1")
    await keep(store, "ann", kitchen, client_id="c2")
    await assert_attached(store, "ann", [*garden[3:], NEW], [*garden, NEW], client_id="c2")
    await assert_attached(store, "ann", [*garden, NEW], [*garden, NEW], client_id="c2")
    await assert_alone(store, "ann", [*chat("cellar", 2), NEW], client_id="c2")


async def test_a_longer_run_beats_the_id(store: Store) -> None:
    shared = chat("the usual questions", 3)
    long, short = [*chat("garden", 2), *shared], [*chat("kitchen", 2), *shared[:2]]
    await keep(store, "ann", long, client_id="c1")
    await keep(store, "ann", short, client_id="c2")
    await assert_attached(store, "ann", [*shared, NEW], [*long, NEW], client_id="c2")


# the answer itself


async def test_an_attachment_names_where_the_window_goes_on(store: Store) -> None:
    whole = chat("garden", 6)
    conversation = await keep(store, "ann", whole)
    found = await attach(store, "ann", [*whole[5:], NEW], known=0, hinted=None)
    assert found == Attachment(conversation, chain(whole)[4], 7)
    assert await attach(store, "ann", [*whole[5:], NEW], known=7, hinted=None) is None
