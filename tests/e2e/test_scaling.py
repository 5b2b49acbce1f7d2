"""Two proxies behind nginx, as config/nginx.conf has it, before one llama-server."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
START_S = 10.0


@contextmanager
def nginx(directory: Path, ports: list[int]) -> Iterator[str]:
    """The example with other ports and paths; its URL."""
    port = _free_port()
    text = EXAMPLE.read_text().replace("/tmp/", f"{directory}/")
    text = text.replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    for old, new in zip((8081, 8082), ports, strict=True):
        text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
    conf = directory / "nginx.conf"
    conf.write_text(text)
    command = ["nginx", "-p", str(directory), "-c", str(conf), "-g", "daemon off; user root;"]
    with (directory / "nginx.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        _wait(f"http://127.0.0.1:{port}/healthz", directory / "nginx.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(START_S)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _wait(url: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"not there: {url}\n{log.read_text()}")


def say(url: str, messages: list[dict[str, str]], conversation: str) -> httpx.Response:
    """A turn of that conversation; its answer joins the messages."""
    response = httpx.post(
        f"{url}/v1/chat/completions",
        json={"messages": messages, "max_tokens": 12, "temperature": 0},
        headers={"x-conversation-id": conversation},
        timeout=60,
        trust_env=False,
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
        url = stack.enter_context(nginx(tmp_path, ports))

        # Every turn of a conversation goes to one process, and others to the other one.
        chats: dict[str, list[dict[str, str]]] = {f"chat-{i}": [] for i in range(6)}
        served = {name: [0, 0] for name in chats}
        for _ in range(2):
            for name, messages in chats.items():
                before = [turns_of(p) for p in proxies]
                messages.append({"role": "user", "content": f"This is {name}. Say a word."})
                say(url, messages, name)
                for i, proxy in enumerate(proxies):
                    served[name][i] += turns_of(proxy) - before[i]
        assert all(sorted(counts) == [0, 2] for counts in served.values()), served
        assert {counts.index(2) for counts in served.values()} == {0, 1}, served

        # One process goes away: its conversations go on at the other one.
        name = next(name for name, counts in served.items() if counts[0] == 2)
        for proxy in proxies:
            proxy.wait_idle()
        proxies[0].kill()
        messages = chats[name]
        messages.append({"role": "user", "content": "And another word, please."})
        moved = say(url, messages, name)
        stored = proxies[1].stored()[-len(messages) :]
        assert [(m["role"], m["content"].strip()) for m in messages] == [
            (role, said.strip()) for role, said in stored
        ]
        assert "verbatim_turns=3" in moved.headers["x-chatfold-context"]

        # The next turn there is as warm as any.
        proxies[1].wait_idle()
        messages.append({"role": "user", "content": "One more."})
        assert evaluated(say(url, messages, name).json()) < 20
