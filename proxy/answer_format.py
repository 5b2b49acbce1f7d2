"""`response_format`: what the client wants the answer to be. Pure."""

from __future__ import annotations

import msgspec

from proxy.engines.base import JsonFormat
from proxy.errors import bad_request

PARAM = "response_format"
NOTHING = msgspec.Raw(b"null")


class _JsonSchema(msgspec.Struct, frozen=True):
    """`name`, `description` and `strict` change nothing here: a schema is always kept to."""

    schema: msgspec.Raw = NOTHING


class ResponseFormat(msgspec.Struct, frozen=True):
    """OpenAI's object. `schema` beside `json_object` is llama.cpp's own way to give one."""

    type: str
    json_schema: _JsonSchema | None = None
    schema: msgspec.Raw = NOTHING


def parse_format(wanted: ResponseFormat | None) -> JsonFormat | None:
    """None for plain text. Raises ApiError."""
    match wanted:
        case None | ResponseFormat(type="text"):
            return None
        case ResponseFormat(type="json_object", schema=schema):
            return JsonFormat(_text(schema))
        case ResponseFormat(type="json_schema", json_schema=_JsonSchema(schema=schema)):
            return JsonFormat(_text(schema))
        case ResponseFormat(type="json_schema"):
            raise bad_request("`response_format.json_schema` is missing.", param=PARAM)
    sentence = "`response_format.type` must be text, json_object or json_schema."
    raise bad_request(sentence, param=PARAM)


def _text(schema: msgspec.Raw) -> str:
    text = bytes(schema).decode().strip()
    return "" if text == "null" else text
