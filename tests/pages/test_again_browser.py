"""Summarising again under another policy, by hand in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browsing import look, opened
from served import TEXTS, served

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

OTHER = "They spoke of ferries and of a grey cat, Miso."


def test_another_policy_is_tried_watched_compared_and_put_in_place(
    browser: Any, axe: str, tmp_path: Path
) -> None:
    """The page follows the writing by itself and then shows both sides; every page of it at both
    widths and in both lights."""
    with served(tmp_path / "data", window_tokens=900) as house:
        house.say(TEXTS[:18])
        house.wait_idle()
        page = opened(browser, 1200, "light", "en")
        page.goto(f"{house.url}/inspect/c/{house.only()}")
        page.get_by_role("link", name="Try a policy").click()
        page.locator("details summary").first.click()
        assert look(page, axe) == []
        keeper = house.app.state.keeper
        # It waits as long as the keeper has work, and says so.
        house.app.state.loop.call_soon_threadsafe(keeper._quiet.clear)
        house.engine.summary = lambda context: OTHER
        page.select_option("#policy", "small-window")
        page.fill("#newest", "2")
        page.fill("#k-block", "150")
        page.get_by_role("button", name="Summarise again").click()
        page.wait_for_selector("[data-fact=again]")
        assert "messages are summarised" in page.locator("[data-fact=again]").inner_text()
        assert look(page, axe) == []
        house.app.state.loop.call_soon_threadsafe(keeper._quiet.set)
        page.wait_for_selector(".compared")
        assert page.locator(".sides .card.active .text").first.inner_text().startswith(OTHER)
        assert look(page, axe) == []
        page.goto(f"{page.url}?lang=ja")
        assert look(page, axe) == []
        page.goto(page.url.replace("lang=ja", "lang=en"))
        page.get_by_role("button", name="Use these").click()
        page.wait_for_selector(".chip:has-text('in use')")
        house.wait_idle()
        page.get_by_role("link", name="What the model sees").click()
        page.wait_for_selector("pre")
        assert OTHER in page.locator("pre").first.inner_text()
        assert page.troubles == []
        page.context.close()
