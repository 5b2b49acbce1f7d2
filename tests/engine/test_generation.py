"""What is asked of an answer beside its text: several of them, how likely each token was, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from proxy.engines.embedded import sampling
from proxy.engines.embedded.llama import Llama
from proxy.engines.embedded.protocol import Ended, Failed, Text
from proxy.engines.embedded.request import Request
from proxy.engines.embedded.sampling import SEEDS, Grammar
from proxy.engines.embedded.schema import grammar_of
from tests.engine.submits import greedy
from tests.engine.test_scheduler import Rig, load, prompt_of

pytestmark = pytest.mark.slow

WARM: dict[str, Any] = {"temperature": 1.0}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 2},
    },
    "required": ["name", "age", "pets"],
}


@pytest.fixture(scope="module")
def llama(model_path: str) -> Llama:
    return load(model_path)


@pytest.fixture
def rig(llama: Llama) -> Iterator[Rig]:
    rig = Rig(llama)
    yield rig
    rig.scheduler.check_integrity()
    assert rig.scheduler.idle


def ask(rig: Rig, prompt: list[int], schema: Any = None, *, after: str = "", **fields: Any) -> int:
    """Queues a request; `schema` holds the answer to it, from `after` on."""
    submit = greedy(len(rig.prompts) + 1, fields.pop("max_tokens", 8), **fields)
    grammar = None
    if schema is not None:
        grammar = Grammar(rig.llama, grammar_of(json.dumps(schema)), after=after)
    rig.prompts[submit.id] = prompt
    rig.scheduler.add(Request(submit, list(prompt), rig.now(), grammar=grammar))
    return submit.id


def chat(llama: Llama, text: str) -> list[int]:
    turn = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return llama.tokenize(turn, markup=True)


def texts(rig: Rig, id_: int) -> list[str]:
    """The text of each answer."""
    found: dict[int, str] = {}
    for frame in rig.of(id_, Text):
        found[frame.choice] = found.get(frame.choice, "") + frame.text
    return [found.get(i, "") for i in range(max(found) + 1)]


def answers(rig: Rig, prompt: list[int], **fields: Any) -> list[str]:
    id_ = ask(rig, prompt, **fields)
    rig.finish()
    return texts(rig, id_)


# -- seeds ---------------------------------------------------------------------------------------


def test_the_same_seed_and_prompt_give_the_same_text_whoever_runs_beside(llama: Llama) -> None:
    prompt, other = prompt_of(llama, 30, seed=60), prompt_of(llama, 50, seed=61)
    alone = answers(Rig(llama), prompt, seed=5, **WARM)
    rig = Rig(llama)
    ask(rig, other, owner="b", seed=9, **WARM)
    assert answers(rig, prompt, seed=5, **WARM) == alone
    assert answers(Rig(llama), prompt, seed=6, **WARM) != alone


def test_no_temperature_is_too_low(rig: Rig) -> None:
    """Down to the smallest float: logits divided by it would be no numbers any more."""
    prompt = chat(rig.llama, "Say the word tower ten times.")
    for fields in ({}, {"repeat_penalty": 1.1}):
        likeliest = answers(rig, prompt, **fields)
        for temperature in (5e-324, 1e-45, 1e-38, 1e-30, 1e-7, 1e-5):
            assert answers(rig, prompt, temperature=temperature, **fields) == likeliest


def test_penalties_and_biases_are_llama_cpps_own(rig: Rig) -> None:
    prompt = chat(rig.llama, "Say the word tower ten times.")
    (plain,) = answers(rig, prompt, max_tokens=24)
    (penalised,) = answers(rig, prompt, max_tokens=24, repeat_penalty=1.8)
    (token,) = rig.llama.tokenize(" tower", markup=False)
    (biased,) = answers(rig, prompt, max_tokens=4, logit_bias=((token, 100.0),))
    assert plain != penalised
    assert biased == " tower" * 4


# -- several answers -----------------------------------------------------------------------------


def test_four_answers_cost_one_prompt(rig: Rig) -> None:
    prompt = prompt_of(rig.llama, 60, seed=62)
    id_ = ask(rig, prompt, n=4, **WARM)
    rig.finish()
    ended = rig.ended(id_)
    assert sum(len(t) for b in rig.door.batches for _, _, t, _ in b) == 60 + 4 * 7
    assert (ended.prompt_tokens, ended.cached_tokens, ended.completion_tokens) == (60, 0, 32)
    assert ended.others == ("length",) * 3
    assert len(set(texts(rig, id_))) == 4


def test_each_answer_is_the_one_that_its_own_seed_gives(llama: Llama) -> None:
    prompt = prompt_of(llama, 30, seed=63)
    together = answers(Rig(llama), prompt, n=3, seed=40, **WARM)
    alone = [answers(Rig(llama), prompt, seed=40 + i, **WARM)[0] for i in range(3)]
    assert together == alone


def test_behind_the_last_seed_comes_the_first(llama: Llama) -> None:
    """And not the number that makes llama.cpp draw one."""
    prompt = prompt_of(llama, 30, seed=63)
    together = answers(Rig(llama), prompt, n=2, seed=SEEDS - 1, **WARM)
    assert together[1:] == answers(Rig(llama), prompt, seed=0, **WARM)


def test_answers_beyond_the_sequences_wait_and_read_one_token_again(rig: Rig) -> None:
    prompt = prompt_of(rig.llama, 40, seed=64)
    id_ = ask(rig, prompt, n=6, **WARM)
    rig.finish()
    assert len(texts(rig, id_)) == 6
    evaluated = sum(len(t) for b in rig.door.batches for _, _, t, _ in b)
    assert evaluated == 40 + 6 * 7 + 2
    assert len(rig.ended(id_).others) == 5


def test_only_the_first_answer_stays_in_the_cache(rig: Rig) -> None:
    prompt = prompt_of(rig.llama, 30, seed=65)
    ask(rig, prompt, n=3, **WARM)
    rig.finish()
    stats = rig.scheduler.stats()
    assert (stats.sequences_used, stats.cells_used) == (1, 30 + 7)


def test_cancelling_ends_all_answers_and_frees_their_cells(rig: Rig) -> None:
    prompt = prompt_of(rig.llama, 30, seed=66)
    id_ = ask(rig, prompt, n=6, keep=False, max_tokens=200, **WARM)
    rig.until(lambda: len(rig.of(id_, Text)) > 9)
    rig.scheduler.cancel(id_)
    assert rig.scheduler.idle
    assert rig.scheduler.stats().cells_used == 0
    assert not rig.of(id_, Ended)


def test_an_answer_without_a_token_ends_for_every_choice(rig: Rig) -> None:
    prompt = prompt_of(rig.llama, 30, seed=67)
    id_ = ask(rig, prompt, n=2, logit_bias=((rig.llama.eos, 100.0),))
    rig.finish()
    assert (rig.ended(id_).finish_reason, rig.ended(id_).others) == ("stop", ("stop",))
    assert not rig.of(id_, Text)


# -- log probabilities ---------------------------------------------------------------------------


def test_log_probabilities_are_the_models_own(rig: Rig) -> None:
    prompt = prompt_of(rig.llama, 20, seed=68)
    seen: list[Any] = []
    spied = sampling.logprob

    def spy(llama: Llama, index: int, token: int, *, top: int) -> Any:
        seen.append((llama.logits(index).astype(np.float64), token))
        return spied(llama, index, token, top=top)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proxy.engines.embedded.scheduler.logprob", spy)
        id_ = ask(rig, prompt, logprobs=3, temperature=0.7, repeat_penalty=1.3)
        rig.finish()
    entries = [entry for frame in rig.of(id_, Text) for entry in frame.logprobs]
    assert len(entries) == 8
    for (logits, token), entry in zip(seen, entries, strict=True):
        row = np.log(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
        assert entry.logprob == pytest.approx(row[token], abs=1e-6)
        assert entry.token == rig.llama.piece(token)
        best = sorted(row, reverse=True)[:3]
        assert [p for _, p in entry.top] == pytest.approx(best, abs=1e-6)


def test_entries_come_with_the_text_of_their_tokens(rig: Rig) -> None:
    prompt = chat(rig.llama, "Repeat: 東京 🗼 été")
    id_ = ask(rig, prompt, max_tokens=40, logprobs=0)
    rig.finish()
    given = b""
    for frame in rig.of(id_, Text):
        given += b"".join(entry.token for entry in frame.logprobs)
        so_far = "".join(f.text for f in rig.of(id_, Text)[: rig.of(id_, Text).index(frame) + 1])
        assert given == so_far.encode()
    assert all(entry.top == () for f in rig.of(id_, Text) for entry in f.logprobs)


def test_tokens_behind_a_stop_string_have_no_entry(rig: Rig) -> None:
    prompt = chat(rig.llama, "Count: one, two, three, four")
    (whole,) = answers(rig, prompt, max_tokens=20)
    stop = whole[5:9]
    id_ = ask(rig, prompt, max_tokens=20, logprobs=0, stop=(stop,))
    rig.finish()
    (text,) = texts(rig, id_)
    assert text == whole[: whole.index(stop)]
    entries = b"".join(e.token for f in rig.of(id_, Text) for e in f.logprobs)
    assert entries.startswith(text.encode())
    assert whole.encode().startswith(entries)


# -- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_hot_model_answers_in_the_schema_all_the_same(rig: Rig, seed: int) -> None:
    prompt = chat(rig.llama, "Describe a person.")
    (text,) = answers(rig, prompt, schema=PERSON, max_tokens=200, temperature=1.5, seed=seed)
    person = json.loads(text)
    assert list(person) == ["name", "age", "pets"]
    assert len(person["name"]) <= 20
    assert 0 <= person["age"] <= 120
    assert set(person["pets"]) <= {"cat", "dog"}


def test_json_ends_when_it_is_whole_and_by_length_when_it_is_not(rig: Rig) -> None:
    prompt = chat(rig.llama, "Describe a person.")
    whole = ask(rig, prompt, schema=PERSON, max_tokens=200)
    short = ask(rig, prompt, schema=PERSON, max_tokens=5)
    rig.finish()
    assert rig.ended(whole).finish_reason == "stop"
    assert rig.ended(short).finish_reason == "length"
    assert texts(rig, whole)[0].startswith(texts(rig, short)[0])


def test_every_choice_is_held_to_the_schema(rig: Rig) -> None:
    prompt = chat(rig.llama, "Describe a person.")
    found = answers(rig, prompt, schema=PERSON, max_tokens=200, n=5, temperature=1.2)
    assert len({json.loads(text)["name"] for text in found}) > 1


def test_reasoning_that_the_prompt_opened_is_free_and_the_answer_behind_it_is_not(rig: Rig) -> None:
    prompt = chat(rig.llama, "Count from one to nine, then say goodbye.")
    (free,) = answers(rig, prompt, max_tokens=60)
    close = free[10:14]
    (text,) = answers(rig, prompt, schema=PERSON, after=close, max_tokens=300, n=1)
    thought, _, answer = text.partition(close)
    assert free.startswith(thought + close)
    # The token that closed it may reach further.
    assert json.loads(answer[answer.index("{") :])["pets"] is not None
    assert len(answer[: answer.index("{")]) < 12


def test_a_prompt_full_of_markup_cannot_break_out_of_the_schema(rig: Rig) -> None:
    prompt = chat(rig.llama, 'Write "}]} <|im_end|> \\u0000 and then nothing else.')
    bias = tuple((t, 8.0) for t in rig.llama.markup_tokens.tolist())
    (text,) = answers(rig, prompt, schema=PERSON, max_tokens=200, logit_bias=bias)
    json.loads(text)


@pytest.mark.parametrize(
    ("names", "param"), [((), "response_format"), (("weather",), "tool_choice")]
)
def test_a_schema_that_no_token_can_follow_fails_that_request_alone(
    rig: Rig, names: tuple[str, ...], param: str
) -> None:
    prompt = chat(rig.llama, "Hi")
    # All that may begin an object is made impossible.
    never = tuple(
        (t, float("-inf")) for t in range(rig.llama.n_vocab) if rig.llama.piece(t)[:1] == b"{"
    )
    dead = ask(rig, prompt, schema={"type": "object"}, logit_bias=never, must_call=names)
    alive = ask(rig, prompt, owner="b")
    rig.finish()
    (failed,) = rig.of(dead, Failed)
    assert (failed.kind, failed.param) == ("refused", param)
    assert rig.ended(alive).finish_reason in ("stop", "length")


def test_choices_that_multiply_are_cut_off(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 to the depth ways to go on: every level of nesting doubles them."""
    ways = [
        {"type": "object", "properties": {"a": {"$ref": "#"}, f"z{i}": {}}, "required": ["a"]}
        for i in range(2)
    ]
    prompt = chat(rig.llama, "Nest.")
    nest = rig.llama.tokenize('{"a":', markup=False)
    bias = tuple((t, 60.0) for t in nest)
    monkeypatch.setattr(sampling, "GRAMMAR_STEP_S", 0.05)
    id_ = ask(rig, prompt, schema={"anyOf": ways}, max_tokens=200, logit_bias=bias)
    rig.finish()
    (failed,) = rig.of(id_, Failed)
    assert "too many ways" in failed.message
