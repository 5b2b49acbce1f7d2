"""The pure parts of remote engines: estimates that learn, slots, files, steps, who is next."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.engines.base import ContextOverflow, RequestRefused
from proxy.engines.remote_ahead import CHATS_MOST, STEP_CHARS, Resident, Rotation, steps
from proxy.engines.remote_calibration import ENOUGH, Calibration, Sample
from proxy.engines.remote_errors import failure, failure_in_stream
from proxy.engines.remote_files import SlotFiles
from proxy.engines.remote_http import address, header
from proxy.engines.remote_server import Template, default_system, template_of
from proxy.engines.remote_slots import Slots, preferred
from proxy.engines.remote_wire import Message

# -- estimates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.85, 1.0, 1.12, 1.35])
@pytest.mark.parametrize(("message", "base"), [(4, 1), (5, 25), (8, 3)])
def test_three_answers_bring_the_error_under_two_percent(
    rate: float, message: int, base: int
) -> None:
    """A chat that grows, before a model whose vocabulary and template are unknown."""
    chance = random.Random(7)
    calibration, estimate, messages = Calibration(), 120, 2
    for turn in range(40):
        actual = round(rate * estimate + message * messages + base)
        if turn >= ENOUGH:
            told = calibration.prompt(estimate, messages=messages)
            assert abs(told - actual) <= 0.02 * actual
            assert told * (1 + calibration.margin) >= actual
        calibration.add(Sample(estimate, messages, actual))
        estimate += chance.randrange(20, 400)
        messages += 2


def test_the_margin_is_wide_until_enough_is_known() -> None:
    calibration = Calibration()
    margins = []
    for _ in range(ENOUGH + 1):
        margins.append(calibration.margin)
        calibration.add(Sample(100, 2, 120))
    assert margins == [0.15] * ENOUGH + [0.02]


def test_texts_without_a_template_teach_the_rate_alone() -> None:
    calibration = Calibration()
    for n in (100, 250, 400, 800):
        calibration.add(Sample(n, 0, round(1.2 * n)))
    assert calibration.text(1000) == pytest.approx(1200, rel=0.01)


# -- refusals ------------------------------------------------------------------------------------

VLLM = "This model's maximum context length is 8192 tokens"


@pytest.mark.parametrize(
    ("sentence", "prompt", "window"),
    [
        # vLLM 0.9
        (f"{VLLM}. However, you requested 9000 tokens in the messages, Please reduce", 9000, 8192),
        (
            f"{VLLM}. However, you requested 9064 tokens (9000 in the messages, 64 in the"
            " completion). Please reduce the length of the messages or completion.",
            9000,
            8192,
        ),
        # vLLM 0.11
        (
            f"{VLLM}. However, your request has 9000 input tokens. Please reduce the length of the"
            " input messages.",
            9000,
            8192,
        ),
        (
            "'max_tokens' or 'max_completion_tokens' is too large: 64. This model's maximum context"
            " length is 8192 tokens and your request has 8150 input tokens (64 > 8192 - 8150).",
            8214,
            8192,
        ),
        (
            "The decoder prompt (length 9000) is longer than the maximum model length of 8192. Make"
            " sure that `max_model_len` is no smaller than the number of text tokens.",
            9000,
            8192,
        ),
        # vLLM 0.16
        (
            "You passed 8129 input tokens and requested 64 output tokens. However, the model's"
            " context length is only 8192 tokens, resulting in a maximum input length of 8128"
            " tokens. Please reduce the length of the input prompt.",
            9216,
            8192,
        ),
        ("Input length (9000) exceeds model's maximum context length (8192).", 9000, 8192),
        # vLLM 0.25
        (
            f"{VLLM}. However, you requested 64 output tokens and your prompt contains 9000 input"
            " tokens, for a total of 9064 tokens. Please reduce the length of the input prompt.",
            9000,
            8192,
        ),
        (
            f"{VLLM}. However, you requested 64 output tokens and your prompt contains at least"
            " 8129 input tokens, for a total of at least 8193 tokens. (parameter=input_tokens)",
            9216,
            8192,
        ),
        (
            f"{VLLM}. However, you requested 64 output tokens and your prompt contains 100000"
            " characters (more than 81280 characters, which is the upper bound for 8128 input"
            " tokens). Please reduce the length of the input prompt.",
            9216,
            8192,
        ),
        # no max_tokens
        ("max_tokens must be at least 1, got -344.", 1344, 1000),
        # SGLang
        (
            "The input (9000 tokens) is longer than the model's context length (8192 tokens).",
            9000,
            8192,
        ),
        (
            "Requested token count exceeds the model's maximum context length of 8192 tokens. You"
            " requested a total of 8214 tokens: 8150 tokens from the input messages and 64 tokens"
            " for the completion. Please reduce the number of tokens in the input messages.",
            8214,
            8192,
        ),
        (
            "Input length (9000 tokens) exceeds the maximum allowed length (8192 tokens). Use a"
            " shorter input or enable --allow-auto-truncate.",
            9000,
            8192,
        ),
    ],
)
def test_a_prompt_that_is_too_long_is_known_by_what_vllm_and_sglang_say(
    sentence: str, prompt: int, window: int
) -> None:
    error = {"message": sentence, "type": "BadRequestError", "param": None, "code": 400}
    for body in ({"object": "error", **error}, {"error": error}):
        received = json.dumps(body).encode()
        for told in (
            failure(400, received, window_tokens=1000),
            failure_in_stream(received, window_tokens=1000),
        ):
            assert isinstance(told, ContextOverflow)
            assert (told.prompt_tokens, told.window_tokens) == (prompt, window)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("BadRequestError", "Unknown field: the input is longer than it should be."),
        ("BadRequestError", "max_tokens must be at least 1, got 0."),
        ("NotFoundError", f"{VLLM}. However, your request has 9000 input tokens."),
    ],
)
def test_what_else_is_wrong_with_a_request_is_a_refusal(kind: str, sentence: str) -> None:
    received = json.dumps({"error": {"message": sentence, "type": kind, "code": 400}}).encode()
    told = failure(400, received, window_tokens=1000)
    assert isinstance(told, RequestRefused)
    assert str(told) == sentence


# -- templates -----------------------------------------------------------------------------------


def test_a_template_is_learned_from_three_prompts() -> None:
    # ChatML: 5 tokens around a message, 6 where the role has two; 3 for the answer's header; a
    # default system message of 20 tokens and 5 around it.
    learned = template_of(one=1 + 5 + 3 + 25, three=3 + 5 + 6 + 5 + 3 + 25, with_system=13, text=1)
    assert learned == Template(pair=11, base=0, bare=28)
    assert learned.message_tokens == 6
    assert learned.base_tokens == 28
    assert abs(learned.tokens(messages=1, with_system=False) - (5 + 3 + 25)) <= 1


@pytest.mark.parametrize(
    ("bare", "expected"),
    [
        ("<s>[sys]Be nice.[/sys][u]M[/u]", "Be nice."),
        ("<s>[u]M[/u]", ""),
        ("", ""),
        ("<s>[sys]", ""),
    ],
)
def test_a_templates_own_system_prompt_is_what_stands_in_the_place_of_ours(
    bare: str, expected: str
) -> None:
    assert default_system(bare=bare, marked="<s>[sys]M[/sys][u]M[/u]", mark="M") == expected


# -- slots ---------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 3))))
def test_slots_keep_their_books(n: int, steps_taken: list[tuple[str, int]]) -> None:
    slots, used = Slots(n), list[int]()
    for conversation, leave in steps_taken:
        sat = slots.slot_of(conversation)
        slot, stays = slots.take(conversation)
        assert (slot is None) == (len(used) == n)
        if slot is not None:
            assert slot not in used
            assert stays == (sat == slot)
            assert stays or sat is None or sat in used
            used.append(slot)
        slots.check_integrity()
        while len(used) > leave:
            slots.leave(used.pop(0))
        slots.check_integrity()
        spare = slots.spare()
        assert (spare is None) == (len(used) == n)
        if spare is not None and leave == 0:
            slots.hold(spare)
            slots.check_integrity()
            slots.vacate(spare)
            assert spare not in [slots.slot_of(name) for name in "abcdef"]


def test_an_empty_slot_is_chosen_by_name_and_the_least_recent_one_evicted() -> None:
    slots = Slots(4)
    slot, stays = slots.take("a")
    assert (slot, stays) == (preferred("a", 4), False)
    assert Slots(4).take("a") == (slot, False)
    names = ["a"]
    slots.leave(preferred("a", 4))
    for name in "bcdefgh":
        taken, stays = slots.take(name)
        assert not stays
        assert taken is not None
        slots.leave(taken)
        names.append(name)
        alive = [x for x in names if slots.slot_of(x) is not None]
        assert alive == names[-4:]


@given(st.integers(0, 5), st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 99))))
def test_files_are_bounded_and_hold_what_was_saved_last(
    n: int, saved: list[tuple[str, int]]
) -> None:
    files, names, last = SlotFiles(n), set[str](), dict[str, tuple[str, int]]()
    for conversation, n_tokens in saved:
        name = files.name(conversation)
        if not name:
            continue
        files.saved(conversation, n_tokens=n_tokens)
        names.add(name)
        last[name] = (conversation, n_tokens)
    assert len(names) <= n
    for conversation in "abcdefgh":
        holds, n_tokens = last.get(files.name(conversation), ("", 0))
        assert files.tokens(conversation) == (n_tokens if holds == conversation else 0)


# -- one sequence --------------------------------------------------------------------------------

CHAT = st.lists(
    st.builds(
        lambda role, text: {"role": role, "content": text},
        st.sampled_from(["user", "assistant"]),
        st.text("ab", max_size=3 * STEP_CHARS),
    ),
    min_size=1,
    max_size=4,
)


@given(CHAT, st.integers(0, 5 * STEP_CHARS))
def test_steps_are_beginnings_that_grow_up_to_the_whole(chat: list[Message], known: int) -> None:
    sizes = []
    *some, whole = steps(chat, known_chars=known)
    assert whole == chat
    for step in some:
        joined = "".join(m["content"] for m in step)
        assert "".join(m["content"] for m in chat).startswith(joined)
        sizes.append(len(joined))
    assert all(b - a == STEP_CHARS for a, b in pairwise(sizes))
    assert not sizes or sizes[0] == known + STEP_CHARS
    total = sum(len(m["content"]) for m in chat)
    assert total - max(sizes, default=known) < 1.5 * STEP_CHARS or total <= known


@given(CHAT, CHAT)
def test_what_two_prompts_share_is_what_a_naive_twin_says(
    a: list[Message], b: list[Message]
) -> None:
    resident = Resident()
    resident.set(a)
    marked_a = [c for m in a for c in (f"<{m['role']}>", *m["content"])]
    marked_b = [c for m in b for c in (f"<{m['role']}>", *m["content"])]
    shared = 0
    for x, y in zip(marked_a, marked_b, strict=False):
        if x != y:
            break
        shared += not x.startswith("<")
    assert resident.shared_chars(b) == shared
    assert resident.holds(b) == (a[: len(b)] == b)


def test_a_step_that_ends_in_the_system_message_has_a_users_behind_it() -> None:
    chat = [{"role": "system", "content": "s" * 3000}, {"role": "user", "content": "hi"}]
    first = next(iter(steps(chat, known_chars=0)))
    assert [m["role"] for m in first] == ["system", "user"]


def test_the_next_speaker_is_who_followed_the_last_one_the_last_time() -> None:
    rotation = Rotation()
    for name in "ab":
        rotation.knows(name, [{"role": "user", "content": name}])

    def spoken(*names: str) -> str:
        for name in names:
            rotation.spoke(name)
        return rotation.next()[0]["content"]

    assert spoken("a") == "a"
    assert spoken("b", "a") == "b"
    assert spoken("a") == "a"
    assert spoken("b", "b", "b") == "b"
    for i in range(2 * CHATS_MOST):
        rotation.spoke(f"chat {i}")
    assert rotation.next() == []


@pytest.mark.parametrize(
    ("url", "target", "host"),
    [
        ("http://h:8080/v1/models", b"/v1/models", "h:8080"),
        ("http://[::1]:8080/v1", b"/v1", "[::1]:8080"),
        ("https://h/slots/1?action=save", b"/slots/1?action=save", "h"),
        ("http://bücher.example/ä b/a%20b", b"/%C3%A4%20b/a%20b", "xn--bcher-kva.example"),
    ],
)
def test_any_url_can_be_written_into_a_request(url: str, target: bytes, host: str) -> None:
    found, sent_host = address(url)
    assert (found.target, sent_host) == (target, host)


def test_a_key_goes_on_as_the_bytes_that_came() -> None:
    came = "Bearer schlüssel".encode()
    assert header(came.decode("latin-1")) == came
    assert header("Bearer 鍵") == "Bearer 鍵".encode()
