"""A server that answers at once, in a process of its own: `python -m bench.stub --port N`.

`max_tokens` is how many frames it streams; `"pace": S` in the last message's text spaces them. Each
frame holds the time at which it was written (the clock of time.monotonic is one for the machine).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from functools import partial
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stub", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--window-tokens", type=int, default=8192)
    options = parser.parse_args()
    model = {"id": "stub", "max_model_len": options.window_tokens}
    asyncio.run(serve(options.host, options.port, {"object": "list", "data": [model]}))


async def serve(host: str, port: int, models: dict[str, Any]) -> None:
    connected = partial(_connected, models)
    server = await asyncio.start_server(connected, host, port, limit=1 << 24)
    async with server:
        await server.serve_forever()


async def _connected(
    models: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        while True:
            await _answer(models, reader, writer)
    except (ConnectionError, asyncio.IncompleteReadError):
        writer.close()


async def _answer(
    models: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    method, path, _ = head.split(" ", 2)
    lines = (line.partition(":") for line in head.split("\r\n"))
    length = next((int(v) for k, _, v in lines if k.lower() == "content-length"), 0)
    body = await reader.readexactly(length)
    if method == "POST" and path.endswith("/chat/completions"):
        await _stream(writer, body)
    else:
        found = path.endswith("/models")
        content = json.dumps(models if found else {}).encode()
        status = b"200 OK" if found else b"404 Not Found"
        size = str(len(content)).encode()
        writer.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: " + size + b"\r\n\r\n" + content)


async def _stream(writer: asyncio.StreamWriter, body: bytes) -> None:
    # Not parsed: a large body would take as long as all that is measured.
    n = int(_after(body, b'"max_tokens":', b"1"))
    pace_s = float(_after(body, b"pace=", b"0"))
    writer.write(HEAD)
    for _ in range(n):
        if pace_s:
            await asyncio.sleep(pace_s)
        writer.write(_chunk(_delta({"content": f"{time.monotonic():.6f} "})))
        await writer.drain()
    usage = {"choices": [], "usage": {"prompt_tokens": len(body) // 4, "completion_tokens": n}}
    writer.write(
        _chunk(_delta({}, "stop")) + _chunk(usage) + b"e\r\ndata: [DONE]\n\n\r\n" + b"0\r\n\r\n"
    )


def _after(body: bytes, mark: bytes, default: bytes) -> bytes:
    at = body.rfind(mark)
    if at < 0:
        return default
    digits = body[at + len(mark) : at + len(mark) + 12].strip()
    end = next((i for i, c in enumerate(digits) if c not in b"0123456789."), len(digits))
    return digits[:end]


def _delta(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def _chunk(value: dict[str, Any]) -> bytes:
    data = b"data: " + json.dumps(value).encode() + b"\n\n"
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


if __name__ == "__main__":
    main()
