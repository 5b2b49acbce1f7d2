"""What the tests here share: proxies with a simulated model, the long chat of the real one, and a
browser with axe-core.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import FLAGS
from long_chat import LongChat, made
from served import TEXTS, Served, served

SOURCE = Path(__file__).parent / "node"
INSTALLED = Path(__file__).parent.parent.parent / ".node-axe"
INSTALL = ("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error")
INSTALL_S = 120


@pytest.fixture(scope="module")
def open_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One owner, one chat of 24 turns with summaries and an edited turn."""
    with served(tmp_path_factory.mktemp("open") / "data", window_tokens=900) as house:
        messages = house.say(TEXTS)
        house.wait_idle()
        house.ask([*messages[:20], {"role": "user", "content": "Or by train?"}])
        house.wait_idle()
        yield house


@pytest.fixture
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Empty, for tests that change something."""
    with served(tmp_path_factory.mktemp("fresh") / "data", window_tokens=900) as house:
        yield house


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two keys, a chat under each, and one of a user under the first."""
    with served(tmp_path_factory.mktemp("locked") / "data", api_key="first,second") as house:
        house.say(["The first key's secret is plum."], key="first")
        house.say(["The second key's secret is quince."], key="second")
        house.say(["Anna's secret is apricot."], key="first", user="anna")
        yield house


@pytest.fixture(scope="session")
def long_chat(tmp_path_factory: pytest.TempPathFactory) -> LongChat:
    """60 turns with the default model, made once. Tests look at copies."""
    return made(tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright, whose event loop is open while a module's tests run."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        pytest.skip("Chromium is not installed (Debian and Ubuntu: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found, args=FLAGS, headless=True)
        yield running
        running.close()


@pytest.fixture(scope="module")
def axe() -> str:
    """axe-core's script, installed once into .node-axe/ at the repository's root."""
    script = INSTALLED / "node_modules" / "axe-core" / "axe.min.js"
    if not script.is_file():
        if not shutil.which("npm"):
            pytest.skip("npm is not installed: axe-core cannot be had")
        INSTALLED.mkdir(exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(SOURCE / name, INSTALLED / name)
        done = subprocess.run(
            INSTALL, cwd=INSTALLED, capture_output=True, timeout=INSTALL_S, check=False
        )
        if done.returncode:
            pytest.skip(f"axe-core cannot be installed: {done.stderr[-200:]!r}")
    return script.read_text("utf-8")
