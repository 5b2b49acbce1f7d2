"""The command: a user's mistake is one line on stderr and status 2, never a traceback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.cli import greeting

ROOT = Path(__file__).parents[2]


def chatfold(
    *arguments: str, cwd: Path, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CHATFOLD_")}
    clean |= {"PYTHONPATH": str(ROOT), **(environ or {})}
    command = [sys.executable, "-m", "proxy", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=100, check=False
    )


def mistake(*arguments: str, cwd: Path, environ: dict[str, str] | None = None) -> str:
    result = chatfold(*arguments, cwd=cwd, environ=environ)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("chatfold: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_an_unknown_flag_names_the_nearest(tmp_path: Path) -> None:
    assert "--port" in mistake("serve", "--prot", "1", cwd=tmp_path)


def test_an_unknown_verb(tmp_path: Path) -> None:
    assert "serv" in mistake("serv", cwd=tmp_path)


def test_a_wrong_value_says_what_is_wanted(tmp_path: Path) -> None:
    message = mistake("serve", "--port", "many", cwd=tmp_path)
    assert "port must be a whole number from 0 to 65535, not 'many' (given as --port)" in message


def test_an_unknown_key_names_the_nearest_and_the_file(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("prot = 1\n")
    message = mistake("serve", "--config", "my.toml", cwd=tmp_path)
    assert "unknown key 'prot' in my.toml: did you mean 'port'?" in message


def test_an_unknown_variable_names_the_nearest(tmp_path: Path) -> None:
    message = mistake("serve", cwd=tmp_path, environ={"CHATFOLD_MODLE": "x"})
    assert "did you mean 'CHATFOLD_MODEL'?" in message


def test_a_missing_model(tmp_path: Path) -> None:
    message = mistake("serve", "--model", "none.gguf", cwd=tmp_path)
    assert "the model none.gguf cannot be read: No such file or directory" in message


def test_a_model_that_is_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("<html>")
    assert "x.gguf is not a GGUF file" in mistake("serve", "--model", "x.gguf", cwd=tmp_path)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--lora none.gguf:0.5", "engine.lora: the adapter none.gguf cannot be read: No such"),
        ("--lora tiny.gguf,page.gguf", "engine.lora: the adapter page.gguf is not a GGUF file"),
        ("--lora tiny.gguf:inf", "engine.lora: inf is no scale for the adapter tiny.gguf"),
        ("--chat-template no.jinja", "engine.chat_template: the file no.jinja cannot be read: No"),
        ("--cache-type-v q8_0 --flash-attention off", "engine.cache_type_v q8_0 needs flash"),
        ("--cache-type-k q9", "engine.cache_type_k must be one of f32, f16, bf16, q8_0, q5_1,"),
        ("--tensor-split 1,x", "engine.tensor_split must be a list, each item a number from 0 to"),
        ("--gpu-layers -2", "engine.gpu_layers must be a whole number of -1 or more, not '-2'"),
    ],
)
def test_a_setting_of_the_engine_that_cannot_be_stops_the_start(
    tmp_path: Path, tiny_model: str, flags: str, told: str
) -> None:
    (tmp_path / "page.gguf").write_text("<html>")
    data = str(tmp_path / "data")
    serve = ("serve", "--model", tiny_model, "--data", data)
    assert told in mistake(*serve, *flags.split(), cwd=tmp_path)


@pytest.fixture
def tiny_model(tmp_path: Path) -> str:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    return "tiny.gguf"


def test_a_port_in_use(tmp_path: Path, tiny_model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        data = str(tmp_path / "data")
        message = mistake(
            "serve", "--model", tiny_model, "--port", port, "--data", data, cwd=tmp_path
        )
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in message


def test_a_data_directory_that_is_a_file(tmp_path: Path, tiny_model: str) -> None:
    message = mistake("serve", "--model", tiny_model, "--data", tiny_model, cwd=tmp_path)
    assert "the data directory tiny.gguf cannot be made: File exists" in message


def test_help_and_version(tmp_path: Path) -> None:
    assert chatfold("--version", cwd=tmp_path).stdout.startswith("chatfold")
    shown = chatfold("serve", "--help", cwd=tmp_path)
    assert shown.returncode == 0
    for flag in ("host", "port", "data", "model", "n-ctx", "policy", "upstream", "api-key"):
        assert f"--{flag} " in shown.stdout
    assert chatfold(cwd=tmp_path).returncode == 2


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("box", "box")],
)
def test_the_greeting_is_the_line_to_set(host: str, shown: str) -> None:
    first, second = greeting(host, 81).splitlines()
    assert first == f"OPENAI_REVERSE_PROXY=http://{shown}:81/v1"
    assert "http://host.docker.internal:81/v1" in second
    assert ("0.0.0.0" in second) == (host != "0.0.0.0")


SERVE_A_STREAM = """
from starlette.applications import Starlette
from starlette.routing import Route
from proxy.cli import _listen, _run
from proxy.config import Config, TimeoutsConfig
from proxy.disconnect import EventStream

async def forever():
    try:
        while True:
            yield b"data: 1\\n\\n"
            await anyio.sleep(0.01)
    finally:
        print("stopped", flush=True)

import anyio
config = Config(port=0, timeouts=TimeoutsConfig(drain_s=0))
with _listen(config) as listener:
    print(listener.getsockname()[1], flush=True)
    _run(Starlette(routes=[Route("/", lambda r: EventStream(forever()))]), config, listener)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_running_streams_and_the_process_cleanly(number: int) -> None:
    command = [sys.executable, "-c", SERVE_A_STREAM]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        with socket.create_connection(address, timeout=60) as client:
            client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert client.recv(100)
            process.send_signal(number)
            assert process.stdout.readline() == "stopped\n"
        assert process.wait(60) == 0
