"""The proxy with a simulated model, on a real socket, for tests of its pages."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from memory.context import Context
from proxy.app import create_app
from proxy.config import Config
from proxy.tuning.simulation import SimulatedEngine

HTML = {"accept": "text/html,application/xhtml+xml"}
START_S = 60.0
TEXTS = [
    f"Message {i}: the ferry to harbour {i} leaves at {8 + i % 12}:00 from pier {i}, my grey cat "
    f"Miso comes along, and we take {i + 2} sandwiches for the long way over to the islands."
    for i in range(24)
]
TOKEN = re.compile(r'name="token" value="([0-9a-f]{64})"')


def answer(context: Context) -> str:
    asked = context.messages[-1].text
    return f"You said {len(asked)} characters, beginning with {asked[:24]!r}. I keep that in mind."


def summary(context: Context) -> str:
    return "They spoke of harbours, timetables and a grey cat called Miso."


@dataclass
class Served:
    """A running proxy. `client` keeps cookies, as a browser does."""

    url: str
    app: Any
    engine: SimulatedEngine
    client: httpx.Client = field(repr=False)

    def page(self, path: str, **options: Any) -> httpx.Response:
        headers = HTML | options.pop("headers", {})
        return self.client.get(self.url + path, headers=headers, **options)

    def token(self, path: str = "/inspect/forget") -> str:
        found = TOKEN.search(self.page(path).text)
        assert found, self.page(path).text
        return found[1]

    def act(self, path: str, fields: dict[str, str], **headers: str) -> httpx.Response:
        sent = HTML | {"origin": self.url} | headers
        return self.client.post(self.url + path, data=fields, headers=sent)

    def say(self, texts: Sequence[str], *, key: str = "", **body: Any) -> list[dict[str, str]]:
        """A chat, turn by turn; its messages as the client knows them."""
        messages: list[dict[str, str]] = []
        for text in texts:
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": self.ask(messages, key=key, **body)})
        return messages

    def ask(self, messages: Sequence[dict[str, str]], *, key: str = "", **body: Any) -> str:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        sent = {"messages": list(messages), **body}
        url = f"{self.url}/v1/chat/completions"
        response = httpx.post(url, json=sent, headers=headers, timeout=60, trust_env=False)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["message"]["content"]
        return text

    def wait_idle(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            keeper = self.app.state.keeper
            if not keeper.running and not keeper.pending:
                return
            time.sleep(0.02)
        raise AssertionError("the keeper never rests")

    def only(self) -> str:
        """The id of the newest conversation."""
        found = re.search(r'href="/inspect/c/([^"/?]+)"', self.page("/").text)
        assert found, self.page("/").text
        return found[1]

    def run(self, work: Any) -> Any:
        """A coroutine of the app's own loop, as for its store."""
        return asyncio.run_coroutine_threadsafe(work, self.app.state.loop).result(START_S)


@contextmanager
def served(
    data: Path, *, window_tokens: int = 2000, loaded: bool = True, **settings: Any
) -> Iterator[Served]:
    engine = SimulatedEngine(window_tokens, answer, summary)
    app = create_app(Config(data=data, **settings), engine=engine)
    config = uvicorn.Config(app, port=0, log_config=None, http="h11", ws="none", lifespan="on")
    server = uvicorn.Server(config)

    async def main() -> None:
        app.state.loop = asyncio.get_running_loop()
        await server.serve()

    data.mkdir(parents=True, exist_ok=True)
    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    end = time.monotonic() + START_S
    while not server.started and thread.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    assert server.started, "the server did not start"
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(trust_env=False, timeout=60) as client:
            yield Served(f"http://127.0.0.1:{port}", app, engine, client)
    finally:
        server.should_exit = True
        thread.join(START_S)
