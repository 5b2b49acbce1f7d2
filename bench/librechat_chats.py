"""Chats as versions 0.6 and now send them: windows that slide, the time after the answer, Stop."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any
from uuid import uuid4

from bench import events
from bench.bounds import Check, at_least, at_most
from bench.librechat_older import LABELS, SAMPLING, Chat, pruned, v0_6
from bench.librechat_side import Body, post, says
from bench.servers import HOST, Chatfold

TURNS = 40
LIMIT_TOKENS = 2000
STOPS = 20
PACED_TURNS = 16
UNPACED_TURNS = 8
SYSTEM = "You are terse."


def note(n: int) -> str:
    return f"Note {n:02}. " + "The keeper writes that the lamp was lit and the sea was calm. " * 5


def now(chat: Chat) -> list[Body]:
    """Lists of parts."""
    parts = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in chat]
    return [{"role": "system", "content": SYSTEM}, *parts]


# -- windows that slide --------------------------------------------------------------------------


def slide_0_6(chatfold: Chatfold) -> tuple[dict[str, Any], list[Check]]:
    options = {"stop": LABELS, **SAMPLING}
    return _slide(chatfold, lambda chat: v0_6(chat, SYSTEM), options)


def slide_now(chatfold: Chatfold) -> tuple[dict[str, Any], list[Check]]:
    return _slide(chatfold, now, {})


def _slide(
    chatfold: Chatfold, wire: Callable[[Chat], list[Body]], options: Body
) -> tuple[dict[str, Any], list[Check]]:
    chat: Chat = []
    rows: list[dict[str, int]] = []
    for n in range(TURNS):
        chat.append(("user", note(n)))
        sent = pruned(chat, LIMIT_TOKENS)
        body = {"messages": wire(sent), "max_tokens": 10, **options}
        reply = post(chatfold, body).json()
        usage = reply["usage"]
        chat.append(("assistant", reply["choices"][0]["message"]["content"]))
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        rows.append(
            {
                "sent_messages": len(sent),
                "prompt": usage["prompt_tokens"],
                "evaluated": usage["prompt_tokens"] - cached,
                "total": usage["total_tokens"],
            }
        )
        chatfold.wait_until_idle()
    new = rows[1]["prompt"] - rows[0]["total"]
    evaluated = [row["evaluated"] for row in rows[1:]]
    slid = sum(row["sent_messages"] < 2 * n + 1 for n, row in enumerate(rows))
    ratio = sum(evaluated) / (new * len(evaluated))
    figures = {
        "turns": TURNS,
        "turns_with_a_window_that_slid": slid,
        "new_tokens_a_turn": new,
        "evaluated_a_turn": evaluated,
        "amplification": round(ratio, 4),
        "worst_turn": round(max(evaluated) / new, 3),
        "longest_prompt": max(row["prompt"] for row in rows),
    }
    answered = sum(bool(text.strip()) for role, text in chat if role == "assistant")
    return figures, [
        at_least("turns answered", answered, TURNS),
        at_least("turns with a window that slid", slid, 10),
        at_most("evaluated / new tokens", ratio, 1.05),
    ]


# -- after the answer ----------------------------------------------------------------------------


def after_the_answer(chatfold: Chatfold) -> tuple[dict[str, Any], list[Check]]:
    """Engine seconds in the background until idle, as a share of the answer's own, turn by turn;
    then the same chat without a pause: how long a request waits for background work."""
    shares = []
    chat: Chat = []
    for n in range(PACED_TURNS):
        since = len(events.read(chatfold.trace))
        _say(chatfold, chat, note(n))
        chatfold.wait_until_idle()
        trace = events.read(chatfold.trace)[since:]
        shares.append((_engine_s(trace, "background"), _engine_s(trace, "chat")))
    since = len(events.read(chatfold.trace))
    for n in range(PACED_TURNS, PACED_TURNS + UNPACED_TURNS):
        _say(chatfold, chat, note(n))
    chatfold.wait_until_idle()
    visits = events.chat_visits(events.read(chatfold.trace)[since:])
    busy = [visit for visit in visits if visit.found_busy]
    background, own = sum(b for b, _ in shares), sum(c for _, c in shares)
    figures = {
        "background_s_a_turn": [round(b, 3) for b, _ in shares],
        "answer_s_a_turn": [round(c, 3) for _, c in shares],
        "background_share_median": round(median(b / c for b, c in shares), 3),
        "background_share_in_all": round(background / own, 3),
        "requests_that_came_into_background_work": len(busy),
        "their_wait_ms_median": round(1000 * median([v.waited_s for v in busy] or [0.0]), 2),
        "their_wait_ms_most": round(1000 * max([v.waited_s for v in busy] or [0.0]), 2),
        "background_batches_begun_while_they_waited": sum(v.background_batches for v in busy),
    }
    return figures, [
        at_least("requests that came into background work", len(busy), 1),
        at_most(
            "background batches begun while a request waited or was answered",
            sum(v.background_batches for v in visits),
            0,
        ),
    ]


def _say(chatfold: Chatfold, chat: Chat, text: str) -> None:
    chat.append(("user", text))
    body = {"messages": now(chat), "max_tokens": 32}
    reply = post(chatfold, body).json()
    chat.append(("assistant", reply["choices"][0]["message"]["content"]))


def _engine_s(trace: Sequence[events.Event], cls: str) -> float:
    """Seconds from the beginning of each batch of this class to whatever happened next."""
    return sum(b["t"] - a["t"] for a, b in pairwise(trace) if _is_batch(a, cls))


def _is_batch(event: events.Event, cls: str) -> bool:
    return bool(event["event"] == "batch" and event["cls"] == cls)


# -- Stop ----------------------------------------------------------------------------------------


def stop(chatfold: Chatfold) -> tuple[dict[str, Any], list[Check]]:
    """From closing the socket to the model being free, in milliseconds."""
    words = " ".join(str(n) for n in range(500))
    prefill = [_stopped(chatfold, words, at="batch") for _ in range(STOPS)]
    answer = [_stopped(chatfold, "Count on.", at="first_token") for _ in range(STOPS)]
    figures = {
        name: {"median_ms": round(median(found), 1), "most_ms": round(max(found), 1)}
        for name, found in (("prefill", prefill), ("answer", answer))
    }
    return figures, [at_most("ms until the model is free, most", max(prefill + answer), 100)]


def _stopped(chatfold: Chatfold, text: str, *, at: str) -> float:
    chatfold.wait_until_idle()
    since = len(events.read(chatfold.trace))
    bias = {"2": -100}
    body = {"messages": says(f"{uuid4().hex} {text}"), "stream": True, "logit_bias": bias}
    data = json.dumps(body).encode()
    port = int(chatfold.url.rpartition(":")[2])
    with socket.create_connection((HOST, port)) as client:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
        client.sendall(head % len(data) + data)
        _wait(chatfold, since, at)
        time.sleep(0.05)
        closed = time.monotonic()
    gone = _wait(chatfold, since, "request_cancelled")
    return 1000 * float(gone["t"] - closed)


def _wait(chatfold: Chatfold, since: int, name: str) -> events.Event:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for event in events.read(chatfold.trace)[since:]:
            if event["event"] == name and event["cls"] == "chat":
                return event
        time.sleep(0.002)
    raise TimeoutError(name)
