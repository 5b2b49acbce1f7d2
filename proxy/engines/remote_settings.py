"""What the remote engine is told: where the server is and how long each wait may last."""

from __future__ import annotations

from dataclasses import dataclass, field

from proxy.config import Config
from proxy.engines import remote_wire as wire

ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """Waits are seconds. `n_ctx` 0 means the server's own window, `model` "" its first model,
    `parallel` 0 as many requests at a time as its kind can serve."""

    upstream: wire.Upstream
    n_ctx: int = 0
    queue_limit: int = 64
    connect_s: float = 5.0
    first_token_s: float = 600.0
    between_tokens_s: float = 60.0
    queue_s: float = 300.0
    embeddings_s: float = 300.0
    recheck_s: float = 30.0
    model: str = ""
    parallel: int = 0
    slot_files: int = 16
    conversation_header: str = "x-conversation-id"
    api_key: str = field(default="", repr=False)
    forwards_key: bool = False


def from_config(config: Config) -> RemoteSettings:
    waits, remote = config.timeouts, config.remote
    return RemoteSettings(
        upstream=wire.upstream(config.upstream),
        n_ctx=config.n_ctx,
        queue_limit=config.queue_limit,
        connect_s=waits.connect_s,
        first_token_s=waits.first_token_s,
        between_tokens_s=waits.between_tokens_s,
        queue_s=waits.queue_s,
        embeddings_s=waits.embeddings_s,
        recheck_s=remote.recheck_s,
        model=remote.model,
        parallel=remote.parallel,
        slot_files=remote.slot_files,
        conversation_header=config.conversation_header,
        api_key=remote.api_key,
        forwards_key=remote.forward_key == ALWAYS,
    )
