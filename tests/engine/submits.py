"""Requests as the scheduler gets them."""

from __future__ import annotations

from typing import Any

from proxy.engines.embedded.protocol import Submit


def greedy(id_: int, max_tokens: int | None, **fields: Any) -> Submit:
    """One chat request of owner `a` that takes the likeliest tokens, but for what `fields` say."""
    usual: dict[str, Any] = dict(
        owner="a",
        priority=0,
        messages=(),
        continues=False,
        keep=True,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        seed=7,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repeat_penalty=1.0,
        logit_bias=(),
        stop=(),
    )
    return Submit(id=id_, max_tokens=max_tokens, **(usual | fields))
