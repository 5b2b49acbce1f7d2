"""Chains and turns: what makes two histories the same."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.transcript import (
    ASSISTANT,
    DIGEST_BYTES,
    ROOT,
    TOOL,
    USER,
    Message,
    Transcript,
    canonical,
    chain,
    extend,
    message_digest,
    turn_starts,
)

ROLES = st.sampled_from([USER, ASSISTANT, TOOL])
# Lone surrogates too: JSON may hold them, and UTF-8 cannot.
TEXTS = st.text(st.characters(), max_size=12) | st.sampled_from(["", " ", "ok", "\ud800", "u", "a"])
MESSAGES = st.lists(st.builds(Message, ROLES, TEXTS), max_size=12)
BLANKS = st.text(st.sampled_from(" \t\r\n\u3000\u00a0"), max_size=3)


# chains


@given(MESSAGES, MESSAGES)
def test_a_chain_does_not_depend_on_what_follows(head: list[Message], tail: list[Message]) -> None:
    assert chain(head + tail)[: len(head)] == chain(head)


@given(MESSAGES, MESSAGES)
def test_a_chain_goes_on_from_any_of_its_digests(head: list[Message], tail: list[Message]) -> None:
    whole = chain(head + tail)
    parent = whole[len(head) - 1] if head else ROOT
    assert chain(tail, parent) == whole[len(head) :]


@given(MESSAGES)
def test_a_chain_is_every_message_hashed_onto_the_one_before(messages: list[Message]) -> None:
    digests = list(accumulate(messages, extend, initial=ROOT))[1:]
    assert chain(messages) == tuple(digests)
    assert all(len(d) == DIGEST_BYTES for d in digests)


@given(MESSAGES, MESSAGES)
def test_chains_are_equal_where_the_histories_are_and_nowhere_else(
    one: list[Message], other: list[Message]
) -> None:
    def known(messages: list[Message]) -> list[tuple[str, str]]:
        return [(m.role, canonical(m)) for m in messages]

    for i, (a, b) in enumerate(zip(chain(one), chain(other), strict=False)):
        assert (a == b) == (known(one[: i + 1]) == known(other[: i + 1]))


@given(st.lists(st.builds(Message, ROLES, TEXTS), min_size=2, max_size=8), st.data())
def test_the_same_messages_in_another_order_are_another_history(
    messages: list[Message], data: st.DataObject
) -> None:
    i = data.draw(st.integers(0, len(messages) - 2))
    a, b = messages[i], messages[i + 1]
    swapped = [*messages[:i], b, a, *messages[i + 2 :]]
    same = (a.role, canonical(a)) == (b.role, canonical(b))
    assert (chain(swapped)[-1] == chain(messages)[-1]) == same


@given(TEXTS, TEXTS)
def test_no_text_can_imitate_another_role(text: str, other: str) -> None:
    user, assistant = Message(USER, text), Message(ASSISTANT, other)
    assert extend(ROOT, user) != extend(ROOT, assistant)
    assert message_digest(user) != message_digest(assistant)


@given(TEXTS, TEXTS)
def test_no_text_can_imitate_two_messages(text: str, other: str) -> None:
    # Written out as a transcript, as a client without structure would.
    for joined in (text + other, f"{text}u{other}", f"{text}\nuser: {other}", f"{text}\0{other}"):
        one = chain([Message(USER, joined)])
        two = chain([Message(USER, text), Message(USER, other)])
        assert one[-1] != two[-1]


@given(TEXTS, BLANKS, BLANKS)
def test_white_space_around_an_answer_does_not_count(text: str, before: str, after: str) -> None:
    plain, padded = Message(ASSISTANT, text), Message(ASSISTANT, before + text + after)
    assert extend(ROOT, plain) == extend(ROOT, padded)
    assert message_digest(plain) == message_digest(padded)


def test_white_space_inside_an_answer_counts() -> None:
    assert extend(ROOT, Message(ASSISTANT, "a b")) != extend(ROOT, Message(ASSISTANT, "a  b"))


@given(TEXTS, BLANKS)
def test_white_space_around_a_question_counts(text: str, blanks: str) -> None:
    padded = text + blanks
    same = extend(ROOT, Message(USER, text)) == extend(ROOT, Message(USER, padded))
    assert same == (padded == text)
    assert canonical(Message(USER, padded)) == padded


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\u00e9", "e\u0301"),  # composed and decomposed
        ("\ud800", "\ud801"),  # lone surrogates
        ("\ud83c\udf88", "\U0001f388"),  # two lone surrogates are not the character they spell
        ("\ud800", "\ufffd"),  # nor the sign that stands in for them
        ("Ａ", "A"),  # full width
        ("a\u200b", "a"),  # zero width space
        ("x\0", "x"),
    ],
)
def test_texts_that_look_alike_are_different_messages(one: str, other: str) -> None:
    for role in (USER, ASSISTANT):
        assert extend(ROOT, Message(role, one)) != extend(ROOT, Message(role, other))


def test_digests_are_what_they_were_when_stores_were_written() -> None:
    """A change here makes every stored conversation unrecognisable."""
    digests = chain(
        [Message(USER, "Hello"), Message(ASSISTANT, " Hi! "), Message(USER, "京都 \ud800")]
    )
    assert [d.hex() for d in digests] == [
        "6072788bab9a998f10de5160a8a1619b85a5fc02",
        "43a44de3a254be187acdd474ebbe33fae2799b3f",
        "5fa11714eaad5b99fcc5712d2e02aa08b423f141",
    ]


# turns


def naive_turns(roles: list[str]) -> list[list[str]]:
    """A turn is a user message and all that follows it up to the next user message; questions that
    got no answer belong to the turn of the next."""
    turns: list[list[str]] = []
    for role in roles:
        if not turns or (role == USER and turns[-1][-1] != USER):
            turns.append([])
        turns[-1].append(role)
    return turns


@given(st.lists(ROLES, min_size=1, max_size=30))
def test_turns_are_those_that_a_reader_would_count(roles: list[str]) -> None:
    starts = turn_starts(roles)
    ends = [*starts[1:], len(roles)]
    assert [roles[a:b] for a, b in zip(starts, ends, strict=True)] == naive_turns(roles)


@given(st.lists(ROLES, min_size=1, max_size=30))
def test_every_turn_but_the_first_begins_with_the_user(roles: list[str]) -> None:
    starts = turn_starts(roles)
    assert starts[0] == 0
    assert all(a < b for a, b in pairwise(starts))
    assert all(roles[i] == USER and roles[i - 1] != USER for i in starts[1:])


@given(st.lists(ROLES, max_size=20), st.lists(ROLES, max_size=20))
def test_turns_stay_where_they_are_as_the_chat_grows(head: list[str], tail: list[str]) -> None:
    assert turn_starts(head + tail)[: len(turn_starts(head))] == turn_starts(head)


def test_no_messages_are_no_turns() -> None:
    assert turn_starts([]) == ()


# transcripts


@given(MESSAGES)
def test_a_transcript_continues_when_the_last_word_is_the_assistants(
    messages: list[Message],
) -> None:
    last = messages[-1].role if messages else None
    assert Transcript("", tuple(messages)).continues == (last == ASSISTANT)
