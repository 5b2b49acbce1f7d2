"""The tuner's arithmetic, against naive twins."""

from __future__ import annotations

import tomllib
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise
from math import isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.context import Context, ContextMessage, Shape
from memory.policy import Policy, parse_policy
from memory.transcript import ASSISTANT, USER, Message
from proxy.engines.embedded.sequences import common_prefix
from proxy.tuning import suggest
from proxy.tuning.applying import ApplyError, policy_text, with_policy
from proxy.tuning.chats import Chat, Question, one_answer_each
from proxy.tuning.locomo import is_locomo, parse_locomo
from proxy.tuning.measures import Row, best, percentile, row
from proxy.tuning.replay import Turn, Work
from proxy.tuning.retention import KINDS, Reach, Share, kept, reach, sought, together, total
from proxy.tuning.speeds import Speeds, Timed, line
from proxy.tuning.suggest import Limits, Tried, search
from proxy.tuning.svg import Bar, Point, bars, scatter

pytestmark = pytest.mark.anyio

AT_STAKE = [
    Message(USER, "My sister Katrin Oberle arrives on May 14, 2026. Always answer in French."),
    Message(ASSISTANT, "Noted. The ticket costs 1,250 dollars, see https://example.org/t."),
]


def context(*texts: str) -> Context:
    roles = ("system", "user", "assistant")
    messages = tuple(
        ContextMessage(role, (text,)) for role, text in zip(roles, texts, strict=False)
    )
    return Context(messages, "", continues=False, shape=Shape(0, 0, 0, 0, 0, 0))


# -- retention -----------------------------------------------------------------------------------


def test_all_is_kept_where_all_is_said_and_nothing_in_an_empty_context() -> None:
    wanted = sought(AT_STAKE)
    all_said = kept(wanted, context("", *(m.text for m in AT_STAKE)))
    none_said = kept(wanted, context("You are kind."))
    assert total(all_said).value == 1.0
    assert total(none_said) == Share(0, total(all_said).of)
    assert {kind for kind in KINDS if all_said[kind].of} == set(KINDS)


def test_each_kind_is_found_by_itself_and_in_other_words_for_numbers() -> None:
    wanted = sought(AT_STAKE)
    said = kept(wanted, context("Katrin Oberle pays 1250 dollars; always answer in French."))
    assert said["names"].value == 1.0
    assert said["numbers"].value == 1.0
    assert said["instructions"].value == 1.0
    assert said["dates"].kept == 0
    assert said["identifiers"].kept == 0


@given(st.lists(st.sampled_from(AT_STAKE), max_size=6), st.integers(0, 6))
def test_more_context_never_keeps_less(said: list[Message], cut: int) -> None:
    wanted = sought(said)
    less = kept(wanted, context("", " ".join(m.text for m in said[:cut])))
    more = kept(wanted, context("", " ".join(m.text for m in said)))
    assert all(less[kind].kept <= more[kind].kept <= more[kind].of for kind in KINDS)


def test_evidence_is_reached_word_for_word_or_by_the_answers_words() -> None:
    questions = [
        Question("a red kite", ("I bought a red kite yesterday.",)),
        Question("7 May 2023", ("We met the day before.",)),
        Question("Paris", ("I moved to Paris.", "It was in June.")),
        Question("yes", ("Sure thing.",)),
    ]
    told = context(
        "Earlier: they met on May 7, 2023.", "I bought a red kite yesterday. I moved to Paris."
    )
    assert reach(questions, told) == Reach(verbatim=1, covered=2, of=4)
    assert reach(questions, context("Nothing.")) == Reach(0, 0, 4)


def test_evidence_in_a_summary_is_not_word_for_word() -> None:
    (question,) = [Question("a red kite", ("I bought a red kite.",))]
    assert reach([question], context("I bought a red kite.")) == Reach(0, 1, 1)


