"""Every check catches what it is named for, and leaves good summaries alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory import names, numbers
from memory.checks import CHECKS, check
from memory.prompts import Style
from memory.transcript import ASSISTANT, USER, Message

DATA: dict[str, Any] = json.loads(
    (Path(__file__).parent / "summaries.json").read_text(encoding="utf-8")
)
ROOT = Path(__file__).parents[2]
LOCOMO = Path(os.environ.get("CHATFOLD_SHARED", ROOT.parent / "shared")) / "data" / "locomo"

CHAT = (
    Message(
        USER, "My sister Anna lives in Zürich. We leave on May 5th at 3:30 pm with 1,000 francs."
    ),
    Message(ASSISTANT, "The train to Italy takes two and a half hours and costs 89.50 francs."),
    Message(USER, "Fine. We are twenty-five people. See https://github.com/example for the list."),
)
JAPANESE_CHAT = (
    Message(USER, "来月5日に田中さんと京都へ行きます。予算は2万6千円です。"),
    Message(ASSISTANT, "京都駅からバスで約40分です。ホテルは一泊一万四千円ほどです。"),
)
STYLE = Style(max_tokens=200)


def failed(text: str, source: tuple[Message, ...] = CHAT, style: Style = STYLE) -> tuple[str, ...]:
    return check(text, source, n_tokens=50, style=style)


@pytest.mark.parametrize("output", DATA["outputs"], ids=lambda o: f"{o['by']}-{o['conversation']}")
def test_real_outputs_fail_the_checks_they_were_labelled_with(output: dict[str, Any]) -> None:
    turns = DATA["conversations"][output["conversation"]][: output["messages"]]
    source = [Message(role, text) for role, text in turns]
    got = check(output["text"], source, n_tokens=output["n_tokens"], style=Style(max_tokens=161))
    assert sorted(got) == sorted(output["fails"])


def test_the_outputs_hold_good_and_bad_ones_of_the_model_and_every_kind_of_text_failure() -> None:
    by_model = [o for o in DATA["outputs"] if o["by"] != "hand"]
    seen = {name for output in by_model for name in output["fails"]}
    assert any(not output["fails"] for output in by_model)
    # A 135M model makes no tool calls and answers in its chat's script.
    assert seen == set(CHECKS) - {"too_long", "tool_call", "wrong_language"}


@pytest.mark.parametrize("text", ["", " \n\t", "...", "。！", "\ud800", "🙂"])
def test_text_without_words_is_empty(text: str) -> None:
    assert failed(text) == ("empty",)


def test_length_is_judged_by_the_tokens_given() -> None:
    text = "Anna leaves on May 5."
    assert check(text, CHAT, n_tokens=200, style=STYLE) == ()
    assert check(text, CHAT, n_tokens=201, style=STYLE) == ("too_long",)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't summarize this conversation.",
        "As an AI language model, I do not remember chats.",
        "I am unable to access it.",
    ],
)
def test_a_refusal_is_caught(text: str) -> None:
    assert "refusal" in failed(text)


def test_a_refusal_in_japanese_is_caught() -> None:
    assert "refusal" in failed("申し訳ありませんが、要約できません。", JAPANESE_CHAT)


def test_a_refusal_that_is_told_of_is_no_refusal() -> None:
    assert failed("The user was told that the assistant could not book the train to Italy.") == ()


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "book", "arguments": {"city": "Italy"}}',
        '<tool_call>\n{"name": "search"}\n</tool_call>',
        'The user said <function=search>{"q": 1}</function>',
        '[TOOL_CALLS] [{"name": "search"}]',
        '```json\n{"summary": "Anna leaves"}\n```',
    ],
)
def test_a_tool_call_is_caught(text: str) -> None:
    assert "tool_call" in failed(text)


@pytest.mark.parametrize(
    "text",
    [
        "Anna leaves on May 5.<|im_end|>",
        "<|im_start|>assistant Anna leaves.",
        "Anna leaves.</s>",
        "Anna leaves.<end_of_turn>",
        "[INST] Anna leaves. [/INST]",
        "Anna leaves.\nUser: when?\nAssistant: May 5.",
        "**Assistant:** Anna leaves.",
        "<|begin▁of▁sentence|>Anna leaves.".replace("|", "｜"),
    ],
)
def test_chat_markup_is_caught(text: str) -> None:
    assert "markup" in failed(text)


def test_role_labels_in_japanese_are_caught() -> None:
    assert "markup" in failed("ユーザー：京都へ行きます。\nアシスタント：はい。", JAPANESE_CHAT)


def test_template_tokens_that_the_chat_is_about_are_not_markup() -> None:
    source = (*CHAT, Message(USER, "What does <|im_end|> mean?"))
    assert failed("The user asked what <|im_end|> means.", source) == ()


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("Anna leaves leaves leaves leaves on May 5.", CHAT),
        ("Anna goes by train, by train, by train, by train.", CHAT),
        ("Anna leaves for Italy. " * 3, CHAT),
        ("京都へ行く。京都へ行く。京都へ行く。", JAPANESE_CHAT),
        ("京都の京都の京都の京都の京都の京都の旅", JAPANESE_CHAT),
        (
            "予算は2万6千円で、京都駅からバスで行く。予算は2万6千円で、京都駅からバスで行くので。",
            JAPANESE_CHAT,
        ),
    ],
)
def test_loops_are_caught(text: str, source: tuple[Message, ...]) -> None:
    assert "repetition" in failed(text, source)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("It was very, very hot in Italy; Anna said no, no and no.", CHAT),
        ("- Anna leaves on May 5\n- Anna pays 89.50 francs\n- Anna lives in Zürich", CHAT),
        ("ははは、と田中さんは笑った。", JAPANESE_CHAT),
    ],
)
def test_what_merely_begins_alike_is_no_loop(text: str, source: tuple[Message, ...]) -> None:
    assert "repetition" not in failed(text, source)


@pytest.mark.parametrize(
    "text",
    [
        "Anna brings 1000 francs.",
        "Anna brings 1.000 francs.",
        "Anna brings 1k francs.",
        "The group of 25 leaves at 15:30 on the 5th.",
        "They leave on 5 May, at 3:30 p.m.",
        "They leave on 05/05.",
        "The ride takes 2.5 hours and costs 89.5 francs.",
        "1. Anna leaves.\n2. She goes to Italy.\n7) The list is online.",
        "The user named two places and three people.",
    ],
)
def test_numbers_written_another_way_are_not_invented(text: str) -> None:
    assert "invented_number" not in failed(text)


@pytest.mark.parametrize(
    "text", ["予算は26,000円。", "ホテルは14000円。", "予算は二万六千円。", "約４０分。"]
)
def test_japanese_numbers_written_another_way_are_not_invented(text: str) -> None:
    assert "invented_number" not in failed(text, JAPANESE_CHAT)


@pytest.mark.parametrize(
    "text",
    [
        "Anna brings 10,000 francs.",
        "Anna brings 100 francs.",
        "They leave at 4:30 pm.",
        "They leave on May 15.",
        "The ride takes seven and a half hours.",
        "The group is twenty-six people.",
        "It costs 89.75 francs.",
    ],
)
def test_other_numbers_are_invented(text: str) -> None:
    assert "invented_number" in failed(text)


def test_a_part_of_a_grouped_number_does_not_stand_for_it() -> None:
    source = (Message(USER, "The ryokan costs 45,000 yen."),)
    assert failed("The ryokan costs 45 yen.", source) == ("invented_number",)


@pytest.mark.parametrize("text", ["予算は6万2千円。", "京都まで50分。", "十二人で行く。"])
def test_other_japanese_numbers_are_invented(text: str) -> None:
    assert "invented_number" in failed(text, JAPANESE_CHAT)


@pytest.mark.parametrize(
    "text",
    [
        "The user's sister ANNA lives in Zurich.",
        "Anna's train to Italy is on a Friday in May.",
        "The Italian train is booked; the list is on GitHub.",
        "The User and the Assistant spoke English.",
        "Dinner is not planned. Tickets were bought.",
        "Main Points Of The Conversation\nAnna leaves.",
        "**Plan:** Train to Italy. *Cost:* 89.50",
        "The Zürich-Italy train was chosen.",
    ],
)
def test_known_names_and_capitals_that_name_nobody_are_not_invented(text: str) -> None:
    assert "invented_name" not in failed(text)


@pytest.mark.parametrize(
    "text",
    [
        "The user travels with Robert to Italy.",
        "Robert wants to go to Italy.",
        "The user's sister lives in Geneva.",
        "They will meet Dr. Miller.",
        "They fly with EasyJet.",
    ],
)
def test_other_names_are_invented(text: str) -> None:
    assert "invented_name" in failed(text)


def test_japanese_names_are_compared_by_their_titles() -> None:
    assert failed("田中さんと京都へ行く。ユーザーさんの予算は2万6千円。", JAPANESE_CHAT) == ()
    assert failed("佐藤さんと京都へ行く。", JAPANESE_CHAT) == ("invented_name",)


def test_german_nouns_are_not_names() -> None:
    source = (
        Message(USER, "Ich möchte mit der Bahn nach Wien und suche für uns eine Unterkunft."),
        Message(
            ASSISTANT, "Das ist gut möglich. Die Fahrt dauert nicht lange, und Sie sparen auch."
        ),
    )
    assert (
        failed(
            "Der Nutzer sucht eine Unterkunft und plant die Reise mit dem Zug nach Wien.", source
        )
        == ()
    )


@pytest.mark.parametrize(
    "text",
    [
        "Sure! Here is what happened: Anna leaves.",
        "Hi Anna, I hope you are well.",
        "Anna leaves on May 5. Let me know if you need anything else.",
        "I will book the train to Italy. I can also book your hotel.",
        "The user asked for a summary of the conversation.",
        "Say what the user wants, what was decided and what is still open. Keep all names.",
        CHAT[1].text,
    ],
)
def test_talking_to_the_user_or_saying_the_instruction_again_is_an_echo(text: str) -> None:
    assert "echo" in failed(text)


def test_a_quoted_wish_is_no_echo() -> None:
    assert (
        failed('The user said: "Always tell me the price before you book." Anna leaves in May.')
        == ()
    )


def test_another_script_or_language_than_the_chats_is_wrong() -> None:
    assert "wrong_language" in failed("ユーザーはイタリアへ行きます。")
    assert "wrong_language" in failed("The user goes to Kyoto.", JAPANESE_CHAT)
    assert "wrong_language" in failed("用户下个月去京都旅行，预算有限。", JAPANESE_CHAT)
    assert "wrong_language" in failed(
        "Anna und die Gruppe fahren mit dem Zug, und das ist nicht teuer."
    )


def test_the_style_can_ask_for_another_language() -> None:
    english = Style(max_tokens=200, language="English")
    assert failed("The user goes to Kyoto with Tanaka.", JAPANESE_CHAT, english) == ()
    assert "wrong_language" in failed("京都へ行く。", JAPANESE_CHAT, english)


def test_a_summary_of_something_else_is_off_topic() -> None:
    text = (
        "Several wizards discovered ancient scrolls beneath haunted castles during terrible storms."
    )
    assert failed(text) == ("off_topic",)


@given(st.text(max_size=300), st.text(max_size=300))
def test_no_text_makes_a_check_raise(text: str, source: str) -> None:
    got = check(text, [Message(USER, source)], n_tokens=1, style=STYLE)
    assert set(got) <= {"empty", *CHECKS}


HOSTILE = st.lists(
    st.sampled_from(
        [
            "�",
            "9" * 50,
            "<|im_",
            "|>",
            "千",
            "万",
            "十分",
            ":",
            ".",
            "k",
            "'s",
            "Ｉ",
            "İ",
            "½",
            "٣",
            "``",
            "一",
            "時",
            "12",
            ",000",
            "Dr. ",
            "「",
            "』",
            "\u2028",
            "\x00",
            "ﾊ",
            "-",
            "half",
            "and a half",
        ]
    ),
    max_size=40,
).map("".join)


@given(HOSTILE, HOSTILE)
def test_no_odd_text_makes_a_check_raise(text: str, source: str) -> None:
    assert isinstance(check(text, [Message(USER, source)], n_tokens=1, style=STYLE), tuple)


@given(HOSTILE | st.text(max_size=200))
def test_a_text_holds_its_own_numbers_and_names(text: str) -> None:
    assert numbers.unsupported(text, numbers.readings(text)) == ()
    assert names.unknown(text, names.known(text)) == ()


@given(st.integers(0, 10**12))
def test_a_number_is_the_same_with_and_without_commas(n: int) -> None:
    assert numbers.unsupported(f"{n:,}", numbers.readings(f"it was {n} yen")) == ()
    assert numbers.unsupported(f"{n}", numbers.readings(f"it was {n:,} yen")) == ()


@given(st.integers(1, 99), st.integers(1, 9))
def test_kanji_numbers_are_read_as_digits(myriads: int, thousands: int) -> None:
    assert str(myriads * 10_000 + thousands * 1000) in numbers.readings(
        f"{myriads}万{thousands}千円"
    )


@pytest.mark.parametrize(
    "unit",
    ["1", "一", ".", " ", "1,", "12:", "a-", "A ", "a.", "「", "\n", "`", "<|", "User:", "I "],
)
def test_long_runs_are_read_once(unit: str) -> None:
    """Quadratic patterns would need minutes here, and trip the suite's timeout."""
    page = unit * (60_000 // len(unit))
    assert isinstance(check(page[:6000], [Message(USER, page)], n_tokens=1, style=STYLE), tuple)


def _sessions() -> Iterator[tuple[str, list[Message]]]:
    """Each session's summary as its authors have it, and its messages."""
    for path in sorted(LOCOMO.glob("conv-*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        chat = data["conversation"]
        for key, summary in data["session_summary"].items():
            n = key.split("_")[1]
            date = Message(USER, chat[f"session_{n}_date_time"])
            yield summary, [date, *(_message(t, chat["speaker_a"]) for t in chat[f"session_{n}"])]


def _message(turn: dict[str, str], first: str) -> Message:
    role = USER if turn["speaker"] == first else ASSISTANT
    return Message(role, f"{turn['speaker']}: {turn['text']} {turn.get('blip_caption', '')}")


@pytest.fixture(scope="module")
def sessions() -> list[tuple[str, list[Message]]]:
    found = list(_sessions())
    if not found:
        pytest.skip(f"LoCoMo data not found in {LOCOMO}: set CHATFOLD_SHARED")
    return found


def test_summaries_by_a_good_writer_pass(sessions: list[tuple[str, list[Message]]]) -> None:
    style = Style(max_tokens=500)
    bad = [s for s, source in sessions if check(s, source, n_tokens=100, style=style)]
    assert len(bad) <= 0.03 * len(sessions)


def test_summaries_of_another_chat_are_caught(sessions: list[tuple[str, list[Message]]]) -> None:
    half = len(sessions) // 2
    swapped = [(s, sessions[(i + half) % len(sessions)][1]) for i, (s, _) in enumerate(sessions)]
    caught = [s for s, source in swapped if check(s, source, n_tokens=100, style=STYLE)]
    assert len(caught) >= 0.95 * len(swapped)


def test_changed_numbers_are_caught(sessions: list[tuple[str, list[Message]]]) -> None:
    with_numbers = [(s, source) for s, source in sessions if re.search(r"\d\d", s)]
    caught = 0
    for summary, source in with_numbers:
        forged = re.sub(r"\d\d+", lambda m: str(int(m.group()) + 37), summary, count=1)
        caught += "invented_number" in check(forged, source, n_tokens=100, style=STYLE)
    assert len(with_numbers) >= 20
    assert caught >= 0.9 * len(with_numbers)
