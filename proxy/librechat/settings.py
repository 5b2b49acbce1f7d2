"""LibreChat's `.env` and `librechat.yaml`: what in them costs speed or does not work with chatfold.
Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

NEAR = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
HOST = "host.docker.internal"
YES = ("true", "1", "yes", "on")

SMALL_CONTEXT_TOKENS = 16_000
"""Below this LibreChat drops messages in chats of ordinary length."""

LIMITS = (
    (re.compile(r"gpt-3\.5-turbo"), "4,092 tokens (0.6) or 15,556 (now)"),
    (re.compile(r"gpt-4(?:-0613|-0314)?\Z"), "7,778 tokens"),
    (re.compile(r"llama-?2", re.I), "3,800 tokens"),
    (re.compile(r"llama-?3-8b", re.I), "7,600 tokens"),
)
"""What LibreChat sends at most of a chat, by the model's name."""

_LINE = re.compile(r"^\s*(?:export\s+)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*=(?P<value>.*)$")
_COMMENT = re.compile(r"(?:^|\s)#.*$")


@dataclass(frozen=True, slots=True)
class Here:
    """The chatfold that it is about."""

    host: str
    port: int
    keys: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def url_in_docker(self) -> str:
        return f"http://{HOST}:{self.port}/v1"


@dataclass(frozen=True, slots=True)
class Remark:
    """One setting. `write` is the exact line to write, "" where nothing is wrong."""

    name: str
    text: str
    write: str = ""


def parse_env(text: str) -> dict[str, str]:
    """The variables of a .env file. Quotes around a value and comments behind it are not part of
    it."""
    values = {}
    for line in text.splitlines():
        if line.lstrip().startswith("#") or not (found := _LINE.match(line)):
            continue
        value = found["value"].strip()
        quote = value[:1]
        if quote in ("'", '"') and quote in value[1:]:
            value = value[1 : value.index(quote, 1)]
        else:
            value = _COMMENT.sub("", value).strip()
        values[found["name"]] = value
    return values


def check_env(values: Mapping[str, str], here: Here) -> Iterator[Remark]:
    """What a .env says about chatfold, and what it should say."""
    yield from _check_url(values, here)
    yield from _check_key(values.get("OPENAI_API_KEY", ""), here)
    yield from _check_models(values.get("OPENAI_MODELS", ""))
    if _is_on(values, "OPENAI_SUMMARIZE"):
        text = "LibreChat asks for a summary before every answer; chatfold makes its own, later."
        yield Remark("OPENAI_SUMMARIZE", text, "OPENAI_SUMMARIZE=false")
    if _is_on(values, "OPENAI_FORCE_PROMPT"):
        text = "The chat comes as one text, which hides where its messages begin."
        yield Remark("OPENAI_FORCE_PROMPT", text, "OPENAI_FORCE_PROMPT=false")
    endpoints = values.get("ENDPOINTS", "")
    if endpoints and "openAI" not in endpoints.split(","):
        text = "LibreChat does not show the endpoint that leads to chatfold."
        yield Remark("ENDPOINTS", text, f"ENDPOINTS=openAI,{endpoints}")
    if values.get("PROXY"):
        text = "LibreChat sends its requests through this proxy, also those to chatfold."
        yield Remark("PROXY", text, "PROXY=")


def _is_on(values: Mapping[str, str], name: str) -> bool:
    return values.get(name, "").lower() in YES


def _check_url(values: Mapping[str, str], here: Here) -> Iterator[Remark]:
    name, value = "OPENAI_REVERSE_PROXY", values.get("OPENAI_REVERSE_PROXY", "")
    right, in_docker = f"{name}={here.url}", f"{name}={here.url_in_docker}"
    either = f"{in_docker}   (LibreChat without Docker: {right})"
    if not value:
        yield Remark(name, "It is missing: LibreChat asks OpenAI itself.", either)
        return
    url = _url(value)
    if url is None:
        yield Remark(name, f"{value!r} is no URL: it needs http:// and a host.", either)
    elif url.scheme == "https" and (url.hostname in (*NEAR, HOST)):
        yield Remark(name, "chatfold speaks http, not https.", either)
    elif url.hostname in (*NEAR, HOST) and (url.port or 80) != here.port:
        text = f"It names port {url.port or 80}; chatfold is set to listen on {here.port}."
        yield Remark(name, text, in_docker if url.hostname == HOST else right)
    elif url.hostname in NEAR and _in_docker(values):
        text = f"{url.hostname} is the container itself when LibreChat runs in Docker."
        yield Remark(name, text, in_docker)
    elif url.hostname == HOST and here.host in ("127.0.0.1", "localhost"):
        text = "chatfold listens on 127.0.0.1 only, which no container can reach."
        yield Remark(name, text, "chatfold serve --host 0.0.0.0 --api-key KEY")
    elif url.hostname in NEAR:
        yield Remark(name, f"{value}; should LibreChat run in Docker, write {in_docker}")
    else:
        yield Remark(name, value)


