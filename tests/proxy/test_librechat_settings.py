"""LibreChat's settings: what doctor says of them, and the line that it says to write."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import Config
from proxy.doctor import Finding
from proxy.doctor_librechat import examine_around, examine_librechat
from proxy.librechat.settings import Here, Remark, check_env, check_yaml, parse_env

ROOT = Path(__file__).parents[2]
HERE = Here("0.0.0.0", 8080)
GOOD = {
    "OPENAI_REVERSE_PROXY": "http://host.docker.internal:8080/v1",
    "OPENAI_API_KEY": "none",
    "OPENAI_MODELS": "chatfold",
}


def wrong(values: dict[str, str], here: Here = HERE) -> dict[str, str]:
    """name -> the line to write, for what is wrong."""
    return {r.name: r.write for r in check_env(values, here) if r.write}


def wrong_yaml(document: Any) -> dict[str, str]:
    return {r.name: r.write for r in check_yaml(document, HERE) if r.write}


def test_nothing_is_wrong_with_what_is_right() -> None:
    assert wrong(GOOD) == {}
    for base in ("http://host.docker.internal:8080", "http://box:9000/v1/chat/completions"):
        assert wrong(GOOD | {"OPENAI_REVERSE_PROXY": base}) == {}


@pytest.mark.parametrize(
    ("value", "write"),
    [
        ("", "OPENAI_REVERSE_PROXY=http://host.docker.internal:8080/v1"),
        ("host.docker.internal:8080", "OPENAI_REVERSE_PROXY=http://host.docker.internal:8080/v1"),
        ("https://127.0.0.1:8080/v1", "OPENAI_REVERSE_PROXY=http://host.docker.internal:8080/v1"),
        ("http://127.0.0.1:8000/v1", "OPENAI_REVERSE_PROXY=http://127.0.0.1:8080/v1"),
        ("http://host.docker.internal/v1", "OPENAI_REVERSE_PROXY=http://host.docker.internal:8080"),
    ],
)
def test_a_wrong_url_gets_the_line_to_write(value: str, write: str) -> None:
    assert wrong(GOOD | {"OPENAI_REVERSE_PROXY": value})["OPENAI_REVERSE_PROXY"].startswith(write)


def test_localhost_is_wrong_in_a_container_only() -> None:
    near = GOOD | {"OPENAI_REVERSE_PROXY": "http://localhost:8080/v1"}
    assert wrong(near) == {}
    in_docker = near | {"MONGO_URI": "mongodb://mongodb:27017/LibreChat"}
    assert "host.docker.internal" in wrong(in_docker)["OPENAI_REVERSE_PROXY"]
    assert wrong(near | {"MONGO_URI": "mongodb://127.0.0.1:27017/LibreChat"}) == {}


def test_a_container_cannot_reach_a_proxy_that_listens_on_the_machine_alone() -> None:
    write = wrong(GOOD, Here("127.0.0.1", 8080))["OPENAI_REVERSE_PROXY"]
    assert write == "chatfold serve --host 0.0.0.0 --api-key KEY"


def test_the_key() -> None:
    assert wrong(GOOD | {"OPENAI_API_KEY": ""}) == {"OPENAI_API_KEY": "OPENAI_API_KEY=none"}
    locked = Here("0.0.0.0", 8080, ("secret-1", "secret-2"))
    assert "OPENAI_API_KEY" in wrong(GOOD, locked)
    assert wrong(GOOD | {"OPENAI_API_KEY": "secret-2"}, locked) == {}
    assert "secret" not in repr(list(check_env(GOOD, locked)))


@pytest.mark.parametrize("name", ["gpt-3.5-turbo", "gpt-4", "llama-2-7b", "Llama-3-8B-Instruct"])
def test_a_name_that_makes_librechat_cut_the_chat(name: str) -> None:
    assert "OPENAI_MODELS=chatfold" in wrong(GOOD | {"OPENAI_MODELS": name})["OPENAI_MODELS"]


@pytest.mark.parametrize("name", ["gpt-4-1106-preview", "gpt-4o-mini", "SmolLM2"])
def test_a_name_that_does_not(name: str) -> None:
    assert wrong(GOOD | {"OPENAI_MODELS": name}) == {}


def test_what_else_stands_in_the_way() -> None:
    values = {"OPENAI_SUMMARIZE": "true", "ENDPOINTS": "google", "PROXY": "http://p:1"}
    assert wrong(GOOD | values | {"OPENAI_FORCE_PROMPT": "True"}) == {
        "OPENAI_SUMMARIZE": "OPENAI_SUMMARIZE=false",
        "OPENAI_FORCE_PROMPT": "OPENAI_FORCE_PROMPT=false",
        "ENDPOINTS": "ENDPOINTS=openAI,google",
        "PROXY": "PROXY=",
    }


def test_the_env_of_the_original_guide() -> None:
    """It wrote comments behind its values, and a name that 0.6 cuts at 4,092 tokens."""
    text = (
        "ENDPOINTS=openAI\nPROXY=\nOPENAI_API_KEY=None\n#DEBUG_OPENAI=true ## if needed\n\n"
        "OPENAI_MODELS=gpt-3.5-turbo\nOPENAI_TITLE_MODEL=gpt-3.5-turbo\n"
        "OPENAI_REVERSE_PROXY=http://host.docker.internal:8080 ## a container\n"
    )
    values = parse_env(text)
    assert values["OPENAI_REVERSE_PROXY"] == "http://host.docker.internal:8080"
    assert "DEBUG_OPENAI" not in values
    assert list(wrong(values)) == ["OPENAI_MODELS"]


def test_quotes_and_comments_are_no_part_of_a_value() -> None:
    text = "A='x # y' # z\nexport B=\"q\"\nC=a#b\nD = e\nnonsense\n=f\n"
    assert parse_env(text) == {"A": "x # y", "B": "q", "C": "a#b", "D": "e"}


@given(st.text())
def test_any_text_is_taken(text: str) -> None:
    list(check_env(parse_env(text), HERE))
    list(examine_librechat(Config(), text + "\n"))


# -- librechat.yaml ------------------------------------------------------------------------------


def test_its_own_summarisation_is_on_unless_it_is_off() -> None:
    write = {"summarization": "summarization: {enabled: false}"}
    assert wrong_yaml({}) == wrong_yaml({"summarization": {"enabled": True}}) == write
    assert wrong_yaml({"summarization": {"enabled": False}}) == {}


def test_a_small_context_and_a_custom_endpoint() -> None:
    off = {"summarization": {"enabled": False}}
    spec = {"name": "mine", "preset": {"maxContextTokens": 4000}}
    assert wrong_yaml({**off, "modelSpecs": {"list": [spec]}}) == {
        "maxContextTokens": "maxContextTokens: 1000000"
    }
    custom = {"name": "fold", "baseURL": "http://host.docker.internal:8080/v1", "summarize": True}
    assert wrong_yaml({**off, "endpoints": {"custom": [custom]}}) == {
        "fold.summarize": "summarize: false"
    }
    bare = {"name": "fold", "baseURL": "localhost:8080"}
    assert "fold.baseURL" in wrong_yaml({**off, "endpoints": {"custom": [bare]}})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: (
            st.lists(x) | st.dictionaries(st.sampled_from(["endpoints", "custom", "list"]), x)
        ),
    )
)
def test_any_document_is_taken(document: Any) -> None:
    assert all(isinstance(r, Remark) for r in check_yaml(document, HERE))


# -- what is in this repository --------------------------------------------------------------------


def test_doctor_finds_nothing_wrong_with_our_own_examples() -> None:
    document = yaml.safe_load((ROOT / "config" / "librechat.yaml").read_text())
    assert wrong_yaml(document) == {}
    values = parse_env((ROOT / "config" / "librechat.env.example").read_text())
    assert wrong(values | {"OPENAI_API_KEY": "k"}) == {}


# -- files and servers -----------------------------------------------------------------------------


def troubles(found: Iterator[Finding]) -> list[str]:
    return [f"{f.subject}: {f.trouble}" for f in found if f.trouble]


def test_a_directory_a_file_or_lines_of_it(tmp_path: Path) -> None:
    config = Config(host="0.0.0.0")
    (tmp_path / ".env").write_text("OPENAI_API_KEY=x\n")
    (tmp_path / "librechat.yaml").write_text("version: [\n")
    in_folder = troubles(examine_librechat(config, str(tmp_path)))
    assert [t.partition(": ")[0].rpartition(" ")[2] for t in in_folder] == [
        "OPENAI_REVERSE_PROXY",
        "librechat.yaml",
    ]
    assert troubles(examine_librechat(config, str(tmp_path / ".env"))) == in_folder[:1]
    assert troubles(examine_librechat(config, "OPENAI_API_KEY=x"))
    assert "cannot be read" in troubles(examine_librechat(config, str(tmp_path / "no")))[0]


@contextmanager
def answering(status: int, body: bytes) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_the_upstream_is_asked_for_its_models() -> None:
    listed = json.dumps({"data": [{"id": "m", "owned_by": "me"}]}).encode()
    with answering(200, listed) as port:
        config = Config(upstream=f"http://127.0.0.1:{port}/v1", port=port)
        upstream, _ = examine_around(config)
    assert not upstream.trouble
    assert "--interrupt_requests false" in upstream.detail
    with answering(404, b'{"detail": "Not Found"}') as port:
        upstream, _ = examine_around(Config(upstream=f"http://127.0.0.1:{port}"))
    assert "is /v1 missing?" in upstream.trouble
    with answering(200, b"<html>") as port:
        upstream, _ = examine_around(Config(upstream=f"http://127.0.0.1:{port}"))
    assert "no JSON" in upstream.trouble
    upstream, proxy = examine_around(Config(upstream="http://127.0.0.1:1", port=1))
    assert "does not answer" in upstream.trouble
    assert not proxy.trouble
    assert "chatfold serve" in proxy.detail


def test_the_running_proxy_says_how_it_is() -> None:
    with answering(200, b'{"status": "ready"}') as port:
        (proxy,) = examine_around(Config(port=port))
        assert "is ready" in proxy.detail
    with answering(503, b'{"status": "the model is not loaded yet"}') as port:
        (proxy,) = examine_around(Config(port=port))
        assert "the model is not loaded yet" in proxy.trouble