Shares = st.dictionaries(
    st.sampled_from(KINDS), st.integers(0, 9).map(lambda n: Share(n // 2, n)), max_size=5
)


@given(st.lists(Shares, max_size=5))
def test_shares_add_up(many: list[dict[str, Share]]) -> None:
    found = together(many)
    assert total(found).of == sum(share.of for one in many for share in one.values())
    assert total(found).kept == sum(share.kept for one in many for share in one.values())


# -- speeds and figures --------------------------------------------------------------------------

Seconds = st.floats(1e-5, 1.0)


@given(Seconds, st.floats(0, 1e-4), st.integers(1, 600), st.integers(601, 4000))
def test_two_measurements_give_the_line_they_lie_on(a: float, b: float, n: int, m: int) -> None:
    speeds = Speeds(prefill_s=a, decode_s=1.0, prefill_slope_s=b)
    near = Timed(n, 0, speeds.prefill(n, behind=0))
    far = Timed(m, n, speeds.prefill(m, behind=n))
    found = line(near, far)
    assert isclose(found[0], a, rel_tol=1e-3, abs_tol=1e-9)
    assert isclose(found[1], b, rel_tol=1e-3, abs_tol=1e-8)


@given(st.integers(1, 300), st.integers(0, 300), Seconds, st.floats(0, 1e-3))
def test_tokens_one_by_one_take_as_long(n: int, behind: int, a: float, b: float) -> None:
    speeds = Speeds(prefill_s=a, decode_s=1.0, prefill_slope_s=b)
    naive = sum(a + b * (behind + i + 0.5) for i in range(n))
    assert isclose(speeds.prefill(n, behind=behind), naive, rel_tol=1e-6)


def test_noise_gives_no_negative_speed() -> None:
    assert line(Timed(100, 0, 2.0), Timed(100, 100, 1.0)) == (0.015, 0.0)


@given(st.lists(st.integers(0, 50), min_size=1), st.integers(1, 100))
def test_percentiles_by_counting(values: list[int], share: int) -> None:
    found = percentile(values, share)
    assert found in values
    assert 100 * sum(v <= found for v in values) >= share * len(values)
    below = [v for v in values if v < found]
    assert 100 * len(below) < share * len(values)


def figures(name: str, first: float, after: float, share: float) -> Row:
    turn = Turn(Work(1, 1, 0, first), (Work(1, 1, 0, after),), 0, {"names": Share(0, 0)})
    made = row(name, [[turn]], Speeds(1, 1))
    return replace(made, kept={"names": Share(round(share * 100), 100)})


def test_a_row_adds_up_what_the_turns_cost() -> None:
    speeds = Speeds(prefill_s=0.01, decode_s=0.1)
    quiet = Turn(Work(100, 20), (Work(110, 5),), 0)
    busy = Turn(Work(200, 40), (Work(210, 30, 10), Work(150, 100)), 1)
    found = row("p", [[quiet], [busy]], speeds, pause_s=1.0)
    assert (found.turns, found.summaries, found.evaluated_mean) == (2, 1, 30)
    assert found.first_token_worst_s == pytest.approx(0.4)
    assert found.background_mean == pytest.approx(67.5)
    # 0.05 s, and 0.3 + 1.0 + 1.0 s of which the pause holds one.
    assert found.background_s == pytest.approx((0.05 + 2.3) / 2)
    assert found.busy == pytest.approx((0.05 + 1.0) / 2)
    assert found.overrun == 0.5
    assert found.retention is None
    assert found.reach is None


Rows = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=7
)


@given(Rows)
def test_the_best_are_those_that_nobody_beats(values: list[tuple[int, int, int]]) -> None:
    rows = [figures(str(i), a, b, c / 4) for i, (a, b, c) in enumerate(values)]
    found = best(rows)
    for i, (a, b, c) in enumerate(values):
        beaten = any(x <= a and y <= b and z >= c and (x, y, z) != (a, b, c) for x, y, z in values)
        assert (str(i) in found) == (not beaten)


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_common_prefix_by_counting(a: list[int], b: list[int]) -> None:
    naive = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    assert common_prefix(a, b) == (min(len(a), len(b)) if naive is None else naive)


# -- chats ---------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([USER, ASSISTANT, "tool"]), max_size=12))
def test_every_answer_is_one_request(roles: list[str]) -> None:
    said = one_answer_each([Message(role, f"m{i}") for i, role in enumerate(roles)])
    assert "".join(m.text.replace("\n", "") for m in said) == "".join(
        f"m{i}" for i in range(len(roles))
    )
    chat = Chat("x", said)
    for exchange in chat.exchanges:
        assert said[exchange.n_messages].role == ASSISTANT
        assert said[exchange.n_messages - 1].role != ASSISTANT
    answers = sum(m.role == ASSISTANT for m in said[1:])
    assert len(chat.exchanges) == answers


def test_the_beginning_of_a_chat_ends_with_an_answer() -> None:
    said = tuple(Message((USER, ASSISTANT)[i % 2], f"m{i}") for i in range(8))
    chat = Chat("x", said, questions=(Question("a", ("b",)),))
    assert chat.first(0) is chat
    assert chat.first(9) is chat
    assert chat.first(2).messages == said[:4]
    assert chat.first(2).questions == ()
    assert chat.first(2).digest != chat.digest


def test_locomo_by_its_documented_format() -> None:
    value = {
        "conversation": {
            "speaker_a": "Ann",
            "speaker_b": "Ben",
            "session_1_date_time": "1 pm on 2 May, 2023",
            "session_1": [
                {"speaker": "Ann", "dia_id": "D1:1", "text": "Hi Ben!"},
                {"speaker": "Ann", "dia_id": "D1:2", "text": "I have a kite."},
                {"speaker": "Ben", "dia_id": "D1:3", "text": "Nice."},
            ],
            "session_2_date_time": "3 pm on 4 June, 2023",
            "session_2": [{"speaker": "Ben", "dia_id": "D2:1", "text": "Back again."}],
        },
        "qa": [
            {"question": "?", "answer": 2023, "evidence": ["D1:02; D2:1"], "category": 2},
            {"question": "?", "adversarial_answer": "x", "evidence": ["D1:1"], "category": 5},
            {"question": "?", "answer": "x", "evidence": ["D9:9"], "category": 1},
        ],
    }
    assert is_locomo(value)
    chat = parse_locomo(value, name="c")
    assert [(m.role, m.text) for m in chat.messages] == [
        (USER, "[1 pm on 2 May, 2023]\nHi Ben!\nI have a kite."),
        (ASSISTANT, "Nice.\n[3 pm on 4 June, 2023]\nBack again."),
    ]
    assert chat.questions == (Question("2023", ("I have a kite.", "Back again.")),)


# -- the configuration file ----------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", 'policy = "new"\n'),
        ("# a\nport = 1", '# a\nport = 1\npolicy = "new"\n'),
        ('policy = "old"  # mine\nport = 1\n', 'policy = "new"  # mine\nport = 1\n'),
        ("policy='old#'\n", 'policy = "new"\n'),
        (
            '# policy = "balanced"\n\n[engine]\n',
            '# policy = "balanced"\npolicy = "new"\n\n[engine]\n',
        ),
        ("port = 1\n[engine]\nn_batch = 2\n", 'port = 1\npolicy = "new"\n[engine]\nn_batch = 2\n'),
    ],
)
def test_one_line_changes_and_comments_stay(before: str, after: str) -> None:
    assert with_policy(before, "new") == after


