"""Every form of the URL, and titles in every shape and at every moment."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from bench import events
from bench.bounds import Check, at_least, at_most
from bench.servers import Chatfold

BASES = ("", "/", "/v1", "/v1/", "/v1/chat/completions", "/anything/v1", "/a/b/v1/")
FIELDS = {"language": {"type": "string"}, "title": {"type": "string"}}
SCHEMA = {"type": "object", "properties": FIELDS, "required": list(FIELDS)}

Body = dict[str, Any]


def says(text: str) -> list[Body]:
    return [{"role": "user", "content": text}]


def _quote(user: str, answer: str) -> str:
    return f'||>User:\n"{user}"\n||>Response:\n"{json.dumps(answer)}"'


def v0_6_function(user: str, answer: str) -> Body:
    text = "Write a concise title for this conversation in the given language.\n"
    system = {"role": "system", "content": text + _quote(user, answer)}
    parameters = {"type": "object", "properties": {"title": FIELDS["title"]}}
    function = {"name": "output_formatter", "parameters": parameters}
    return {"messages": [system, *says("Language: English")], "functions": [function]}


def v0_7_text(user: str, answer: str) -> Body:
    text = "Please generate a concise, 5-word-or-less title for the conversation.\n\n"
    content = f"{text}{_quote(user, answer)}\n\n||>Title:"
    return {"messages": [{"role": "system", "content": content}], "max_tokens": 16}


def now_text(user: str, answer: str) -> Body:
    text = (
        "Provide a concise, 5-word-or-less title for the conversation, using title case "
        "conventions. Only return the title itself.\n\nConversation:\n"
    )
    return {"messages": says(f"{text}User: {user}\nAI: {answer}")}


def now_json(user: str, answer: str) -> Body:
    text = (
        "Analyze this conversation and provide:\n1. The detected language of the conversation\n\n"
    )
    wanted = {"type": "json_schema", "json_schema": {"name": "extract", "schema": SCHEMA}}
    return {"messages": says(f"{text}User: {user}\nAI: {answer}"), "response_format": wanted}


def now_tool(user: str, answer: str) -> Body:
    function = {"type": "function", "function": {"name": "extract", "parameters": SCHEMA}}
    return {"messages": now_json(user, answer)["messages"], "tools": [function]}


SHAPES: tuple[Callable[[str, str], Body], ...] = (
    v0_6_function,
    v0_7_text,
    now_text,
    now_json,
    now_tool,
)


def post(chatfold: Chatfold, body: Body, path: str = "/v1/chat/completions") -> Any:
    return chatfold.client.post(chatfold.url + path, json={"model": "m", "user": "u1", **body})


def title_in(reply: Any) -> str:
    """The title where that shape has it; "" where it is not."""
    try:
        message = reply.json()["choices"][0]["message"]
        call = message.get("function_call") or (message.get("tool_calls") or [{}])[0].get(
            "function"
        )
        text: str = call["arguments"] if call else message["content"]
        return str(json.loads(text)["title"] if text.startswith("{") else text)
    except (KeyError, ValueError, TypeError):
        return ""


# -- URLs ----------------------------------------------------------------------------------------


def urls(chatfold: Chatfold) -> tuple[dict[str, Any], list[Check]]:
    table = {base or "(nothing)": _through(chatfold, base) for base in BASES}
    good = {"chat": "200 chat.completion", "direct": "200 chat.completion"}
    good |= {"title": "200 title", "models": "200 list"}
    right = sum(row == good for row in table.values())
    wrong = post(chatfold, {}, "/v1/chats").json()["error"]["message"]
    table["wrong path"] = {"chat": wrong}
    return table, [at_least("forms of the URL that work in full", right, len(BASES))]


def _through(chatfold: Chatfold, base: str) -> dict[str, str]:
    direct = base.removesuffix("/chat/completions") or "/"
    listed = chatfold.client.get(f"{chatfold.url}{base.removesuffix('/chat/completions')}/models")
    title = post(chatfold, now_text("What is a cat?", ""), f"{base}/chat/completions")
    ask = {"messages": says("Hi."), "max_tokens": 1}
    found = {
        name: post(chatfold, ask, path)
        for name, path in (("chat", f"{base}/chat/completions"), ("direct", direct))
    }
    return {name: f"{r.status_code} {r.json().get('object')}" for name, r in found.items()} | {
        "title": f"{title.status_code} {title.headers.get('x-chatfold-side')}",
        "models": f"{listed.status_code} {listed.json().get('object')}",
    }


# -- titles --------------------------------------------------------------------------------------


def titles(chatfold: Chatfold) -> tuple[dict[str, Any], list[Check]]:
    rows = [_titled(chatfold, shape, when) for shape in SHAPES for when in WHEN]
    checks = [
        at_least("titles that came in the shape asked for", sum(map(_came, rows)), len(rows)),
        at_most("titles that began before the answer had ended", _count(rows, "early"), 0),
        at_most("answers that were cut", _count(rows, "cut"), 0),
        at_most("turn 2: most tokens beyond its own", max(r["turn_2_extra"] for r in rows), 1),
    ]
    return {"rows": rows}, checks


def _came(row: dict[str, Any]) -> bool:
    return bool(row["title"])


def _count(rows: list[dict[str, Any]], name: str) -> int:
    return sum(bool(row[name]) for row in rows)


WHEN = ("before", "during", "after")
WAIT_S = {"before": 0.0, "during": 0.3, "after": 0.0}
ANSWER_TOKENS = 32


def _titled(chatfold: Chatfold, shape: Callable[[str, str], Body], when: str) -> dict[str, Any]:
    """A chat of two turns with a title request 4 ms before, in, or after the first answer."""
    chatfold.wait_until_idle()
    since = len(events.read(chatfold.trace))
    question = f"My name is Ada {uuid4().hex[:6]}. What does a lighthouse keeper do all day?"
    titled: list[Any] = []

    def ask_title(answer: str = "") -> None:
        titled.append(post(chatfold, shape(question, answer)))

    # The end of an answer is banned: so it is known how long it must be.
    options = {"max_tokens": ANSWER_TOKENS, "logit_bias": {"2": -100}}
    beside = threading.Timer(WAIT_S[when], ask_title)
    if when == "before":
        beside.start()
        time.sleep(0.004)
    elif when == "during":
        beside.start()
    first = post(chatfold, {"messages": says(question), **options}).json()
    message = first["choices"][0]["message"]
    if when == "after":
        ask_title(message["content"])
    else:
        beside.join()
    trace = events.read(chatfold.trace)[since:]
    again = [*says(question), {"role": "assistant", "content": message["content"]}, *says("Why?")]
    second = post(chatfold, {"messages": again, "max_tokens": 1}).json()["usage"]
    evaluated = second["prompt_tokens"] - second["prompt_tokens_details"]["cached_tokens"]
    new = second["prompt_tokens"] - first["usage"]["total_tokens"]
    return {
        "shape": shape.__name__,
        "when": when,
        "title": title_in(titled[0]),
        "early": _early(trace),
        "cut": first["usage"]["completion_tokens"] < ANSWER_TOKENS,
        "turn_2_new": new,
        # The last token of an answer is never evaluated before the next turn.
        "turn_2_extra": evaluated - new,
    }


def _early(trace: list[events.Event]) -> bool:
    done = [e["t"] for e in trace if e["event"] == "request_done" and e["cls"] == "chat"]
    began = [e["t"] for e in trace if e["event"] == "request_started" and e["cls"] == "side"]
    return bool(began) and min(began) < done[0]
