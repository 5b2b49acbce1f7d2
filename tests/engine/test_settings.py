"""Settings of the embedded engine: each reaches the model process, and does there what it says."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from proxy.config import Config, EngineConfig
from proxy.engines.embedded.engine import EmbeddedEngine, EmbeddedSettings
from proxy.engines.embedded.protocol import Load

OWN = {f.name for f in fields(EmbeddedSettings)} - {"load"}
KEYS = {f.name: f.default for f in fields(EngineConfig)}
NOT_FROM_THE_SECTION = {"path", "n_ctx", "trace_path", "snapshots"}


def other(value: Any) -> Any:
    """A value of the same type that is not this one."""
    return f"{value}x" if isinstance(value, str) else value + 1


def test_every_key_of_the_section_reaches_the_engine_under_its_own_name(tmp_path: Path) -> None:
    changed = replace(EngineConfig(), **{name: other(value) for name, value in KEYS.items()})
    engine = EmbeddedEngine.from_config(Config(data=tmp_path, engine=changed))
    settings = engine._settings
    for name in KEYS:
        (holder,) = [h for h in (settings, settings.load) if hasattr(h, name)]
        assert getattr(holder, name) == other(KEYS[name]), name


def test_every_setting_of_the_model_process_has_a_key_and_the_same_default() -> None:
    defaults = dict(zip(Load.__struct_fields__[1:], Load.__struct_defaults__, strict=True))
    assert set(Load.__struct_fields__) - NOT_FROM_THE_SECTION == set(KEYS) - OWN
    for name in set(KEYS) - OWN:
        assert defaults[name] == KEYS[name], name


def test_the_other_fields_come_from_the_top_level(tmp_path: Path) -> None:
    config = Config(data=tmp_path, n_ctx=100, queue_limit=7)
    settings = EmbeddedEngine.from_config(config, trace_path="t")._settings
    assert (settings.load.n_ctx, settings.load.trace_path, settings.queue_limit) == (100, "t", 7)
    assert settings.load.path.endswith(".gguf")
    assert settings.load.snapshots == str(tmp_path / "snapshots")
