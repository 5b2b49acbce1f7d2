"""A conversation of thousands of turns and hundreds of summaries, put into a store as it is."""

from __future__ import annotations

from served import Served

from memory.records import MODEL, Node, Summary
from memory.transcript import ASSISTANT, ROOT, USER, Message, extend
from proxy.headers import owner_of

TURNS_A_SUMMARY = 12
VERBATIM_TURNS = 8


def put(house: Served, n_turns: int, *, name: str) -> None:
    """As conversation `name`: all but the newest turns are covered by summaries, merged in pairs as
    far as they go."""
    store, owner = house.app.state.store, owner_of({})
    nodes: list[Node] = []
    parent = ROOT
    for depth in range(2 * n_turns):
        role = ASSISTANT if depth % 2 else USER
        text = f"Message {depth} of {name}, which is long, " + "with some more words " * 12
        digest = extend(parent, Message(role, text))
        nodes.append(Node(digest, parent, depth, role, text, 60, "words", created_at=1.0 + depth))
        parent = digest
    house.run(store.append(owner, nodes, conversation=name))
    step = 2 * TURNS_A_SUMMARY
    starts = range(0, 2 * (n_turns - VERBATIM_TURNS) - step + 1, step)
    spans, rank = [nodes[start : start + step] for start in starts], 0
    while spans:
        for span in spans:
            house.run(store.add_summary(owner, summary(name, span, rank=rank)))
        spans = [left + right for left, right in zip(spans[::2], spans[1::2], strict=False)]
        rank += 1
    ids = [s.id for s in house.run(store.summaries(owner, name))]
    house.run(store.activate(owner, ids))


def summary(name: str, nodes: list[Node], *, rank: int) -> Summary:
    first, last = nodes[0], nodes[-1]
    return Summary(
        id=0,
        conversation=name,
        first_depth=first.depth,
        last_depth=last.depth,
        first_digest=first.digest,
        last_digest=last.digest,
        rank=rank,
        parents=(),
        text=f"They spoke of what stands in messages {first.depth} to {last.depth}.",
        n_tokens=12,
        tokenizer="words",
        made_by=MODEL,
        model="m",
        policy_digest="p",
        prompt_version="1",
        failed_checks=(),
        duration_s=1.0,
        created_at=1.0,
    )
