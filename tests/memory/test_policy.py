"""Policies: presets that make sense, faults in one sentence, documentation that agrees."""

from __future__ import annotations

import json
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.policy import (
    SHARE_OR_TOKENS,
    Limits,
    Policy,
    load_policy,
    parse_policy,
    presets_folder,
)
from memory.summarize import EXTRA_SHARE

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/policies.md").read_text("utf-8")
PRESETS = sorted(path.stem for path in presets_folder().glob("*.toml"))
WINDOWS = [512, 1024, 2048, 4096, 8192, 16384, 32768, 131072]
KNOBS = fields(Policy)
LENGTHS = ("high", "low", "block", "summaries", "summary", "answer")


# presets


def test_the_presets_are_those_that_are_promised() -> None:
    assert PRESETS == ["balanced", "extractive", "roomy", "small-window", "verbatim"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_carries_the_name_it_is_called_by(name: str) -> None:
    assert load_policy(name).name == name


def test_the_default_is_balanced() -> None:
    assert load_policy("balanced") == Policy()


def test_presets_do_what_their_names_say() -> None:
    assert not load_policy("verbatim").compact
    assert load_policy("extractive").method == "extractive"
    assert load_policy("balanced").method == "model"


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_sense_at_every_window(name: str, window: int) -> None:
    policy = load_policy(name)
    limits = policy.limits(window)
    assert 0 < limits.low_tokens < limits.high_tokens < window
    assert limits.answer_tokens >= 64
    assert limits.verbatim_turns >= 1
    if policy.compact:
        # A prompt at the high mark, with all summaries, leaves the answer its room, and a part
        # for the system prompt and the next question.
        full = limits.high_tokens + limits.summaries_tokens + limits.answer_tokens
        assert full <= 0.9 * window + 1
        # What is taken at once reaches the low mark in two blocks at most.
        assert 2 * limits.block_tokens >= limits.step_tokens
    else:
        assert limits.high_tokens + limits.answer_tokens < window


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", PRESETS)
def test_two_blocks_fit_the_budget_of_summaries(name: str, window: int) -> None:
    """Else every new block would be merged with the last at once."""
    limits = load_policy(name).limits(window)
    assert 2 * limits.summary_tokens * (1 + EXTRA_SHARE) <= limits.summaries_tokens


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", PRESETS)
def test_the_source_of_a_block_fits_a_prompt_of_its_own(name: str, window: int) -> None:
    from memory.scribe import INSTRUCTION_TOKENS, REPLY_FACTOR

    limits = load_policy(name).limits(window)
    reply = limits.summary_tokens * REPLY_FACTOR
    assert limits.block_tokens + INSTRUCTION_TOKENS + reply <= window


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_described(name: str) -> None:
    assert f"| `{name}` | " in DOCS


def test_the_table_of_lengths_is_right() -> None:
    for name, window in (("small-window", 2048), ("balanced", 8192), ("roomy", 32768)):
        limits = load_policy(name).limits(window)
        cells = (
            window,
            limits.high_tokens,
            limits.low_tokens,
            limits.summary_tokens,
            limits.summaries_tokens,
            limits.answer_tokens,
        )
        assert f"| `{name}` | {' | '.join(f'{n:,}' for n in cells)} |" in DOCS


# lengths


@given(
    st.floats(0, 1) | st.integers(0, 10**6),
    st.floats(0, 1) | st.integers(0, 10**6),
    st.integers(64, 200_000),
)
def test_whatever_the_marks_the_low_one_is_below_the_high_one(
    high: float, low: float, window: int
) -> None:
    if low >= high and (low > 1) == (high > 1):
        with pytest.raises(ValueError, match=r"low \(.*\) must be below high"):
            Policy(high=high, low=low)
        return
    limits = Policy(high=high, low=low).limits(window)
    assert limits.low_tokens < limits.high_tokens <= window
    assert limits.step_tokens >= 1


@pytest.mark.parametrize("knob", LENGTHS)
def test_a_length_is_a_share_up_to_one_and_tokens_above(knob: str) -> None:
    base = Policy(high=1, low=0, summaries=1)
    share = replace(base, **{knob: 0.25}).limits(4096)
    tokens = replace(base, **{knob: 1024}).limits(4096)
    assert getattr(share, f"{knob}_tokens") == getattr(tokens, f"{knob}_tokens") == 1024


def test_the_answer_never_takes_more_than_half_the_window() -> None:
    assert Policy(answer=100_000).limits(4096).answer_tokens == 2048


def test_a_summary_never_takes_more_than_its_part_of_the_budget() -> None:
    limits = Policy(summary=4000, summaries=1000).limits(8192)
    assert limits.summary_tokens == 400


def test_a_summary_is_never_too_short_to_say_anything() -> None:
    assert Policy(summary=0.0, summaries=0.0).limits(512).summary_tokens == 24


@given(st.integers(1, 4000))
def test_less_room_lowers_both_marks_and_never_crosses_them(room: int) -> None:
    limits = Policy().limits(4096)
    within = limits.within(room)
    assert within.low_tokens < within.high_tokens
    assert within.high_tokens == min(limits.high_tokens, max(2, room))
    assert within.low_tokens <= limits.low_tokens
    assert replace(within, high_tokens=0, low_tokens=0) == replace(
        limits, high_tokens=0, low_tokens=0
    )


# faults


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"hihg": 0.5}, "mine.toml: there is no knob 'hihg'; did you mean 'high'?"),
        ({"sumary": 1}, "mine.toml: there is no knob 'sumary'; did you mean 'summary'?"),
        ({"zzz": 1}, "mine.toml: there is no knob 'zzz'."),
        ({"high": "0.5"}, "mine.toml: high must be float, not '0.5'."),
        ({"high": True}, "mine.toml: high must be float, not True."),
        ({"compact": 1}, "mine.toml: compact must be bool, not 1."),
        ({"verbatim_turns": 1.5}, "mine.toml: verbatim_turns must be int, not 1.5."),
        ({"prompt": ["a"]}, "mine.toml: prompt must be str, not ['a']."),
        ({"summary": -1}, "mine.toml: summary must be 0 or more, not -1."),
        ({"idle_s": float("nan")}, "mine.toml: idle_s must be 0 or more, not nan."),
        (
            {"method": "magic"},
            "mine.toml: method must be one of model, extractive, not 'magic'.",
        ),
        ({"high": 0.2}, "mine.toml: low (0.25) must be below high (0.2)."),
        ({"high": 300, "low": 300}, "mine.toml: low (300) must be below high (300)."),
    ],
)
def test_a_fault_is_one_sentence_that_names_it(table: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_policy(table, source="mine.toml")
    assert str(caught.value) == sentence


@pytest.mark.parametrize("value", [float("inf"), 1e12])
def test_a_length_without_an_end_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"^high must be "):
        Policy(high=value)