@pytest.mark.parametrize(
    "before", ['model = """\npolicy = "x"\n"""\n', "not toml", '"policy" = "old"\n']
)
def test_what_is_not_understood_is_left_alone(before: str) -> None:
    with pytest.raises(ApplyError):
        with_policy(before, "new")


@given(NAMES, st.sampled_from(["", 'policy = "a" # c\n', "# policy = 'x'\n[engine]\nn_batch=1\n"]))
def test_the_file_then_says_so_and_all_else_as_before(name: str, before: str) -> None:
    after = tomllib.loads(with_policy(before, name))
    assert after == tomllib.loads(before) | {"policy": name}


@given(
    st.floats(0.3, 0.9),
    st.sampled_from(["model", "extractive"]),
    st.booleans(),
    NAMES.filter(bool),
    st.integers(1, 9),
)
def test_a_policys_text_is_that_policy(
    high: float, method: str, compact: bool, prompt: str, turns: int
) -> None:
    policy = Policy(
        name="x",
        high=high,
        low=0.2,
        method=method,
        compact=compact,
        prompt=prompt,
        verbatim_turns=turns,
    )
    text = policy_text(policy, explanation="Why:\nbecause.")
    assert parse_policy(tomllib.loads(text), source="it") == policy


# -- the search ----------------------------------------------------------------------------------


