"""The openai package for JavaScript against the proxy: what it reads, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .serving import ROOT, Proxy

pytestmark = pytest.mark.node

SOURCE = Path(__file__).parent / "node"
INSTALLED = ROOT / ".node"
FILES = ("package.json", "package-lock.json", "client.mjs")
INSTALL = ("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts")
INSTALL_S = 90
RUN_S = 100

Chunk = dict[str, Any]


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
