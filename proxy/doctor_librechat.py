"""`chatfold doctor --librechat`: LibreChat's settings, the upstream and the running proxy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

import yaml

from proxy.config import Config, shown_url
from proxy.doctor import Finding
from proxy.librechat.settings import NEAR, Here, Remark, check_env, check_yaml, parse_env

ASK_S = 3.0
MOST_BYTES = 1 << 20
CONTAINER_MARK = Path("/.dockerenv")

FILES = (".env", "librechat.yaml")
"""What is looked for in LibreChat's directory."""


def examine_librechat(config: Config, given: str) -> Iterator[Finding]:
    """`given` is LibreChat's directory, one of its two files, or the text of one. Reads only."""
    here = Here(config.host, config.port, config.api_keys)
    for name, text in _texts(given):
        if text is None:
            yield Finding(name, "", "It cannot be read: name LibreChat's directory or its .env.")
            continue
        for remark in _remarks(name, text, here):
            yield _finding(name, remark)


def examine_around(config: Config) -> Iterator[Finding]:
    """The upstream, if there is one, and the proxy, if it runs."""
    if config.upstream:
        yield _upstream(config.upstream)
    host = "127.0.0.1" if config.host in NEAR else config.host
    yield _proxy(f"http://{host}:{config.port}")


def _texts(given: str) -> Iterator[tuple[str, str | None]]:
    """(name, text); None for what cannot be read."""
    if "\n" in given or ("=" in given and not Path(given).exists()):
        yield ("librechat.yaml" if _looks_like_yaml(given) else ".env"), given
        return
    path = Path(given).expanduser()
    paths = [path / name for name in FILES] if path.is_dir() else [path]
    found = [p for p in paths if p.is_file()] or paths[:1]
    for file in found:
        yield str(file), _read(file)


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _looks_like_yaml(text: str) -> bool:
    return not parse_env(text)


def _remarks(name: str, text: str, here: Here) -> Iterator[Remark]:
    if not name.endswith((".yaml", ".yml")):
        yield from check_env(parse_env(text), here)
        return
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        yield Remark("librechat.yaml", f"It is no YAML: {' '.join(str(exc).split())}.", "-")
        return
    yield from check_yaml(document, here)


def _finding(name: str, remark: Remark) -> Finding:
    subject = f"{name} {remark.name}"
    if not remark.write:
        return Finding(subject, remark.text)
    write = "" if remark.write == "-" else f" Write: {remark.write}"
    return Finding(subject, "", f"{remark.text}{write}")


# -- who answers ---------------------------------------------------------------------------------


def _upstream(url: str) -> Finding:
    answer = _ask(f"{url.rstrip('/')}/models")
    url = shown_url(url)
    if isinstance(answer, str):
        return Finding("upstream", url, f"It does not answer: {answer}.{_from_inside(url)}")
    listed = answer.get("data")
    if not isinstance(listed, list):
        return Finding("upstream", url, "It answers, and not as an OpenAI API: is /v1 missing?")
    names = ", ".join(str(model.get("id")) for model in listed if isinstance(model, dict))
    # llama_cpp.server says so of itself; by default it cuts a running answer off for the next one.
    if any(isinstance(model, dict) and model.get("owned_by") == "me" for model in listed):
        hint = "should answers be cut off, start it with --interrupt_requests false"
        return Finding("upstream", f"{url}: {names}; llama_cpp.server: {hint}")
    return Finding("upstream", f"{url}: {names}")


def _from_inside(url: str) -> str:
    host = urlsplit(url).hostname or ""
    if host not in NEAR or not CONTAINER_MARK.exists():
        return ""
    write = url.replace(host, "host.docker.internal", 1)
    return f" {host} is this container itself. Write: CHATFOLD_UPSTREAM={write}"


def _proxy(url: str) -> Finding:
    answer = _ask(f"{url}/readyz")
    if isinstance(answer, str):
        return Finding(
            "proxy", f"nothing answers at {url} now ({answer}); chatfold serve starts it"
        )
    status = answer.get("status")
    if status == "ready":
        return Finding("proxy", f"{url} is ready")
    return Finding("proxy", url, f"It runs, and {status}.")


def _body(opener: OpenerDirector, url: str) -> bytes:
    """Also of an answer with an error status: it says what is wrong."""
    try:
        response = opener.open(Request(url), timeout=ASK_S)
    except HTTPError as exc:
        response = exc
    with response:
        body: bytes = response.read(MOST_BYTES)
        return body


def _ask(url: str) -> dict[str, object] | str:
    """The JSON object that is there, or in words why there is none. Waits for ASK_S at most."""
    # Not by way of a proxy that the environment names: what is asked is near.
    opener = build_opener(ProxyHandler({}))
    try:
        value = json.loads(_body(opener, url))
    except OSError as exc:
        return str(getattr(exc, "reason", exc))
    except (HTTPException, ValueError) as exc:
        return f"what comes is no JSON ({type(exc).__name__})"
    return value if isinstance(value, dict) else {}
