"""Scripted servers that look like llama_cpp.server and llama-server to whoever asks."""

from __future__ import annotations

import re
from typing import Any

from scripted_upstream import Exchange, Script, Upstream, hello

MARK = "<|im_end|>"
SYSTEM = "You are scripted."
WORD = re.compile(re.escape(MARK) + r"|\w+|[^\w\s]|\n")


def tokens(text: str) -> list[int]:
    """A word, a mark or a line break is a token; the end-of-turn mark is token 2."""
    return [2 if word == MARK else 10 + sum(word.encode()) % 1000 for word in WORD.findall(text)]


def render(messages: list[dict[str, str]]) -> str:
    """A template like ChatML, with a system prompt of its own."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM}, *messages]
    lines = [f"[{m['role']}]\n{m['content']}{MARK}\n" for m in messages]
    return "".join(lines) + "[assistant]\n"


def prompt_tokens(messages: list[dict[str, str]]) -> int:
    return len(tokens(render(messages)))


def llama_cpp(chat: Script = hello, *, n_ctx: int = 1000, owner: str = "me") -> Upstream:
    """One that knows neither usage in streams nor its window until a prompt is too long for it."""
    server = Upstream(models={"data": [{"id": "tiny", "owned_by": owner}]})

    async def tokenize(exchange: Exchange) -> None:
        await server.note("tokenize")
        await exchange.reply({"tokens": tokens(exchange.body["input"])})

    async def count(exchange: Exchange) -> None:
        await exchange.reply({"detail": "Method Not Allowed"}, status=405)

    async def complete(exchange: Exchange) -> None:
        n = len(exchange.body["prompt"].split())
        words = (
            f"This model's maximum context length is {n_ctx} tokens, however you requested "
            f"{n + 1} tokens ({n} in your prompt; 1 for the completion)."
        )
        error = {"message": words, "code": "context_length_exceeded"}
        await exchange.reply({"error": error}, status=400)

    async def answer(exchange: Exchange) -> None:
        if exchange.body["stream"]:
            return await chat(exchange)
        messages = exchange.body["messages"]
        await server.note(f"evaluate {sum(len(m['content']) for m in messages)}")
        usage = {"prompt_tokens": prompt_tokens(messages), "completion_tokens": 1}
        await exchange.reply({"choices": [], "usage": usage})

    server.chat = answer
    server.routes = {
        ("POST", "/extras/tokenize"): tokenize,
        ("GET", "/extras/tokenize/count"): count,
        ("POST", "/v1/completions"): complete,
    }
    return server


def llama_server(
    chat: Script = hello, *, slots: int = 2, n_ctx: int = 1000, saves: bool = False
) -> Upstream:
    """One with slots. `log` tells what was warmed in which slot, and which were saved."""
    server = Upstream(chat=chat)
    server.models = {"data": [{"id": "tiny", "owned_by": "llamacpp", "meta": {"n_ctx": n_ctx}}]}
    server.props = {
        "default_generation_settings": {"n_ctx": n_ctx},
        "total_slots": slots,
        "model_path": "/tiny.gguf",
        "build_info": "b1-test",
        "chat_template": "[...]",
        "media_marker": "first",
    }

    async def tokenize(exchange: Exchange) -> None:
        await exchange.reply({"tokens": tokens(exchange.body["content"])})

    async def template(exchange: Exchange) -> None:
        await exchange.reply({"prompt": render(exchange.body["messages"])})

    async def complete(exchange: Exchange) -> None:
        body: dict[str, Any] = exchange.body
        assert body["n_predict"] == 0
        assert body["cache_prompt"]
        await server.note(f"warm {body['id_slot']} {body['prompt']}")
        n = len(tokens(body["prompt"]))
        await exchange.reply({"content": "", "timings": {"cache_n": 3, "prompt_n": n - 3}})

    async def slot(exchange: Exchange) -> None:
        path, _, action = exchange.path.partition("?action=")
        if not saves:
            return await exchange.reply({"error": {"message": "No."}}, status=501)
        if action == "erase":
            await server.note(f"erase {path.rpartition('/')[2]}")
            return await exchange.reply({})
        name = exchange.body["filename"]
        if action == "restore" and f"save {name}" not in server.log:
            return await exchange.reply({"error": {"message": "No such file."}}, status=400)
        await server.note(f"{action} {name}")
        await server.note(f"{action} in {path.rpartition('/')[2]}")
        await exchange.reply({})

    server.routes = {
        ("POST", "/tokenize"): tokenize,
        ("POST", "/apply-template"): template,
        ("POST", "/completion"): complete,
        **{("POST", f"/slots/{n}"): slot for n in range(slots)},
    }
    return server
