"""docs/openapi.json tells of nothing that is not served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proxy.app import create_app
from proxy.config import Config
from proxy.errors import ApiError
from proxy.wire import parse_chat

SPEC: dict[str, Any] = json.loads((Path(__file__).parents[2] / "docs/openapi.json").read_text())


def test_every_path_is_a_route(tmp_path: Path) -> None:
    routes = {(r.path, m) for r in create_app(Config(data=tmp_path)).routes for m in r.methods}  # type: ignore[attr-defined]
    told = {(path, m.upper()) for path, methods in SPEC["paths"].items() for m in methods}
    assert told <= routes


def test_every_field_of_a_chat_is_one_that_is_read() -> None:
    """A value of the wrong type is refused by name: so the field is not just skipped."""
    operation = SPEC["paths"]["/v1/chat/completions"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    for field in schema["properties"]:
        body = {"messages": [{"role": "user", "content": "Hi."}], field: [[7]]}
        with pytest.raises(ApiError) as refused:
            parse_chat(json.dumps(body).encode())
        assert field in refused.value.message
