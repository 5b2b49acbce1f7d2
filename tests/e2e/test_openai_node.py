"""The openai package for JavaScript against the proxy: what it reads, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.engine.tiny_bert import write_bert

from .asked import CHAT, EMBEDDED, STREAMED, TEXT, VECTORS
from .serving import ROOT, Proxy, serving

pytestmark = pytest.mark.node

SOURCE = Path(__file__).parent / "node"
INSTALLED = ROOT / ".node"
FILES = ("package.json", "package-lock.json", "client.mjs", "ask.mjs", "tsconfig.json")
INSTALL = ("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts")
INSTALL_S = 90
RUN_S = 100

Chunk = dict[str, Any]

TYPES = """
import type { ChatCompletion, ChatCompletionChunk, Completion, CompletionChoice }
  from "openai/resources";
import type { CreateEmbeddingResponse, Model } from "openai/resources";

// The package has one type for whole texts and for pieces of them: a piece has no reason yet.
type Reason = CompletionChoice["finish_reason"];
type Open = Omit<CompletionChoice, "finish_reason"> & { finish_reason: Reason | null };
type TextPiece = Omit<Completion, "choices"> & { choices: Open[] };
"""
WHOLE = {CHAT: "ChatCompletion", TEXT: "Completion", VECTORS: "CreateEmbeddingResponse"}
PIECES = {CHAT: "ChatCompletionChunk", TEXT: "TextPiece"}


@pytest.fixture(scope="session")
def node() -> Path:
    """The directory with the client and what it needs, in .node/ at the repository's root."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("Node.js with npm is not installed")
    INSTALLED.mkdir(exist_ok=True)
    fresh = not _same("package-lock.json") or not (INSTALLED / "node_modules").is_dir()
    for name in FILES:
        shutil.copyfile(SOURCE / name, INSTALLED / name)
    if fresh:
        _install()
    return INSTALLED


def _same(name: str) -> bool:
    there = INSTALLED / name
    return there.exists() and there.read_bytes() == (SOURCE / name).read_bytes()


def _install() -> None:
    try:
        done = subprocess.run(
            INSTALL, cwd=INSTALLED, capture_output=True, text=True, timeout=INSTALL_S, check=False
        )
        trouble = done.stderr.strip() if done.returncode else ""
    except subprocess.TimeoutExpired:
        trouble = f"no end after {INSTALL_S} s"
    # npm may have touched the lock file: what is compared next time is ours.
    shutil.copyfile(SOURCE / "package-lock.json", INSTALLED / "package-lock.json")
    if trouble:
        shutil.rmtree(INSTALLED / "node_modules", ignore_errors=True)
        pytest.skip(f"npm cannot install the openai package here: {trouble[-300:]}")


def run(node: Path, proxy: Proxy, mode: str) -> list[Any]:
    """The JSON lines that the client printed."""
    command = ["node", "client.mjs", f"{proxy.url}/v1", mode]
    done = subprocess.run(
        command, cwd=node, capture_output=True, text=True, timeout=RUN_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_whole_answer(node: Path, shared: Proxy) -> None:
    (completion,) = run(node, shared, "whole")
    assert completion["object"] == "chat.completion"
    assert completion["model"] == "gpt-4o-mini"
    (choice,) = completion["choices"]
    assert choice["index"] == 0
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert completion["usage"]["completion_tokens"] == 8


def test_a_stream_chunk_by_chunk(node: Path, shared: Proxy) -> None:
    chunks: list[Chunk] = run(node, shared, "stream")
    *parts, usage = chunks
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in parts]
    assert choices[0]["delta"]["role"] == "assistant"
    assert "".join(c["delta"].get("content", "") for c in choices).strip()
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    assert "cached_tokens" in usage["usage"]["prompt_tokens_details"]


def test_its_own_helper_gathers_a_stream(node: Path, shared: Proxy) -> None:
    (completion,) = run(node, shared, "helper")
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert completion["choices"][0]["message"]["content"]


def test_the_models(node: Path, shared: Proxy) -> None:
    (model,) = run(node, shared, "models")
    assert model["object"] == "model"
    assert model["id"]


def test_an_error_reaches_the_caller_whole(node: Path, shared: Proxy) -> None:
    (error,) = run(node, shared, "refused")
    assert error["status"] == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == "messages"
    assert "at least one message" in error["message"]


@pytest.mark.parametrize(("mode", "word"), [("abort", "aborted"), ("leave", "left")])
def test_an_aborted_stream_leaves_the_engine_idle(
    node: Path, shared: Proxy, mode: str, word: str
) -> None:
    shared.wait_idle()
    since = len(shared.events())
    assert run(node, shared, mode) == [word]
    shared.wait_for_event("cancelled", lambda e: e["event"] == "request_cancelled", since=since)
    shared.wait_idle()
    assert shared.chat([{"role": "user", "content": "Still there?"}], max_tokens=1)


# -- its types -----------------------------------------------------------------------------------


def test_all_that_it_reads_is_of_the_types_it_declares(
    node: Path, shared: Proxy, tmp_path: Path
) -> None:
    """Its own compiler says so. Each value is a literal, so a field that no type declares is an
    error, like one that is missing or of another type."""
    read = ask(node, shared, STREAMED)
    bert = write_bert(tmp_path / "bert.gguf")
    with serving(tmp_path, "--model", str(bert), "--n-ctx", "64") as proxy:
        read += ask(node, proxy, EMBEDDED)
    whole = [r for r in read if not r["streamed"]]
    assert {r["name"] for r in whole} == {*STREAMED, *EMBEDDED, "models"}
    assert {r["name"] for r in read if r["streamed"]} == {*STREAMED}
    assert compiled(node, [literal(type_of(r), r["value"]) for r in read]) == ""
    # Nothing of this is due to a compiler that takes anything.
    chat, text = (next(r["value"] for r in whole if r["name"] == n) for n in ("chat", "text"))
    piece = next(r["value"] for r in read if r["streamed"] and r["name"] == "text")
    assert piece["choices"][0]["finish_reason"] is None
    wrong = [
        literal("ChatCompletion", chat | {"speed": 3}),
        literal("ChatCompletion", chat | {"created": "now"}),
        literal("Completion", {k: v for k, v in text.items() if k != "id"}),
        literal("Completion", piece),
    ]
    assert compiled(node, wrong).count("error TS") == len(wrong)


def ask(node: Path, proxy: Proxy, asked: dict[str, tuple[str, Any]]) -> list[dict[str, Any]]:
    """What the client read of whole answers and pieces, and of the models."""
    done = subprocess.run(
        ["node", "ask.mjs", f"{proxy.url}/v1"],
        cwd=node,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def type_of(read: dict[str, Any]) -> str:
    if read["method"] == "models":
        return "Model"
    return (PIECES if read["streamed"] else WHOLE)[read["method"]]


def literal(type_: str, value: Any) -> str:
    return f"({json.dumps(value)}) satisfies {type_};"


def compiled(node: Path, statements: list[str]) -> str:
    """What the compiler complains of."""
    source = node / "read.ts"
    source.write_text("\n".join((TYPES, *statements)))
    compiler = ["node_modules/.bin/tsc", "--project", "tsconfig.json"]
    done = subprocess.run(
        compiler, cwd=node, capture_output=True, text=True, timeout=RUN_S, check=False
    )
    return done.stdout + done.stderr
