"""The pages in a real browser: Chromium, driven by Playwright; axe-core looks for what shuts
people out. Skipped, with a reason, where one of them is missing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import TEXTS, Served, served

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

ROOT = Path(__file__).parent.parent.parent
SOURCE = Path(__file__).parent / "node"
INSTALLED = ROOT / ".node-axe"
INSTALL = ("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error")
INSTALL_S = 120
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LOOKS = [
    (1200, "light", "en"),
    (1200, "dark", "ja"),
    (390, "light", "ja"),
    (390, "dark", "en"),
]
AXE = "async () => JSON.stringify((await axe.run()).violations)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
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


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("browser") / "data", window_tokens=900) as running:
        messages = running.say([*TEXTS, *(text.replace("ferry", "train") for text in TEXTS)])
        running.ask([*messages[:20], {"role": "user", "content": "Or by train?"}])
        running.ask([*messages, {"role": "user", "content": "And what of the cat?"}])
        running.wait_idle()
        yield running


def opened(browser: Any, width: int, scheme: str, language: str) -> Any:
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, locale=language
    )
    page = context.new_page()
    page.troubles = []
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on(
        "console",
        lambda said: page.troubles.append(said.text) if said.type == "error" else None,
    )
    return page


@pytest.mark.parametrize(("width", "scheme", "language"), LOOKS)
def test_every_page_at_every_width_in_both_lights_and_languages(
    browser: Any, axe: str, house: Served, width: int, scheme: str, language: str
) -> None:
    """No script error, nothing wider than the screen, nothing serious by axe-core's rules."""
    page = opened(browser, width, scheme, language)
    base = f"/inspect/c/{house.only()}"
    paths = ["/", "/?q=Miso", "/inspect/live", "/inspect/import", "/inspect/forget"]
    paths += [base, f"{base}/turns", f"{base}/summaries", f"{base}/branches", f"{base}/context"]
    paths += [f"{base}/seen/20", f"{base}/forget", "/inspect/owners"]
    for path in paths:
        page.goto(house.url + path)
        assert page.evaluate("document.documentElement.lang") == language
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, (path, wide)
        page.evaluate(axe)
        found = json.loads(page.evaluate(AXE))
        bad = [
            (v["id"], [n["html"][:120] for n in v["nodes"]][:3])
            for v in found
            if v["impact"] in ("serious", "critical")
        ]
        assert not bad, (path, bad)
    assert page.troubles == []
    page.context.close()


def test_search_as_one_types_and_follow_a_hit_to_its_turn(browser: Any, house: Served) -> None:
    page = opened(browser, 1200, "light", "en")
    page.goto(house.url)
    page.locator("#q").press_sequentially("sandw", delay=20)
    page.wait_for_selector("#results mark")
    assert "q=sandw" in page.url
    page.locator("#results a").first.click()
    page.wait_for_load_state()
    assert page.locator(":target .text").inner_text().count("sandwiches") == 1
    assert page.troubles == []
    page.context.close()


def test_from_a_summary_in_the_picture_to_the_turns_behind_it(browser: Any, house: Served) -> None:
    page = opened(browser, 1200, "light", "en")
    page.goto(f"{house.url}/inspect/c/{house.only()}")
    page.locator("svg .span.active").first.click()
    page.wait_for_load_state()
    assert "They spoke of harbours" in page.locator(".card.active .text").first.inner_text()
    assert page.locator("#turns .turn").count() > 1
    page.context.close()


def test_pin_correct_and_forget_by_hand(browser: Any, tmp_path: Path) -> None:
    with served(tmp_path / "data", window_tokens=900) as house:
        house.say(TEXTS[:14])
        house.wait_idle()
        page = opened(browser, 390, "dark", "en")
        page.goto(f"{house.url}/inspect/c/{house.only()}")
        page.fill("#pin", "The cat is called Miso.")
        page.get_by_role("button", name="Pin", exact=True).click()
        page.wait_for_selector(".pins .text")
        page.locator(".card.active h3 a").first.click()
        page.locator(".correct summary").click()
        page.fill("textarea", "A corrected text.")
        page.get_by_role("button", name="Put it in place").click()
        page.wait_for_load_state()
        house.wait_idle()
        page.reload()
        assert page.locator(".card.active .text").first.inner_text() == "A corrected text."
        page.get_by_role("link", name="What the model sees").click()
        page.wait_for_selector("pre")
        shown = page.locator("pre").first.inner_text()
        assert "The cat is called Miso." in shown and "A corrected text." in shown
        page.goto(f"{house.url}/inspect/c/{house.only()}/forget")
        page.get_by_role("button", name="Yes, forget it").click()
        page.wait_for_selector(".notice")
        assert "Forgotten: 28 messages" in page.locator(".notice").inner_text()
        assert page.troubles == []
        page.context.close()


def test_a_file_is_imported_by_hand(browser: Any, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Hello."}]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(chat))
    with served(tmp_path / "data") as house:
        page = opened(browser, 1200, "light", "en")
        page.goto(f"{house.url}/inspect/import")
        page.set_input_files("#file", file)
        page.get_by_role("button", name="Import").click()
        page.wait_for_selector("#outcome:not([hidden])")
        assert "1 conversations, 2 messages" in page.locator("#outcome").inner_text()
        page.goto(house.url)
        assert page.locator(".list .line").first.inner_text() == "Hi <b>"
        page.context.close()


def test_log_in_and_out_and_watch_the_state(browser: Any, tmp_path: Path) -> None:
    with served(tmp_path / "data", api_key="plum") as house:
        page = opened(browser, 1200, "dark", "ja")
        page.goto(house.url)
        page.fill("#key", "plum")
        page.locator("button.main").click()
        page.wait_for_url(house.url + "/")
        page.goto(f"{house.url}/inspect/live")
        page.wait_for_selector("[data-fact=background]")
        page.wait_for_function(
            "document.querySelector('[data-fact=background]').textContent === '実行 0、待ち 0'"
        )
        page.locator("header button").click()
        page.wait_for_url("**/inspect/login")
        assert page.troubles == []
        page.context.close()
