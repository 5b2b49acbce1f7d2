"""Trees, timelines, snippets and exports, by pure functions."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from memory.calls import Call, text_with_calls
from memory.listing import Twig
from memory.records import MODEL, Node, Summary
from memory.transcript import ASSISTANT, ROOT, USER, Message, extend
from proxy.exports import parse_export
from proxy.pages.exporting import file_name, librechat, markdown, openai_messages
from proxy.pages.importing import nodes_of
from proxy.pages.snippets import snippet
from proxy.pages.timeline import BARS_MOST, WIDTH, draw
from proxy.pages.trees import Tree, turns_of


def node(parent: Node | None, role: str, text: str, at: float = 0.0) -> Node:
    before, depth = (parent.digest, parent.depth + 1) if parent else (ROOT, 0)
    digest = extend(before, Message(role, text))
    return Node(digest, before, depth, role, text, len(text.split()), "t", created_at=at)


def talk(n_turns: int, *, after: Node | None = None, name: str = "m") -> list[Node]:
    nodes: list[Node] = []
    for i in range(2 * n_turns):
        after = node(after, ASSISTANT if i % 2 else USER, f"{name} {i} words here", float(i + 1))
        nodes.append(after)
    return nodes


def twigs(nodes: list[Node]) -> list[Twig]:
    return [
        Twig(n.digest, n.parent, n.depth, n.role, n.n_tokens, n.created_at)
        for n in sorted(nodes, key=lambda n: n.depth)
    ]


def summary(id_: int, nodes: list[Node], *, rank: int = 0, active: bool = True) -> Summary:
    return Summary(
        id=id_,
        conversation="c",
        first_depth=nodes[0].depth,
        last_depth=nodes[-1].depth,
        first_digest=nodes[0].digest,
        last_digest=nodes[-1].digest,
        rank=rank,
        parents=(),
        text=f"Summary {id_}.",
        n_tokens=3,
        tokenizer="t",
        made_by=MODEL,
        model="m",
        policy_digest="p",
        prompt_version="1",
        failed_checks=(),
        duration_s=0.1,
        created_at=1.0,
        activated_at=2.0 if active else None,
    )


def test_a_tree_of_one_branch_is_one_path() -> None:
    nodes = talk(3)
    tree = Tree(twigs(nodes))
    leaf = tree.newest_leaf()
    assert leaf == nodes[-1].digest
    assert [t.digest for t in tree.path(leaf)] == [n.digest for n in nodes]
    assert tree.n_ends == 1
    (branch,) = tree.branches()
    assert (branch.first_depth, branch.last_depth, branch.n_turns, branch.is_end) == (0, 5, 3, True)


def test_forks_stand_below_what_they_fork_from() -> None:
    trunk = talk(2)
    left, right = talk(1, after=trunk[1], name="left"), talk(2, after=trunk[1], name="right")
    tree = Tree(twigs([*trunk, *left, *right]))
    branches = tree.branches()
    assert [b.indent for b in branches] == [0, 1, 1, 1]
    assert sum(b.last_depth - b.first_depth + 1 for b in branches) == len(tree)
    assert tree.n_ends == 3
    assert tree.end_below(trunk[0].digest) in {trunk[-1].digest, left[-1].digest, right[-1].digest}
    assert tree.end_below(b"unknown") is None
    assert tree.path(b"unknown") == ()


def test_turns_cover_the_path_without_gap() -> None:
    path = Tree(twigs(talk(7))).path(talk(7)[-1].digest)
    turns = turns_of(path)
    assert [t.number for t in turns] == list(range(1, 8))
    covered = [d for t in turns for d in range(t.first, t.last + 1)]
    assert covered == list(range(14))


@pytest.mark.parametrize("n_turns", [1, 3, 60, 249, 250, 251, 2000])
def test_a_picture_holds_every_turn_and_stays_within_its_frame(n_turns: int) -> None:
    nodes = talk(n_turns)
    turns = turns_of(twigs(nodes))
    half = nodes[: n_turns // 2 * 2]
    spans = [summary(1, half), summary(2, half, rank=1)] if half else []
    picture = draw(turns, spans, active={2}, n_covered=len(half))
    assert len(picture.bars) <= BARS_MOST
    numbers = [n for b in picture.bars for n in range(b.first.number, b.last.number + 1)]
    assert numbers == list(range(1, n_turns + 1))
    for box in (*picture.bars, *picture.spans):
        assert box.x >= 0 and box.x + box.width <= WIDTH + 0.1
        assert box.y >= 0 and box.y + box.height <= picture.height + 0.1
    verbatim = [b for b in picture.bars if b.kind == "verbatim"]
    assert verbatim and verbatim[-1] is picture.bars[-1]
    assert [s.state for s in picture.spans] == ["past", "active"][: len(spans)]


def test_an_empty_conversation_has_an_empty_picture() -> None:
    assert draw((), (), active=(), n_covered=0).bars == ()


def test_a_snippet_marks_what_was_typed_and_loses_nothing() -> None:
    rng = random.Random(5)
    for _ in range(300):
        text = " ".join(rng.choice(["Miso", "the", "a.b", "<b>", "(x", "日本"]) for _ in range(60))
        typed = " ".join(rng.choice(["miso", "b>", "(", "a.", "日", "nothing"]) for _ in range(2))
        pieces = snippet(text, typed)
        shown = "".join(p for p, _ in pieces).strip("…")
        assert shown in " ".join(text.split())
        assert all(p.lower() in typed.lower().split() for p, marked in pieces if marked)


def test_file_names_hold_nothing_that_could_lead_elsewhere() -> None:
    for name in ("../../etc/passwd", 'a"; x="b', "a\r\nset-cookie: x", "", "日本", "/" * 300):
        made = file_name(name, ".md")
        assert made.startswith("chatfold-") and made.endswith(".md")
        assert set(made) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.")
        assert made.count(".") == 1


def test_what_is_exported_for_librechat_comes_back_the_same() -> None:
    trunk = talk(3)
    nodes = [*trunk, *talk(1, after=trunk[1], name="fork")]
    (back,) = parse_export(json.dumps(librechat("c", "A chat", nodes)).encode(), name="x")
    assert back.title == "A chat"
    assert {n.digest for n in nodes_of(back)} == {n.digest for n in nodes}
    assert len(back.leaves()) == 2


def test_what_is_exported_as_openai_messages_comes_back_the_same() -> None:
    nodes = talk(2)
    call = text_with_calls("Let me look.", [Call("weather", '{"city": "Paris"}')])
    nodes.append(node(nodes[-1], USER, "Weather?"))
    nodes.append(node(nodes[-1], ASSISTANT, call))
    nodes.append(node(nodes[-1], "tool", "rain"))
    nodes.append(node(nodes[-1], ASSISTANT, "It rains."))
    nodes = [replace(n, front="Be kind.") if n.role == USER else n for n in nodes]
    made = openai_messages(nodes)
    assert made["messages"][0] == {"role": "system", "content": "Be kind."}
    calls = made["messages"][6]["tool_calls"]
    assert calls[0]["id"] == made["messages"][7]["tool_call_id"]
    (back,) = parse_export(json.dumps(made).encode(), name="x")
    assert back.system == "Be kind."
    assert [n.digest for n in nodes_of(back)] == [n.digest for n in nodes]


def test_markdown_holds_every_message_and_summary() -> None:
    nodes = talk(2)
    text = markdown("Title\nwith a break", nodes, [summary(1, nodes[:2])])
    assert text.startswith("# Title with a break\n")
    assert "> Summary 1." in text
    assert all(n.text in text for n in nodes)


def test_questions_without_an_answer_are_not_imported() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    (chat,) = parse_export(json.dumps(messages).encode(), name="x")
    assert [n.text for n in nodes_of(chat)] == ["a", "b"]
