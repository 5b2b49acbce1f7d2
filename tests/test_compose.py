"""The containers as they are described. Docker's own Compose client reads the one file, hadolint
the other; neither needs an engine.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.config import load
from proxy.librechat.settings import parse_env

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
EXAMPLE = (ROOT / "config" / "librechat.env.example").read_text()
ENV = parse_env(EXAMPLE)
SUGGESTED = dict(re.findall(r"^# ([A-Z_]+)=(\S+)$", EXAMPLE, re.MULTILINE))
EMPTY = [name for name, value in ENV.items() if not value]
DOCKERFILE = (ROOT / "config" / "Dockerfile").read_text()


def tool(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The program from this environment, without any variable or configuration of the user's."""
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    command = [str(BIN / name), *arguments]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)


def compose(folder: Path, env: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """`docker compose config` with this .env, in a folder with nothing else in it."""
    (folder / ".env").write_text(env)
    (folder / "docker-compose.yml").write_bytes((ROOT / "docker-compose.yml").read_bytes())
    return tool("docker-compose", "config", "--format", "json", *flags, cwd=folder)


def filled(*, but: str = "", **more: str) -> str:
    """The example with a value for each variable that it leaves empty."""
    given = [f"{name}={name.lower()}-of-mine" for name in EMPTY if name != but]
    return "\n".join([EXAMPLE, *given, *(f"{k}={v}" for k, v in more.items())])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Compose would start from the example, once it is filled in."""
    done = compose(tmp_path_factory.mktemp("compose"), filled())
    assert (done.returncode, done.stderr) == (0, "")
    read: dict[str, Any] = json.loads(done.stdout)
    return read


def test_the_four_services_look_after_their_health(model: dict[str, Any]) -> None:
    services = model["services"]
    assert services.keys() == {"chatfold", "librechat", "mongodb", "meilisearch"}
    for name, service in services.items():
        check = service["healthcheck"]
        assert check["test"][0] == "CMD", name
        assert {"interval", "timeout", "retries", "start_period"} <= check.keys(), name
        assert service["restart"] == "unless-stopped", name
    waits = services["librechat"]["depends_on"]
    assert waits.keys() == services.keys() - {"librechat"}
    assert {name: w["condition"] for name, w in waits.items()} == {
        "chatfold": "service_started",
        "mongodb": "service_healthy",
        "meilisearch": "service_healthy",
    }


def test_every_named_volume_is_declared_and_used(model: dict[str, Any]) -> None:
    mounts = [m for s in model["services"].values() for m in s.get("volumes", [])]
    assert {m["source"] for m in mounts if m["type"] == "volume"} == model["volumes"].keys()
    kept = {(m["source"], m["target"]) for m in model["services"]["chatfold"]["volumes"]}
    assert ("chatfold-data", "/data") in kept
    bound = {Path(m["source"]).name: m for m in mounts if m["type"] == "bind"}
    assert bound.keys() == {"models", "librechat.yaml"}
    assert all(m["read_only"] for m in bound.values())


def test_one_port_is_open_and_every_image_has_a_version(model: dict[str, Any]) -> None:
    services = model["services"]
    assert [name for name, service in services.items() if "ports" in service] == ["librechat"]
    for service in services.values():
        assert re.search(r":v?\d+\.\d+", service["image"]), service["image"]


def test_no_secret_stands_in_any_file(tmp_path: Path) -> None:
    secrets = {"OPENAI_API_KEY", "CREDS_KEY", "CREDS_IV", "JWT_SECRET", "JWT_REFRESH_SECRET"}
    assert {*EMPTY} == secrets | {"MEILI_MASTER_KEY"}
    for name in EMPTY:
        refused = compose(tmp_path, filled(but=name))
        assert refused.returncode != 0, name
        assert name in refused.stderr
        assert "copy config/librechat.env.example to .env" in refused.stderr


def test_librechat_is_led_to_chatfold_with_its_key(model: dict[str, Any]) -> None:
    librechat = model["services"]["librechat"]["environment"]
    chatfold = model["services"]["chatfold"]["environment"]
    assert librechat["OPENAI_REVERSE_PROXY"] == "http://chatfold:8080/v1"
    assert librechat["OPENAI_API_KEY"] == chatfold["CHATFOLD_API_KEY"] == "openai_api_key-of-mine"
    assert librechat["OPENAI_MODELS"] == "chatfold"
    search = model["services"]["meilisearch"]["environment"]
    assert librechat["MEILI_MASTER_KEY"] == search["MEILI_MASTER_KEY"]
    document = yaml.safe_load((ROOT / "config" / "librechat.yaml").read_text())
    assert document["modelSpecs"]["list"][0]["preset"]["model"] == "chatfold"


def test_chatfold_takes_the_variables_it_is_given(model: dict[str, Any]) -> None:
    environ = dict(model["services"]["chatfold"]["environment"])
    environ |= dict(re.findall(r"(CHATFOLD_\w+)=(\S+)", DOCKERFILE))
    config = load(environ=environ)
    assert (config.host, config.port, str(config.data)) == ("0.0.0.0", 8080, "/data")
    assert config.api_keys == ("openai_api_key-of-mine",)
    assert config.upstream == config.model == ""


def test_what_the_example_suggests_reaches_chatfold(tmp_path: Path) -> None:
    settings = {name: v for name, v in SUGGESTED.items() if name.startswith("CHATFOLD_")}
    done = compose(tmp_path, filled(**settings))
    chatfold = json.loads(done.stdout)["services"]["chatfold"]
    assert settings.pop("CHATFOLD_MODELS") in [v["source"] for v in chatfold["volumes"]]
    given = chatfold["environment"]
    assert given | settings == given
    load(environ=given)


def test_the_example_names_every_variable_that_compose_reads(tmp_path: Path) -> None:
    done = compose(tmp_path, filled(), "--variables")
    assert json.loads(done.stdout).keys() == {*EMPTY, *SUGGESTED}


def test_hadolint_has_nothing_to_say_about_the_image(tmp_path: Path) -> None:
    said = tool("hadolint", "--no-color", str(ROOT / "config" / "Dockerfile"), cwd=tmp_path)
    assert (said.returncode, said.stdout) == (0, "")


def test_the_image_runs_without_root_and_copies_what_is_there() -> None:
    stages = DOCKERFILE.split("\nFROM ")
    assert len(stages) == 3
    (number,) = re.findall(r"useradd --uid (\d+)", stages[-1])
    assert stages[-1].index(f"\nUSER {number}\n") < stages[-1].index("\nENTRYPOINT")
    assert "gcc" not in stages[-1]
    assert "HEALTHCHECK" in stages[-1]
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists() or source == "*.whl", source
            assert f"!{source}" in (ROOT / ".dockerignore").read_text().splitlines()
