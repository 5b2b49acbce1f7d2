"""Who may come in, by pure functions."""

from __future__ import annotations

import pytest

from memory.checks import CHECKS
from proxy.errors import ApiError
from proxy.headers import owner_of
from proxy.pages.access import (
    SESSION_S,
    SESSIONS_MOST,
    LoginNeeded,
    Refused,
    Sessions,
    host_name,
    is_loopback,
    owner_for,
    require_own_act,
    visitor_of,
)
from proxy.pages.render import check_word
from proxy.pages.words import ENGLISH, JAPANESE, WORDS, language_of, teller

HERE = {"host": "127.0.0.1:8080"}


def visit(sessions: Sessions, **options: object) -> object:
    given = {"headers": HERE, "cookie": "", "client": "127.0.0.1", "keys": (), "inspect": "on"}
    return visitor_of(sessions, **(given | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LOCALHOST."])
def test_names_of_this_machine(name: str) -> None:
    assert is_loopback(name)


@pytest.mark.parametrize(
    "name", ["", "10.0.0.1", "0.0.0.0", "localhost.evil.example", "127.0.0.1.evil.example", "::"]
)
def test_names_of_others(name: str) -> None:
    assert not is_loopback(name)


@pytest.mark.parametrize(
    ("host", "name"),
    [("localhost:8080", "localhost"), ("[::1]:8080", "::1"), ("a b", "a b"), ("[x", ""), ("", "")],
)
def test_the_name_in_a_host_header(host: str, name: str) -> None:
    assert host_name(host) == name


def test_without_a_key_only_this_machine_under_its_own_names() -> None:
    sessions = Sessions()
    assert visit(sessions, headers={"host": "localhost:8080"})
    for options in (
        {"client": "192.168.1.7"},
        {"headers": {"host": "rebound.example:8080"}},
        {"headers": HERE | {"x-forwarded-for": "127.0.0.1"}},
        {"headers": HERE | {"via": "1.1 somebody"}},
        {"inspect": "key"},
        {"inspect": "off"},
    ):
        with pytest.raises(Refused):
            visit(sessions, **options)


def test_with_a_key_even_this_machine_must_log_in() -> None:
    sessions = Sessions()
    with pytest.raises(LoginNeeded):
        visit(sessions, keys=("k",))
    cookie = sessions.begin("owner", local=False)
    assert visit(sessions, keys=("k",), cookie=cookie)
    with pytest.raises(LoginNeeded):
        visit(sessions, keys=("k",), cookie=cookie + "x")


def test_a_choice_made_without_a_key_opens_nothing_once_there_is_one() -> None:
    sessions = Sessions()
    cookie = sessions.begin("owner", local=True)
    assert visit(sessions, cookie=cookie)
    with pytest.raises(LoginNeeded):
        visit(sessions, keys=("k",), cookie=cookie)


def test_a_session_ends_when_it_rests_for_too_long_or_is_ended() -> None:
    now = [0.0]
    sessions = Sessions(clock=lambda: now[0])
    kept, left = sessions.begin("a", local=False), sessions.begin("b", local=False)
    now[0] = SESSION_S
    assert sessions.visitor(kept, local=False)
    now[0] = SESSION_S + 1
    assert sessions.visitor(kept, local=False)
    assert sessions.visitor(left, local=False) is None
    sessions.end(kept)
    assert sessions.visitor(kept, local=False) is None


def test_sessions_are_bounded_and_the_oldest_goes() -> None:
    sessions = Sessions()
    ids = [sessions.begin("a", local=False) for _ in range(SESSIONS_MOST + 1)]
    assert sessions.visitor(ids[0], local=False) is None
    assert sessions.visitor(ids[1], local=False)


def test_an_act_needs_the_token_and_our_own_origin() -> None:
    token = Sessions().token("session")
    own = HERE | {"origin": "http://127.0.0.1:8080", "sec-fetch-site": "same-origin"}
    require_own_act(own, token=token, sent=token)
    require_own_act(HERE, token=token, sent=token)
    for headers, sent in (
        (own, ""),
        (own, "0" * 64),
        (HERE | {"origin": "http://evil.example"}, token),
        (HERE | {"origin": "null"}, token),
        (HERE | {"origin": "http://127.0.0.1:9999"}, token),
        (HERE | {"sec-fetch-site": "cross-site"}, token),
        (HERE | {"sec-fetch-site": "same-site"}, token),
    ):
        with pytest.raises(Refused):
            require_own_act(headers, token=token, sent=sent)


def test_tokens_differ_between_sessions_and_starts() -> None:
    one, other = Sessions(), Sessions()
    assert len({one.token("a"), one.token("b"), other.token("a")}) == 3


def test_a_key_opens_its_own_owners_alone() -> None:
    own = owner_of({"authorization": "Bearer k1"})
    anna = owner_of({"authorization": "Bearer k1"}, "anna")
    foreign = owner_of({"authorization": "Bearer k2"}, "anna")
    assert owner_for("k1", "", ("k1", "k2")) == own
    assert owner_for("k1", "anna", ("k1",)) == anna
    assert owner_for("k1", anna, ("k1",)) == anna
    for key, user in (("k1", foreign), ("wrong", ""), ("", ""), ("k1", foreign.partition(":")[0])):
        with pytest.raises(ApiError):
            owner_for(key, user, ("k1", "k2"))


@pytest.mark.parametrize(
    ("chosen", "accepted", "language"),
    [
        ("", "", ENGLISH),
        ("", "ja", JAPANESE),
        ("", "ja-JP,en;q=0.8", JAPANESE),
        ("", "de,en;q=0.3,ja;q=0.7", JAPANESE),
        ("", "ja;q=0,en;q=0.1", ENGLISH),
        ("", "fr,*;q=0.1", ENGLISH),
        ("ja", "en", JAPANESE),
        ("xx", "ja", JAPANESE),
        ("", ",;q=,ja;q=x", JAPANESE),
    ],
)
def test_the_language_is_the_one_chosen_or_the_browsers(
    chosen: str, accepted: str, language: str
) -> None:
    assert language_of(chosen=chosen, accepted=accepted) == language


def test_every_word_is_there_in_every_language_with_the_same_places() -> None:
    import string

    def places(text: str) -> set[str | None]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    english, japanese = WORDS[ENGLISH], WORDS[JAPANESE]
    assert english.keys() == japanese.keys()
    for name in english:
        assert places(english[name]) == places(japanese[name]), name


def test_every_check_and_a_single_thing_have_words() -> None:
    tell = teller(ENGLISH)
    for name in ("empty", *CHECKS):
        assert check_word(name, tell) == WORDS[ENGLISH][f"check_{name}"]
    assert check_word("of_another_version", tell) == "of_another_version"
    assert (tell("n_turns", n=1), tell("n_turns", n=1000)) == ("1 turn", "1,000 turns")
