"""proxy/openapi.json tells of all that is served, and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from proxy import completions, embeddings, wire
from proxy.app import OPENAPI, create_app
from proxy.completions import parse_text
from proxy.config import Config
from proxy.embeddings import parse_embeddings
from proxy.errors import ApiError
from proxy.wire import parse_chat

SPEC: dict[str, Any] = json.loads(OPENAPI.read_text())
SCHEMAS: dict[str, Any] = SPEC["components"]["schemas"]
Parse = Callable[[bytes], object]

BODIES: dict[str, tuple[Parse, type[msgspec.Struct], dict[str, Any]]] = {
    "ChatRequest": (parse_chat, wire._Body, {"messages": [{"role": "user", "content": "Hi."}]}),
    "TextRequest": (parse_text, completions._Body, {"prompt": "Hi."}),
    "EmbeddingsRequest": (parse_embeddings, embeddings._Body, {"input": "Hi."}),
}
REFUSED = {"TextRequest": {"suffix", "echo", "best_of", "max_completion_tokens"}}
"""Fields that are read to be refused, or that only the other route has a use for."""
FIELDS = [(name, field) for name in BODIES for field in SCHEMAS[name]["properties"]]
BOUNDED = [
    (name, field)
    for name, field in FIELDS
    if {"minimum", "maximum"} <= SCHEMAS[name]["properties"][field].keys()
]


def test_the_paths_are_the_routes_of_the_openai_api() -> None:
    app = create_app(Config())
    served = {(r.path, m) for r in app.routes for m in r.methods - {"HEAD"}}  # type: ignore[attr-defined]
    served = {(path, method) for path, method in served if path.startswith("/v1/")}
    told = {(path, m.upper()) for path, methods in SPEC["paths"].items() for m in methods}
    assert told == served


@pytest.mark.parametrize("name", BODIES)
def test_every_field_that_is_read_is_told(name: str) -> None:
    read = set(BODIES[name][1].__struct_fields__) - REFUSED.get(name, set())
    assert SCHEMAS[name]["properties"].keys() == read


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_every_field_that_is_told_is_read(name: str, field: str) -> None:
    """A value of the wrong type is refused by name: so the field is not just skipped."""
    parse, _, body = BODIES[name]
    with pytest.raises(ApiError) as refused:
        parse(json.dumps(body | {field: [{"no": 7}]}).encode())
    assert field == refused.value.param or field in refused.value.message


@pytest.mark.parametrize(("name", "field"), BOUNDED)
def test_bounds_are_those_that_are_kept(name: str, field: str) -> None:
    parse, _, body = BODIES[name]
    body = body | ({"logprobs": True} if field == "top_logprobs" else {})
    bounds = SCHEMAS[name]["properties"][field]
    for bound, beyond in ((bounds["minimum"], -1), (bounds["maximum"], 1)):
        parse(json.dumps(body | {field: bound}).encode())
        with pytest.raises(ApiError) as refused:
            parse(json.dumps(body | {field: bound + beyond}).encode())
        assert refused.value.param == field


def test_many_fields_have_bounds() -> None:
    assert len(BOUNDED) > 20
