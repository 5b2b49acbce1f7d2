"""Every value that OPENAI_REVERSE_PROXY may have leads to the chat."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.librechat.paths import CHAT, COMPLETIONS, EMBEDDINGS, MODELS, route_of

CHAT_PATHS = (
    "/chat/completions",
    "//chat/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/",
    "/v1//chat/completions",
    "/v1/chat/completions/chat/completions",
    "/anything/v1/chat/completions",
    "/a/b/c/v1/chat/completions",
    "/api/v1/chat/completions",
    "/",
    "",
    "/v1",
    "/v1/",
    "/anything/v1",
)
MODEL_PATHS = (
    "/models",
    "//models",
    "/models/",
    "/v1/models",
    "/v1//models",
    "/anything/v1/models",
    "/v1/chat/completions/models",
)
NOWHERE = ("/v1/chat", "/chat", "/v1/responses", "/anything", "/v1/audio/speech", "/v2")
OURS = ("/healthz", "/readyz", "/metrics", "/api/status", "/api/context", "/api/conversations")


@pytest.mark.parametrize("path", CHAT_PATHS)
def test_a_chat_is_posted_to_any_of_these(path: str) -> None:
    assert route_of(path, "POST") == CHAT


@pytest.mark.parametrize("path", MODEL_PATHS)
def test_models_are_read_from_whatever_ends_so(path: str) -> None:
    assert route_of(path, "GET") == MODELS
    assert route_of(path, "HEAD") == MODELS


@pytest.mark.parametrize("path", ["/v1/completions", "/completions", "/x/v1/completions"])
def test_the_legacy_completions(path: str) -> None:
    assert route_of(path, "POST") == COMPLETIONS


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings", "/x/v1/embeddings"])
def test_embeddings(path: str) -> None:
    assert route_of(path, "POST") == EMBEDDINGS


@pytest.mark.parametrize("path", [*NOWHERE, *OURS])
def test_other_paths_stay_what_they_are(path: str) -> None:
    assert route_of(path, "POST") is None
    assert route_of(path, "GET") is None


def test_a_chat_is_not_read_and_models_are_not_posted() -> None:
    assert route_of("/v1/chat/completions", "GET") is None
    assert route_of("/v1/models", "POST") is None
    assert route_of("/v1/models", "DELETE") is None


@given(st.text(), st.sampled_from(["GET", "POST"]))
def test_any_path_is_one_of_the_routes_or_none(path: str, method: str) -> None:
    assert route_of(path, method) in (None, CHAT, COMPLETIONS, EMBEDDINGS, MODELS)


@given(st.lists(st.text("ab1v/", max_size=4), max_size=4))
def test_any_prefix_may_stand_before_it(prefix: list[str]) -> None:
    base = "/".join(["", *prefix])
    assert route_of(f"{base}/v1/chat/completions", "POST") == CHAT
    assert route_of(f"{base}/v1/models", "GET") == MODELS
