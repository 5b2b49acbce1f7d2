"""Which route a path means, whatever was written into OPENAI_REVERSE_PROXY. Pure.

OPENAI_REVERSE_PROXY              chat is posted to                          models are read from
http://h:8080, http://h:8080/     /chat/completions                          /models, //models
http://h:8080/v1                  /v1/chat/completions                       /v1/models
.../v1/chat/completions           /v1/chat/completions, and newer versions   /v1/models
                                  /v1/chat/completions/chat/completions
http://h:8080/anything/v1         /anything/v1/chat/completions              /anything/v1/models
any of them, directEndpoint       the URL itself: /, /v1, /anything/v1
"""

from __future__ import annotations

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
MODELS = "/v1/models"

READS = ("GET", "HEAD")


def route_of(path: str, method: str) -> str | None:
    """The route of the OpenAI API that this path ends in, or None where it ends in none."""
    words = [word for word in path.split("/") if word]
    if method in READS:
        return _read(words)
    return _posted(words) if method == "POST" else None


def _read(words: list[str]) -> str | None:
    return MODELS if words[-1:] == ["models"] else None


def _posted(words: list[str]) -> str | None:
    match words:
        case [] | [*_, "v1"] | [*_, "chat", "completions"]:
            return CHAT
        case [*_, "completions"]:
            return COMPLETIONS
        case [*_, "embeddings"]:
            return EMBEDDINGS
    return None
