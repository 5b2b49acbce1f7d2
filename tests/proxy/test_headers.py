"""Owners, API keys and ids from headers."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from proxy.headers import Hints, authorize, bearer_token, hints, owner_of


def bearer(key: str) -> Headers:
    return Headers({"Authorization": f"Bearer {key}"})


def test_an_owner_is_stable_and_tells_nothing() -> None:
    owner = owner_of(bearer("sk-secret"), "mia")
    assert owner == owner_of(bearer("sk-secret"), "mia")
    assert "secret" not in owner
    assert "mia" not in owner


def test_every_key_and_every_user_is_an_owner_of_its_own() -> None:
    cases = [("", None), ("a", None), ("b", None), ("a", "u"), ("a", "v"), ("b", "u"), ("", "u")]
    assert len({owner_of(bearer(key), user) for key, user in cases}) == len(cases)


def test_no_user_and_an_empty_user_are_the_same() -> None:
    assert owner_of(bearer("a"), "") == owner_of(bearer("a")) == owner_of(bearer("a"), None)


def test_the_header_names_the_user_before_the_body_does() -> None:
    with_header = Headers({"authorization": "Bearer a", "x-user-id": "u"})
    assert owner_of(with_header, "v") == owner_of(bearer("a"), "u")


def test_a_user_is_the_same_in_the_header_and_in_the_body() -> None:
    raw = [(b"authorization", b"Bearer a"), (b"x-user-id", "美穂".encode())]
    assert owner_of(Headers(raw=raw)) == owner_of(bearer("a"), "美穂")


def test_users_whose_bytes_look_alike_in_latin_1_differ() -> None:
    twin = "日".encode().decode("latin-1")
    assert owner_of(bearer("a"), "日") != owner_of(bearer("a"), twin)


def test_hostile_user_ids_do_no_harm() -> None:
    assert owner_of(bearer("a"), "\ud800\x00" * 10_000) != owner_of(bearer("a"))


@pytest.mark.parametrize(
    ("value", "token"),
    [("Bearer x", "x"), ("bearer  x ", "x"), ("Basic x", ""), ("x", ""), ("", ""), ("Bearer", "")],
)
def test_the_bearer_token(value: str, token: str) -> None:
    assert bearer_token(Headers({"authorization": value})) == token


def test_without_keys_everybody_may_come_in() -> None:
    assert authorize(Headers({}), ()) is None


def test_one_of_several_keys_is_enough() -> None:
    assert authorize(bearer("b"), ("a", "b")) is None


@pytest.mark.parametrize("token", ["", "c", "ab", "a b", "ä"])
def test_a_wrong_key_is_a_401(token: str) -> None:
    error = authorize(bearer(token), ("a", "b"))
    assert error is not None
    assert error.status == 401
    assert error.code == "invalid_api_key"


def test_a_key_beyond_ascii_matches_by_its_bytes() -> None:
    raw = [(b"authorization", "Bearer schlüssel".encode())]
    assert authorize(Headers(raw=raw), ("schlüssel",)) is None


def test_hints_are_taken_when_they_make_sense() -> None:
    headers = {"x-conversation-id": "c1", "x-message-id": "", "x-parent-id": "null"}
    assert hints(Headers(headers)) == Hints(conversation="c1")
    placeholder = {"x-conversation-id": "{{LIBRECHAT_BODY_CONVERSATIONID}}"}
    assert hints(Headers(placeholder)) == Hints()
    assert hints(Headers({"x-conversation-id": "x" * 1000})) == Hints()
