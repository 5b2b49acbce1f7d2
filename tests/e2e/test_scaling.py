"""Two proxies behind nginx, as config/nginx.conf has it, before one llama-server."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.servers import LlamaServer

from .serving import Proxy, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed"),
]

EXAMPLE = Path(__file__).parents[2] / "config/nginx.conf"
START_S = 60.0
CHATS_MOST = 30


@contextmanager
def nginx(directory: Path, ports: list[int]) -> Iterator[httpx.Client]:
    """The example with other ports and paths, on a socket that has a path; a client of it."""
    with tempfile.TemporaryDirectory(prefix="chatfold-nginx-") as short:
        listening = Path(short, "socket")
        transport = httpx.HTTPTransport(uds=str(listening))
        with (
            _nginx(directory, listening, ports),
            httpx.Client(transport=transport, base_url="http://nginx", timeout=60) as client,
        ):
            _wait(client, listening, directory / "nginx.log")
            yield client


@contextmanager
def _nginx(directory: Path, listening: Path, ports: list[int]) -> Iterator[None]:
    text = EXAMPLE.read_text().replace("/tmp/", f"{directory}/")
    text = text.replace("127.0.0.1:8080", f"unix:{listening}")
    for old, new in zip((8081, 8082), ports, strict=True):
        text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
    conf = directory / "nginx.conf"
    conf.write_text(text)
    command = ["nginx", "-p", str(directory), "-c", str(conf), "-g", "daemon off; user root;"]
    with (directory / "nginx.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(START_S)


def _wait(client: httpx.Client, listening: Path, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        with socket.socket(socket.AF_UNIX) as trial, suppress(OSError):
            trial.connect(str(listening))
            assert client.get("/healthz").status_code == 200
            return
        time.sleep(0.05)
    raise AssertionError(f"not there:\n{log.read_text()}")


def say(nginx: httpx.Client, messages: list[dict[str, str]], conversation: str) -> httpx.Response:
    """A turn of that conversation; its answer joins the messages."""
    response = nginx.post(
        "/v1/chat/completions",
        json={"messages": messages, "max_tokens": 12, "temperature": 0},
        headers={"x-conversation-id": conversation},
    )

    assert response.status_code == 200, response.text
    messages.append(response.json()["choices"][0]["message"])
    return response


def turns_of(proxy: Proxy) -> int:
    """Turns that this process has stored."""
    return len(proxy.stored()) // 2


def evaluated(answer: dict[str, Any]) -> int:
    usage = answer["usage"]
    prompt, details = int(usage["prompt_tokens"]), usage["prompt_tokens_details"]
    return prompt - int(details["cached_tokens"])


def test_a_conversation_that_moves_to_the_other_process_goes_on_correctly_only_colder(
    tmp_path: Path,
) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(LlamaServer(tmp_path / "server", window_tokens=1024, slots=2))
        proxies = []
        for name in ("1", "2"):
            directory = tmp_path / name
            directory.mkdir()
            proxies.append(stack.enter_context(serving(directory, "--upstream", server.url)))
        ports = [int(p.url.rpartition(":")[2]) for p in proxies]
        client = stack.enter_context(nginx(tmp_path, ports))

        # Every turn of a conversation goes to one process, and others to the other one. Which
        # one is a matter of the ports: so there are chats until both have some.
        chats: dict[str, list[dict[str, str]]] = {}
        served: dict[str, list[int]] = {}
        while len(chats) < 4 or not all(map(sum, zip(*served.values(), strict=True))):
            assert len(chats) < CHATS_MOST, served
            name = f"chat-{len(chats)}"
            before = [turns_of(p) for p in proxies]
            messages = chats[name] = []
            for _ in range(2):
                messages.append({"role": "user", "content": f"This is {name}. Say a word."})
                say(client, messages, name)
            served[name] = [turns_of(p) - n for p, n in zip(proxies, before, strict=True)]
        assert all(sorted(counts) == [0, 2] for counts in served.values()), served

        # One process goes away: its conversations go on at the other one.
        name = next(name for name, counts in served.items() if counts[0] == 2)
        for proxy in proxies:
            proxy.wait_idle()
        proxies[0].kill()
        messages = chats[name]
        messages.append({"role": "user", "content": "And another word, please."})
        moved = say(client, messages, name)
        stored = proxies[1].stored()[-len(messages) :]
        assert [(m["role"], m["content"].strip()) for m in messages] == [
            (role, said.strip()) for role, said in stored
        ]
        assert "verbatim_turns=3" in moved.headers["x-chatfold-context"]

        # The next turn there is as warm as any.
        proxies[1].wait_idle()
        messages.append({"role": "user", "content": "One more."})
        assert evaluated(say(client, messages, name).json()) < 20
