"""Embeddings are passed on to servers that are none of llama.cpp's: a scripted one, over a real
socket."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest
from scripted_kinds import llama_cpp, llama_server
from scripted_upstream import Exchange, Upstream
from test_remote import ask, serving, text

from proxy.config import RemoteConfig, TimeoutsConfig
from proxy.engines.base import EngineError, EngineUnavailable, RequestRefused
from proxy.engines.remote_embeddings import embeddings

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def packed(*numbers: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


def server_with(*data: dict[str, Any], status: int = 200, **more: Any) -> Upstream:
    async def script(exchange: Exchange) -> None:
        server.log.append(str(exchange.body))
        await exchange.reply({"object": "list", "data": data, **more}, status=status)

    server = Upstream(routes={("POST", "/v1/embeddings"): script})
    return server


async def test_vectors_come_in_the_order_of_the_inputs_in_either_form() -> None:
    data = [{"index": 1, "embedding": packed(0.5, 1)}, {"index": 0, "embedding": [0.25, 2]}]
    server = server_with(*data, usage={"prompt_tokens": 9, "total_tokens": 9})
    async with serving(server, remote=RemoteConfig(api_key="sk-operator")) as engine:
        found = await engine.embed(["tower\ud800", (1, 2)])
        assert text(await ask(engine)) == "Hello"
    assert [struct.unpack("<2f", v) for v in found.vectors] == [(0.25, 2), (0.5, 1)]
    assert found.prompt_tokens == 9
    assert server.log[0] == str(
        {"model": "tiny", "input": ["tower?", [1, 2]], "encoding_format": "base64"}
    )


@pytest.mark.parametrize(
    "data",
    [
        [],
        [{"index": 0, "embedding": [1.0]}, {"index": 0, "embedding": [1.0]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}],
        [{"index": 0, "embedding": []}, {"index": 1, "embedding": []}],
        [{"index": 0, "embedding": [1.0]}, {"index": 2, "embedding": [1.0]}],
        [{"index": 0, "embedding": "AAA="}, {"index": 1, "embedding": "AAA="}],
        [{"index": 0, "embedding": "no base64"}, {"index": 1, "embedding": [1.0]}],
        [{"index": 0, "embedding": [1e300]}, {"index": 1, "embedding": [1.0]}],
        [{"embedding": 5}],
    ],
    ids=str,
)
async def test_what_is_not_one_vector_for_each_input_is_an_error(data: list[Any]) -> None:
    async with serving(server_with(*data)) as engine:
        with pytest.raises(EngineError, match="The upstream server's embeddings"):
            await engine.embed(["tower", "river"])


def test_what_is_no_answer_at_all_is_an_error() -> None:
    for received in (b"", b"[]", b"{}", b'{"data": [', b"\xff", b"[" * 100_000):
        with pytest.raises(EngineError, match="cannot be read"):
            embeddings(received, n_inputs=1)


async def test_a_model_that_makes_none_is_the_servers_own_sentence() -> None:
    error = {"message": "The model does not support Embeddings API"}
    async with serving(server_with(status=400, error=error)) as engine:
        with pytest.raises(RequestRefused, match="does not support Embeddings"):
            await engine.embed(["tower"])


async def test_a_server_that_takes_too_long_is_not_waited_for() -> None:
    async def hangs(exchange: Exchange) -> None:
        await exchange.until_gone()
        await server.note("gone")

    server = Upstream(routes={("POST", "/v1/embeddings"): hangs})
    async with serving(server, timeouts=TimeoutsConfig(embeddings_s=0.5)) as engine:
        with pytest.raises(EngineUnavailable, match="no time for embeddings"):
            await engine.embed(["tower"])
        await server.noted("gone")


@pytest.mark.parametrize("kind", [llama_cpp, llama_server])
async def test_servers_of_llama_cpp_keep_their_places_for_chats(kind: Any) -> None:
    async with serving(kind()) as engine:
        with pytest.raises(RequestRefused, match="not passed on to servers of llama") as caught:
            await engine.embed(["tower"])
    assert caught.value.param == "model"


async def test_clients_with_keys_of_their_own_do_not_use_the_operators() -> None:
    async with serving(server_with(), remote=RemoteConfig(forward_key="always")) as engine:
        with pytest.raises(RequestRefused, match="a key of its own"):
            await engine.embed(["tower"])
