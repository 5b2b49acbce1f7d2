"""The containers as they are described: no engine is needed to read them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.config import load
from proxy.librechat.settings import parse_env

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
ENV = parse_env((ROOT / "config" / "librechat.env.example").read_text())
DOCKERFILE = (ROOT / "config" / "Dockerfile").read_text()

VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::?(?P<kind>[-?])(?P<rest>[^}]*))?\}")
SECRETS = ("OPENAI_API_KEY", "CREDS_KEY", "CREDS_IV", "JWT_SECRET", "JWT_REFRESH_SECRET")


def substituted(text: str, values: dict[str, str]) -> str:
    """As Compose does it: ${A}, ${A:-default}, ${A:?why not}."""

    def value(found: re.Match[str]) -> str:
        given = values.get(found["name"], "")
        assert given or found["kind"] != "?", found["rest"]
        return given or (found["rest"] if found["kind"] == "-" else "")

    return VARIABLE.sub(value, text)


def test_the_four_services_look_after_their_health() -> None:
    assert SERVICES.keys() == {"chatfold", "librechat", "mongodb", "meilisearch"}
    for name, service in SERVICES.items():
        check = service["healthcheck"]
        assert check["test"][0] == "CMD", name
        assert {"interval", "timeout", "retries", "start_period"} <= check.keys(), name
        assert service["restart"] == "unless-stopped", name
    waits = SERVICES["librechat"]["depends_on"]
    assert waits.keys() == SERVICES.keys() - {"librechat"}
    assert all(w == {"condition": "service_healthy"} for w in waits.values())


def test_every_named_volume_is_declared_and_used() -> None:
    mounts = [m.partition(":")[0] for s in SERVICES.values() for m in s.get("volumes", [])]
    named = {m for m in mounts if not m.startswith((".", "/", "$"))}
    assert named == COMPOSE["volumes"].keys()
    assert "./config/librechat.yaml" in mounts
    assert any(m.startswith("chatfold-data:/data") for m in SERVICES["chatfold"]["volumes"])


def test_one_port_is_open_and_every_image_has_a_version() -> None:
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["librechat"]
    for service in SERVICES.values():
        image = substituted(service["image"], {})
        assert re.search(r":v?\d+\.\d+", image), image


def test_no_secret_stands_in_any_file() -> None:
    for name in SECRETS:
        assert ENV[name] == "", name
    assert ENV["MEILI_MASTER_KEY"] == ""
    text = (ROOT / "docker-compose.yml").read_text()
    with pytest.raises(AssertionError, match=re.escape("config/librechat.env.example")):
        substituted(text, ENV)
    yaml.safe_load(substituted(text, ENV | {"OPENAI_API_KEY": "k", "MEILI_MASTER_KEY": "m"}))


def test_librechat_is_led_to_chatfold_with_its_key() -> None:
    librechat, chatfold = SERVICES["librechat"], SERVICES["chatfold"]["environment"]
    assert librechat["environment"]["OPENAI_REVERSE_PROXY"] == "http://chatfold:8080/v1"
    assert librechat["env_file"] == ".env"
    assert chatfold["CHATFOLD_API_KEY"].startswith("${OPENAI_API_KEY:?")
    assert ENV["OPENAI_MODELS"] == "chatfold"
    document = yaml.safe_load((ROOT / "config" / "librechat.yaml").read_text())
    assert document["modelSpecs"]["list"][0]["preset"]["model"] == "chatfold"


def test_chatfold_takes_the_variables_it_is_given(tmp_path: Path) -> None:
    values = ENV | {"OPENAI_API_KEY": "k"}
    given = SERVICES["chatfold"]["environment"]
    environ = {name: substituted(value, values) for name, value in given.items()}
    environ |= dict(re.findall(r"(CHATFOLD_\w+)=(\S+)", DOCKERFILE))
    config = load(environ=environ)
    assert (config.host, config.port, str(config.data)) == ("0.0.0.0", 8080, "/data")
    assert config.api_keys == ("k",)
    assert config.upstream == config.model == ""


def test_the_image_runs_without_root_and_copies_what_is_there() -> None:
    stages = DOCKERFILE.split("\nFROM ")
    assert len(stages) == 3
    user = stages[-1].index("\nUSER chatfold")
    assert user < stages[-1].index("\nENTRYPOINT")
    assert "gcc" not in stages[-1]
    assert "HEALTHCHECK" in stages[-1]
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in (ROOT / ".dockerignore").read_text().splitlines()
