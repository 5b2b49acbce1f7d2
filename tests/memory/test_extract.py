"""The extract is made of the source's own sentences, fits its room, and is the same each time."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.extract import cut, extractive
from memory.language import LONGEST_SENTENCE_CHARS, language, script, sentences
from memory.transcript import ASSISTANT, TOOL, USER, Message

ROOT = Path(__file__).parents[2]
LOCOMO = Path(os.environ.get("CHATFOLD_SHARED", ROOT.parent / "shared")) / "data" / "locomo"
CHATS: dict[str, list[tuple[str, str]]] = json.loads(
    (Path(__file__).parent / "summaries.json").read_text(encoding="utf-8")
)["conversations"]

LABEL = re.compile(r"^(?:User|Assistant|ユーザー|アシスタント): ")


def count(text: str) -> int:
    return (len(text.encode("utf-8", "surrogatepass")) + 3) // 4


def chat(name: str) -> list[Message]:
    return [Message(role, text) for role, text in CHATS[name]]


SENTENCE = st.text("ab cXY1\u3042\u6f22\u30ab,\u3001-", max_size=30)
PROSE = st.lists(
    st.tuples(
        SENTENCE, st.sampled_from([". ", "! ", "?\n", "。", "！」", "\n\n", "\n- ", " ", "…"])
    ),
    max_size=12,
).map(lambda pairs: "".join(a + b for a, b in pairs))
ROLES = st.sampled_from([USER, ASSISTANT])
SOURCES = st.lists(st.builds(Message, ROLES, PROSE | st.text(max_size=80)), max_size=12)


@given(SOURCES, st.integers(0, 80))
def test_every_line_is_a_piece_of_one_message(source: list[Message], max_tokens: int) -> None:
    for line in extractive(source, max_tokens=max_tokens, count=count).splitlines():
        bare = LABEL.sub("", line)
        assert any(bare in message.text or line in message.text for message in source)


@given(SOURCES, st.integers(0, 80))
def test_the_extract_never_has_more_tokens_than_asked(
    source: list[Message], max_tokens: int
) -> None:
    assert count(extractive(source, max_tokens=max_tokens, count=count)) <= max_tokens


@given(SOURCES, st.integers(1, 40))
def test_it_fits_even_where_tokens_do_not_add_up(source: list[Message], max_tokens: int) -> None:
    def costly(text: str) -> int:
        return len(text) * len(text) // 20

    assert costly(extractive(source, max_tokens=max_tokens, count=costly)) <= max_tokens


@given(st.lists(st.tuples(ROLES, st.text("abcde ", max_size=60)), max_size=20), st.integers(0, 90))
def test_sentences_come_in_the_order_of_the_source(
    lines: list[tuple[str, str]], max_tokens: int
) -> None:
    source = [Message(role, f"Item{i} {text}") for i, (role, text) in enumerate(lines)]
    text = extractive(source, max_tokens=max_tokens, count=count)
    places = [int(n) for n in re.findall(r"Item(\d+)(?= |$)", text, re.MULTILINE)]
    assert places == sorted(set(places))


@given(SOURCES, st.integers(0, 60))
def test_the_same_source_gives_the_same_extract(source: list[Message], max_tokens: int) -> None:
    first = extractive(source, max_tokens=max_tokens, count=count)
    assert extractive(list(source), max_tokens=max_tokens, count=count) == first


def test_the_extract_does_not_hang_on_the_hash_seed() -> None:
    program = (
        "import json; from memory.extract import extractive; from memory.transcript import"
        " Message\n"
        "data = json.load(open('tests/memory/summaries.json', encoding='utf-8'))['conversations']\n"
        "for chat in data.values():\n"
        "    print(ascii(extractive([Message(*m) for m in chat], max_tokens=90, count=len)))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1
    assert outputs != {b""}


def test_facts_of_the_user_come_before_pleasantries() -> None:
    text = extractive(chat("travel"), max_tokens=60, count=count)
    assert "Our budget is 250,000 yen without flights." in text
    assert "Nice to meet you" not in text


def test_the_speaker_is_named_where_it_changes() -> None:
    source = [
        Message(USER, "The garden needs 40 roses. The roses must be white."),
        Message(ASSISTANT, "White roses cost 12 euros."),
    ]
    assert extractive(source, max_tokens=100, count=count) == (
        "User: The garden needs 40 roses.\nThe roses must be white.\nAssistant: White roses cost"
        " 12 euros."
    )


def test_one_speaker_is_not_named() -> None:
    source = [Message(USER, "The garden needs 40 roses.")]
    assert extractive(source, max_tokens=100, count=count) == "The garden needs 40 roses."


def test_japanese_chats_are_cut_at_their_own_full_stops() -> None:
    text = extractive(chat("ja_travel"), max_tokens=60, count=count)
    assert "予算は二人で18万円です。" in text
    assert text.startswith(("ユーザー: ", "アシスタント: "))


def test_code_is_taken_whole_or_not_at_all() -> None:
    block = "```python\nroses = 40\nprint(roses)\n```"
    source = [Message(USER, f"The roses program prints roses.\n{block}\nWhy 40 roses?")]
    assert block in extractive(source, max_tokens=200, count=count)
    assert "print" not in extractive(source, max_tokens=count(block) - 3, count=count)
    long = "```\n" + "roses = 40\n" * 60 + "```"
    assert "roses =" not in extractive(
        [Message(USER, long + "\nDone today.")], max_tokens=900, count=count
    )


def test_where_no_sentence_fits_the_best_one_is_cut() -> None:
    source = [Message(USER, "The garden needs forty white roses and a very long fence")]
    text = extractive(source, max_tokens=5, count=count)
    assert text and source[0].text.startswith(text)


def test_nothing_comes_of_nothing() -> None:
    assert extractive([], max_tokens=50, count=count) == ""
    assert extractive([Message(USER, "...")], max_tokens=50, count=count) == ""
    assert extractive([Message(USER, "Roses.")], max_tokens=0, count=count) == ""


def test_each_sentence_is_counted_at_most_once_and_full_is_noticed_early() -> None:
    source = [Message(USER, f"Rose number {i} stands in row {i % 7}.") for i in range(2000)]
    calls = 0

    def counted(text: str) -> int:
        nonlocal calls
        calls += 1
        return count(text)

    assert extractive(source, max_tokens=100, count=counted)
    assert calls < 100


@given(st.text("ab \u3042\u3002.!?,\u3001\n-「」`", max_size=900))
def test_sentences_are_pieces_of_the_text_where_they_say_they_are(text: str) -> None:
    end = 0
    for offset, sentence in sentences(text):
        assert text[offset : offset + len(sentence)] == sentence
        assert offset >= end
        assert len(sentence) <= LONGEST_SENTENCE_CHARS
        assert sentence == sentence.strip() and "\n" not in sentence
        end = offset + len(sentence)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dr. Lee paid $3.50, e.g. for tea. Fine!", ["Dr. Lee paid $3.50, e.g. for tea.", "Fine!"]),
        ('He said "Go." Then he left.', ['He said "Go."', "Then he left."]),
        ("行きます。はい！そうですか？いいえ", ["行きます。", "はい！", "そうですか？", "いいえ"]),
        ("「行きます。」と言った。次。", ["「行きます。」と言った。", "次。"]),
        ("# Plan\n1. Go. Stay.\n- End\n|---|\n", ["Plan", "Go.", "Stay.", "End"]),
        ("Before\n```\ncode. Code.\n```\nAfter", ["Before", "After"]),
    ],
)
def test_sentences_in_english_and_japanese(text: str, expected: list[str]) -> None:
    assert [sentence for _, sentence in sentences(text)] == expected


def test_scripts_and_languages_are_told_apart() -> None:
    assert script("pandasのread_csvにchunksizeを渡すと動きます") == "japanese"
    assert script("用户下个月去京都旅行") == "chinese"
    assert script("Привет, как дела") == "cyrillic"
    assert script("안녕하세요 ok") == "korean"
    assert script("1234 !!") == ""
    assert language("The train is late and I am not in the station.") == "english"
    assert language("Je suis dans le train pour Paris et je ne sais pas.") == "french"
    assert language("Kyoto Nara Osaka") == ""


@given(st.text(max_size=200), st.integers(0, 60))
def test_cutting_keeps_a_beginning_that_fits(text: str, max_tokens: int) -> None:
    got = cut(text, max_tokens=max_tokens, count=count)
    assert text.startswith(got) and count(got) <= max_tokens


def _turns_and_answers() -> list[tuple[list[Message], str, list[str]]]:
    """Each LoCoMo session with the words of the answers whose evidence is in it."""
    found = []
    for path in sorted(LOCOMO.glob("conv-*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        talk = data["conversation"]
        answers: dict[str, str] = {}
        for qa in data["qa"]:
            for where in re.findall(r"D\d+:\d+", " ".join(qa["evidence"])):
                answers[where] = f"{answers.get(where, '')} {qa.get('answer', '')}"
        for key in talk:
            if re.fullmatch(r"session_\d+", key):
                found.append(_session(talk[key], talk["speaker_a"], answers))
    return found


def _session(
    turns: list[dict[str, Any]], first: str, answers: dict[str, str]
) -> tuple[list[Message], str, list[str]]:
    messages = [Message(USER if t["speaker"] == first else ASSISTANT, t["text"]) for t in turns]
    words = [
        word
        for turn in turns
        for word in re.findall(r"\w{4,}", answers.get(turn["dia_id"], "").lower())
        if word in turn["text"].lower()
    ]
    return messages, "\n".join(m.text for m in messages), words


def test_extracts_hold_more_answers_than_sentences_at_random() -> None:
    """Words of answers to the data set's questions that an extract of a quarter still holds."""
    sessions = _turns_and_answers()
    if not sessions:
        pytest.skip(f"LoCoMo data not found in {LOCOMO}: set CHATFOLD_SHARED")
    wanted = held = by_chance = 0
    for messages, text, words in sessions:
        room = count(text) // 4
        extract = extractive(messages, max_tokens=room, count=count).lower()
        chance = _at_random(messages, room).lower()
        wanted += len(words)
        held += sum(word in extract for word in words)
        by_chance += sum(word in chance for word in words)
    assert wanted > 500
    assert held > 0.5 * wanted
    assert held > 1.2 * by_chance


def _at_random(messages: list[Message], room: int) -> str:
    pool = [sentence for message in messages for _, sentence in sentences(message.text)]
    random.Random(1).shuffle(pool)
    taken = []
    for sentence in pool:
        if count(sentence) <= room:
            taken.append(sentence)
            room -= count(sentence)
    return "\n".join(taken)


def test_calls_of_tools_are_not_quoted_and_results_say_whose_they_are() -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    source = [
        Message(USER, "My sister Mary flies to Paris on 3 May."),
        Message(ASSISTANT, f"Let me look at the weather.\n{call}"),
        Message(TOOL, "Paris: 21 degrees, sunny."),
    ]
    text = extractive(source, max_tokens=100, count=lambda t: len(t.split()))
    assert "tool_call" not in text
    assert "Tool: Paris: 21 degrees, sunny." in text