def landscape(policy: Policy) -> Row:
    """Larger `high` keeps more and waits longer; everything else is the same."""
    return figures(policy.name, first=2 * policy.high, after=1.0, share=min(1.0, policy.high))


@pytest.mark.parametrize(("limit_s", "high"), [(1.2, 0.55), (1.05, 0.5)])
async def test_the_search_climbs_as_far_as_the_limit_allows(limit_s: float, high: float) -> None:
    asked: list[Policy] = []

    async def measure(policy: Policy) -> Row:
        asked.append(policy)
        return landscape(policy)

    start = Policy()
    limits = Limits(first_token_s=limit_s)
    found = await search([Tried(start, landscape(start))], measure, limits, tries=25)
    assert found.holds
    assert found.policy.high == high
    assert found.row.first_token_p95_s <= limit_s
    assert 0 < len(asked) <= 25
    moved = found.policy.high != start.high
    assert (found.policy.name == suggest.NAME) == moved
    assert any(reason.startswith("high 0.5 -> 0.55") for reason in found.reasons) == moved


async def test_a_limit_that_nothing_keeps_is_said() -> None:
    async def measure(policy: Policy) -> Row:
        return figures(policy.name, first=3.0, after=1.0, share=0.5)

    start = Policy()
    row_ = await measure(start)
    found = await search([Tried(start, row_)], measure, Limits(first_token_s=0.1), tries=5)
    assert not found.holds
    assert found.policy == start
    assert any("over the 0.1 s asked for" in reason for reason in found.reasons)


# -- plots ---------------------------------------------------------------------------------------

Numbers = st.floats(0, 1e5)


@given(st.lists(st.tuples(NAMES, Numbers, Numbers, st.booleans()), min_size=1, max_size=8))
def test_a_plot_is_xml_with_every_name_inside_it(
    values: list[tuple[str, float, float, bool]],
) -> None:
    points = [Point(name, x, y, best=b) for name, x, y, b in values]
    root = ET.fromstring(str(scatter(points, x_label="<x>", y_label="&", title='"t"')))
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == len(points)
    width, height = (float(v) for v in root.attrib["viewBox"].split()[2:])
    for circle in circles:
        assert 0 <= float(circle.attrib["cx"]) <= width
        assert 0 <= float(circle.attrib["cy"]) <= height
    texts = [e.text or "" for e in root.iter() if e.tag.endswith("text")]
    assert all(name in texts for name, *_ in values)


def test_names_in_a_plot_do_not_cover_each_other() -> None:
    points = [Point(f"policy-{i}", 1.0, 1.0) for i in range(4)]
    root = ET.fromstring(str(scatter(points, x_label="x", y_label="y", title="t")))
    ys = sorted(
        float(e.attrib["y"])
        for e in root.iter()
        if e.tag.endswith("text") and (e.text or "").startswith("policy-")
    )
    assert all(b - a >= 15 for a, b in pairwise(ys))


@given(st.lists(st.tuples(NAMES, Numbers, Numbers), min_size=1, max_size=6))
def test_bars_are_as_long_as_their_values(values: list[tuple[str, float, float]]) -> None:
    root = ET.fromstring(str(bars([Bar(n, a, b, "t") for n, a, b in values], title="t")))
    widths = [float(e.attrib["width"]) for e in root.iter() if e.tag.endswith("rect")]
    flat = [v for _, a, b in values for v in (a, b)]
    most = max(range(len(flat)), key=flat.__getitem__)
    assert widths[most] == max(widths)