@pytest.mark.parametrize("knob", [f.name for f in KNOBS if f.metadata["choices"]])
def test_a_choice_is_one_of_those_documented(knob: str) -> None:
    choices = next(f for f in KNOBS if f.name == knob).metadata["choices"]
    for choice in choices:
        assert getattr(Policy(**{knob: choice}), knob) == choice
    with pytest.raises(ValueError, match=f"^{knob} must be one of "):
        Policy(**{knob: choices[0].upper()})


def test_a_policy_that_does_not_exist_names_the_nearest_and_all() -> None:
    with pytest.raises(ValueError) as caught:
        load_policy("balance")
    assert str(caught.value) == (
        "There is no policy 'balance'; did you mean 'balanced'? "
        f"Presets: {', '.join(PRESETS)}; or give a file."
    )


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\nhigh = 3000\nlow = 0.1\n')
    policy = load_policy(str(file))
    assert (policy.name, policy.high, policy.low) == ("mine", 3000, 0.1)
    assert policy.summary == Policy().summary


@pytest.mark.parametrize("content", [b"high = ", b"\xff\xfe", b"[knobs]\nhigh = 0.5\n"])
def test_a_file_that_is_no_policy_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_policy(str(file))
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


# what a policy is called by


def other(f: Field[Any]) -> Any:
    if f.metadata["choices"]:
        return next(c for c in f.metadata["choices"] if c != f.default)
    if isinstance(f.default, bool):
        return not f.default
    return f.default + "x" if isinstance(f.default, str) else f.default + 1


@pytest.mark.parametrize("f", [f for f in KNOBS if f.name != "name"], ids=lambda f: f.name)
def test_every_knob_changes_the_digest(f: Field[Any]) -> None:
    base = replace(Policy(), high=2000)
    assert replace(base, **{f.name: other(f)}).digest != base.digest


def test_the_name_does_not_change_the_digest() -> None:
    assert replace(Policy(), name="mine").digest == Policy().digest


def test_the_digest_is_the_same_for_the_same_knobs() -> None:
    assert parse_policy({"high": 0.5, "low": 0.25}, source="").digest == Policy().digest
    assert len({load_policy(name).digest for name in PRESETS}) == len(PRESETS)


# the documentation


def value(f: Field[Any]) -> str:
    if f.metadata["choices"]:
        return " or ".join(f"`{choice}`" for choice in f.metadata["choices"])
    kinds = {"bool": "`true` or `false`", "int": "whole number", "float": "number", "str": "text"}
    return kinds[str(f.type)]


@pytest.mark.parametrize("f", KNOBS, ids=lambda f: f.name)
def test_every_knob_is_documented_in_the_words_of_the_code(f: Field[Any]) -> None:
    assert f.metadata["doc"].endswith(".")
    row = f"| `{f.name}` | {value(f)} | `{json.dumps(f.default)}` | {f.metadata['doc']} |\n"
    assert row in DOCS


def test_no_knob_is_documented_that_does_not_exist() -> None:
    table = DOCS.split("| knob | value |")[1].split("\n\n")[0].splitlines()[2:]
    assert [line.split("`")[1] for line in table] == [f.name for f in KNOBS]


def test_a_length_says_that_it_is_a_share_or_tokens() -> None:
    for f in KNOBS:
        assert ("(share or tokens" in f.metadata["doc"]) == (f.name in LENGTHS)
    assert SHARE_OR_TOKENS in DOCS


def test_limits_are_lengths_in_tokens() -> None:
    assert {f.name for f in fields(Limits)} == {*(f"{n}_tokens" for n in LENGTHS), "verbatim_turns"}