def _in_docker(values: Mapping[str, str]) -> bool:
    """LibreChat's database has the name of a service: so its containers know each other."""
    url = _url(values.get("MONGO_URI", ""))
    return url is not None and url.hostname not in (None, *NEAR)


def _url(text: str) -> SplitResult | None:
    try:
        url = urlsplit(text)
        usable = bool(url.scheme in ("http", "https", "mongodb") and url.hostname)
        return url if usable and (url.port or 1) > 0 else None
    except ValueError:
        return None


def _check_key(key: str, here: Here) -> Iterator[Remark]:
    name = "OPENAI_API_KEY"
    wanted = "the key that chatfold asks for" if here.keys else "none"
    if not key:
        text = "It is missing, and without one LibreChat does not show the endpoint."
        yield Remark(name, text, f"{name}={wanted}")
    elif key == "user_provided":
        yield Remark(name, "each user is asked for a key")
    elif here.keys and key not in here.keys:
        yield Remark(name, "It is none of the keys that chatfold asks for.", f"{name}={wanted}")
    else:
        yield Remark(name, "is set")


def _check_models(models: str) -> Iterator[Remark]:
    name, names = "OPENAI_MODELS", [m.strip() for m in models.split(",") if m.strip()]
    for model in names:
        for pattern, most in LIMITS:
            if pattern.match(model):
                text = (
                    f"By the name {model} LibreChat sends at most {most} of a chat. chatfold keeps "
                    "what it has seen, but not what it was never sent."
                )
                yield Remark(name, text, f"{name}=chatfold   (0.6: {name}=gpt-4-1106-preview)")
                return
    yield Remark(name, ", ".join(names) or "not set: LibreChat asks chatfold for the list")


def check_yaml(document: Any, here: Here) -> Iterator[Remark]:
    """What a librechat.yaml, as parsed, says about chatfold, and what it should say."""
    if not isinstance(document, dict):
        yield Remark("librechat.yaml", "It is empty, or no mapping.", "version: 1.3.0")
        return
    yield from _check_summarization(document.get("summarization"))
    endpoints = _mapping(document.get("endpoints"))
    yield from _check_headers(_mapping(endpoints.get("openAI")))
    for endpoint in _list(endpoints.get("custom")):
        yield from _check_custom(_mapping(endpoint), here)
    specs = _list(_mapping(document.get("modelSpecs")).get("list"))
    for spec in map(_mapping, specs):
        most = _mapping(spec.get("preset")).get("maxContextTokens")
        if isinstance(most, int) and most < SMALL_CONTEXT_TOKENS:
            text = f"{spec.get('name')}: LibreChat drops what is older than {most:,} tokens."
            yield Remark("maxContextTokens", text, "maxContextTokens: 1000000")


def _check_summarization(found: Any) -> Iterator[Remark]:
    if _mapping(found).get("enabled") is False:
        yield Remark("summarization", "is off")
        return
    text = (
        "LibreChat summarises by itself (it does so unless told not to, since 0.8.5): the user "
        "waits for it, and old turns are then told twice."
    )
    yield Remark("summarization", text, "summarization: {enabled: false}")


def _check_headers(openai: dict[str, Any]) -> Iterator[Remark]:
    if "x-conversation-id" in _mapping(openai.get("headers")):
        yield Remark("headers", "LibreChat names the conversation (from 0.8.7 on)")
    else:
        yield Remark(
            "headers",
            "LibreChat does not name the conversation; chatfold finds it all the same. To be sure, "
            "write under endpoints.openAI: "
            "headers: {x-conversation-id: '{{LIBRECHAT_BODY_CONVERSATIONID}}'}",
        )


def _check_custom(endpoint: dict[str, Any], here: Here) -> Iterator[Remark]:
    name, base = endpoint.get("name"), str(endpoint.get("baseURL", ""))
    url = _url(base)
    if url is None:
        if base and not base.startswith("${"):
            yield Remark(
                f"{name}.baseURL", f"{base!r} is no URL.", f"baseURL: {here.url_in_docker}"
            )
        return
    if (url.port or 80) != here.port:
        return
    if endpoint.get("summarize"):
        text = "LibreChat asks for a summary before every answer; chatfold makes its own, later."
        yield Remark(f"{name}.summarize", text, "summarize: false")
    else:
        yield Remark(f"{name}.baseURL", base)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
