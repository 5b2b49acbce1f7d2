"""Any name of a model is a name of the one model: in the list, in answers, and to a server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_upstream import Upstream

from proxy.app import create_app
from proxy.config import Config, LibreChatConfig, RemoteConfig

pytestmark = pytest.mark.anyio

TWO: dict[str, Any] = {
    "data": [{"id": "tiny", "max_model_len": 1000}, {"id": "large", "max_model_len": 9000}]
}
NAMES = ["gpt-4-1106-preview", "house/llama3:8b"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def client(config: Config) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(config)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://chatfold") as opened:
            yield opened


def config(server: Upstream, data: Path, *, model: str = "") -> Config:
    offered = LibreChatConfig(model_names=", ".join([*NAMES, NAMES[0], " "]))
    remote = RemoteConfig(model=model)
    return Config(upstream=server.url, data=data, librechat=offered, remote=remote)


async def test_the_names_of_the_configuration_are_offered_once(tmp_path: Path) -> None:
    server = Upstream()
    async with server.serving(), client(config(server, tmp_path)) as asking:
        listed = (await asking.get("/v1/models")).json()["data"]
    assert [m["id"] for m in listed] == ["chatfold", *NAMES]


@pytest.mark.parametrize("wanted", ["", "large"])
async def test_the_server_is_asked_for_its_one_model_whatever_the_client_calls_it(
    tmp_path: Path, wanted: str
) -> None:
    """The second model is one that the server has: its window is another."""
    server = Upstream(models=TWO)
    async with server.serving(), client(config(server, tmp_path, model=wanted)) as asking:
        for name in [*NAMES, "tiny", "large", "gpt-3.5-turbo"]:
            body = {"model": name, "messages": [{"role": "user", "content": f"I am {name}."}]}
            answer = (await asking.post("/v1/chat/completions", json=body)).json()
            assert answer["model"] == name
    assert len(server.seen) >= len(NAMES) + 3
    assert {exchange.body["model"] for exchange in server.seen} == {wanted or "tiny"}
