"""Exports of other programs: every branch is read, and what is no export is one clear sentence."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import exports
from proxy.deep_json import DeepJsonError, parse_deep
from proxy.exports import NO_PARENT, ExportError, parse_export, read_export

Json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def texts(said: tuple[exports.Said, ...]) -> list[tuple[str, str]]:
    return [(s.role, s.text) for s in said]


def message(id_: str, parent: str, text: str, *, user: bool, **more: Any) -> dict[str, Any]:
    head = {"messageId": id_, "parentMessageId": parent, "isCreatedByUser": user, "text": text}
    return head | more


FLAT = [
    message("q1", NO_PARENT, "Hello", user=True, createdAt="2026-01-01T10:00:00.000Z"),
    message("a1", "q1", "Hi", user=False, createdAt="2026-01-01T10:00:01.000Z"),
    message("a2", "q1", "", user=False, createdAt="2026-01-01T10:01:00.000Z"),
    message("q2", "a2", "And now?", user=True, createdAt="2026-01-01T10:02:00.000Z"),
]
FLAT[2]["content"] = [
    {"type": "think", "think": "hmm"},
    {"type": "text", "text": {"value": "Good day"}},
]


def librechat(**more: Any) -> bytes:
    head = {"conversationId": "c-1", "title": "Greeting", "options": {"promptPrefix": "Be kind."}}
    return json.dumps(head | more).encode()


def nested(items: list[dict[str, Any]], parent: str) -> list[dict[str, Any]]:
    return [
        item | {"children": nested(items, item["messageId"])}
        for item in items
        if item["parentMessageId"] == parent
    ]


@pytest.mark.parametrize(
    "data",
    [librechat(messages=FLAT), librechat(messagesTree=nested(FLAT, NO_PARENT), recursive=True)],
    ids=["a list", "a tree"],
)
def test_librechat_keeps_branches_and_the_newest_is_the_one_gone_on_with(data: bytes) -> None:
    (chat,) = parse_export(data, name="x.json")
    assert (chat.kind, chat.id, chat.title, chat.system) == (
        "librechat",
        "c-1",
        "Greeting",
        "Be kind.",
    )
    assert texts(chat.newest()) == [
        ("user", "Hello"),
        ("assistant", "Good day"),
        ("user", "And now?"),
    ]
    assert {s.id for s in chat.leaves()} == {"a1", "q2"}
    assert texts(chat.path("a1")) == [("user", "Hello"), ("assistant", "Hi")]
    assert chat.messages[0].created_at == 1767261600.0


def test_an_error_message_is_left_out_and_what_follows_stays(tmp_path: Path) -> None:
    broken = message("a1", "q1", "Something went wrong", user=False, error=True)
    flat = [FLAT[0], broken, message("q2", "a1", "Again?", user=True)]
    path = tmp_path / "chat.json"
    path.write_bytes(librechat(messages=flat))
    (chat,) = read_export(path)
    assert texts(chat.newest()) == [("user", "Hello"), ("user", "Again?")]


def test_a_recursive_export_of_a_long_chat_nests_deeper_than_parsers_go() -> None:
    n = 3000
    data = b"".join(
        b'{"messageId":"%d","text":"word %d","isCreatedByUser":%s,"children":['
        % (i, i, b"true" if i % 2 == 0 else b"false")
        for i in range(n)
    )
    data = b'{"conversationId":"c","messagesTree":[' + data + b"]}" * n + b"]}"
    with pytest.raises(RecursionError):
        json.loads(data)
    (chat,) = parse_export(data, name="deep.json")
    assert [s.text for s in chat.newest()] == [f"word {i}" for i in range(n)]
    assert chat.leaves()[0].text == f"word {n - 1}"


def test_chatgpt() -> None:
    def node(id_: str, parent: str | None, role: str, text: str) -> dict[str, Any]:
        content = {"content_type": "text", "parts": [text]}
        said = {"author": {"role": role}, "content": content, "create_time": 1.5}
        return {"id": id_, "parent": parent, "message": said if role else None}

    mapping = {
        "root": node("root", None, "", ""),
        "s": node("s", "root", "system", "Be kind."),
        "q": node("q", "s", "user", "Hello"),
        "a": node("a", "q", "assistant", "Hi"),
        "t": node("t", "a", "tool", "a picture"),
        "b": node("b", "t", "assistant", "There you are"),
    }
    (chat,) = parse_export(json.dumps([{"title": "T", "mapping": mapping}]).encode(), name="x")
    assert (chat.kind, chat.title, chat.system) == ("chatgpt", "T", "Be kind.")
    assert [s.text for s in chat.newest()] == ["Hello", "Hi", "There you are"]


MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image_url"}]},
    {"role": "assistant", "content": "I see"},
]


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(MESSAGES),
        json.dumps({"messages": MESSAGES}),
        "\n".join([json.dumps(m) for m in MESSAGES]),
        "\ufeff" + json.dumps([{"messages": MESSAGES}]),
    ],
    ids=["a list", "a body", "messages in lines", "a list of chats"],
)
def test_openai_messages(data: str) -> None:
    (chat,) = parse_export(data.encode(), name="x.json")
    assert (chat.kind, chat.system) == ("openai", "Be kind.")
    assert texts(chat.newest()) == [("user", "Look"), ("assistant", "I see")]


def test_lines_of_chats() -> None:
    line = json.dumps({"messages": MESSAGES})
    assert len(parse_export(f"{line}\n{line}\n".encode(), name="x.jsonl")) == 2


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "x.json is empty."),
        (b"\x89PNG\r\n", "x.json is not JSON"),
        (b"[" * 5000, "x.json is not JSON"),
        (b"3", "x.json is no export that is understood"),
        (b'{"a": 1}', "x.json is no export that is understood"),
        (b'[{"role": "robot", "content": "x"}]', "x.json holds no OpenAI messages"),
        (b'{"conversationId": "c", "messages": {}}', "x.json is no export that is understood"),
        (b'{"conversationId": "c", "messages": []}', "x.json holds no message."),
        (b'{"messages": []}', "x.json holds no message."),
        (b'{"conversationId": "c", "messages": [7, {}]}', "x.json holds no message."),
        (b'{"a": 1}\n{"a": ', "x.json is not JSON in line 2"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "x.json is not JSON"),
    ],
)
def test_what_is_no_export_is_one_sentence(data: bytes, told: str) -> None:
    with pytest.raises(ExportError) as caught:
        parse_export(data, name="x.json")
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportError, match=r"none\.json cannot be read: No such file"):
        read_export(tmp_path / "none.json")
    monkeypatch.setattr(exports, "MAX_EXPORT_BYTES", 10)
    (tmp_path / "large.json").write_bytes(b" " * 11)
    with pytest.raises(ExportError, match="has more than"):
        read_export(tmp_path / "large.json")


@given(Json, st.sampled_from([None, 1]))
def test_deep_json_reads_what_json_reads(value: Any, indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    assert parse_deep(text) == json.loads(text)


@given(Json, st.data())
def test_deep_json_refuses_what_json_refuses(value: Any, data: st.DataObject) -> None:
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text)))
    changed = text[:at] + data.draw(st.sampled_from([",", "]", "}", '"', ":", "x", ""])) + text[at:]
    try:
        wanted = json.loads(changed)
    except ValueError:
        with pytest.raises(DeepJsonError):
            parse_deep(changed)
    else:
        assert parse_deep(changed) == wanted


@given(st.lists(st.tuples(st.integers(-1, 30), st.booleans()), max_size=30))
def test_trees_in_any_order_with_lost_parents_and_circles_hold_together(
    links: list[tuple[int, bool]],
) -> None:
    raw = [
        message(f"m{i}", f"m{parent}" if parent >= 0 else NO_PARENT, f"t{i}", user=user)
        for i, (parent, user) in enumerate(links)
    ]
    try:
        (chat,) = parse_export(librechat(messages=raw), name="x")
    except ExportError:
        return
    seen = {""}
    for said in chat.messages:
        assert said.parent in seen, "each message stands behind its parent"
        assert said.id not in seen
        seen.add(said.id)
    for leaf in chat.leaves():
        path = chat.path(leaf.id)
        assert path[0].parent == ""
        assert all(b.parent == a.id for a, b in pairwise(path))
