"""Every page in a real browser, on a chat of 60 turns with the real model behind it. Skipped, with
a reason, where Playwright, Chromium or axe-core is missing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import long_history
import pytest
from browsing import first_chat, look, opened
from long_chat import AGAIN_AT, EDITED_AT, KEY, TEXTS, TURNS, USER, LongChat, opened_copy
from served import served

from proxy.headers import owner_of
from tests.e2e.serving import Proxy

OWNER = owner_of({"authorization": f"Bearer {KEY}"})
ANNA = owner_of({"authorization": f"Bearer {KEY}"}, USER)

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def proxy(long_chat: LongChat, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """Without a key, as somebody sees it who sits at the machine."""
    with opened_copy(long_chat, tmp_path_factory.mktemp("browser"), key="") as running:
        yield running


def entered(browser: Any, proxy: Proxy, language: str = "en", width: int = 1200) -> Any:
    """A page at the list of whoever has the long chat, chosen among the owners."""
    page = opened(browser, width, "light", language)
    page.goto(proxy.url)
    page.wait_for_url("**/inspect/owners")
    page.locator(f'input[value="{OWNER}"] ~ button').click()
    page.wait_for_url(proxy.url + "/")
    return page


@pytest.mark.parametrize("language", ["en", "ja"])
def test_every_page_at_every_width_in_both_lights_and_languages(
    browser: Any, axe: str, proxy: Proxy, language: str
) -> None:
    """No script error, nothing beyond the screen, nothing serious by axe-core's rules."""
    page = entered(browser, proxy, language)
    base = first_chat(page)
    page.goto(proxy.url + base)
    summary = page.locator(".card.active h3 a").first.get_attribute("href")
    message = page.locator(".said.user header a").first.get_attribute("href")
    paths = ["/", "/?q=baker", "/?q=zebra", "/inspect/live", "/inspect/import", "/inspect/forget"]
    paths += [base, f"{base}/turns", f"{base}/summaries", summary, f"{base}/branches"]
    paths += [f"{base}/context", f"{base}/seen/{TURNS - 3}", f"{base}/forget", message]
    paths += ["/inspect/owners", "/inspect/c/nothing", f"{base}/again"]
    found: list[str] = []
    for path in paths:
        page.goto(proxy.url + path)
        assert page.evaluate("document.documentElement.lang") == language
        found += look(page, axe)
    assert found == []
    # What is not there is a 404, which a browser notes as well.
    assert [t for t in page.troubles if "404" not in t] == []
    page.context.close()


def test_search_as_one_types_and_follow_a_hit_to_its_turn(browser: Any, proxy: Proxy) -> None:
    page = entered(browser, proxy)
    page.locator("#q").press_sequentially("Sintra", delay=20)
    page.wait_for_selector("#results mark")
    assert page.locator("#results mark").first.inner_text() == "Sintra"
    assert page.locator("#results h2").all_inner_texts() == ["In turns", "In summaries"]
    page.wait_for_url("**/?q=Sintra")
    hit = page.locator("#results a").first
    said = hit.locator(".line").inner_text()
    hit.click()
    page.wait_for_url("**#m*")
    assert page.locator(":target .text").inner_text() == said
    page.goto(proxy.url)
    page.fill("#q", "xylophone")
    page.wait_for_selector("#results .empty")
    page.fill("#q", "")
    page.wait_for_selector("#results .list")
    assert page.troubles == []
    page.context.close()


def test_the_timeline_has_every_turn_and_leads_to_it(browser: Any, proxy: Proxy) -> None:
    page = entered(browser, proxy)
    page.goto(proxy.url + first_chat(page))
    bars = page.locator("svg .bar")
    assert bars.count() == TURNS
    verbatim = page.locator("svg .bar.verbatim").count()
    assert 2 <= verbatim < TURNS and page.locator("svg .bar.folded").count() == TURNS - verbatim
    assert page.locator("svg .span.active").count() >= 2
    assert page.locator("svg .span.past").count() >= 4
    bars.nth(9).click()
    page.wait_for_url("**#turn10")
    assert page.locator(":target .said.user .text").inner_text() == TEXTS[9]
    page.context.close()


def test_each_summary_and_the_turns_behind_it(browser: Any, proxy: Proxy) -> None:
    """Each one's page shows its text and just the turns of its span, word for word."""
    page = entered(browser, proxy)
    base = first_chat(page)
    page.goto(f"{proxy.url}{base}/summaries")
    cards = page.locator(".card.summary")
    links = [card.locator("h2 a") for card in cards.all()]
    seen = [(a.inner_text(), a.get_attribute("href")) for a in links]
    texts = cards.locator(".text").all_inner_texts()
    assert len(seen) >= 8
    for (name, href), text in zip(seen, texts, strict=True):
        _, first, _, last = name.split()
        page.goto(proxy.url + href)
        assert page.locator(".card.summary .text").inner_text() == text
        with page.expect_navigation():
            page.locator("a", has_text="The turns behind it").click()
        said = page.locator("#turns .said.user .text").all_inner_texts()
        span = range(int(first), int(last) + 1)
        pages = page.locator(".pager").first
        assert said == [TEXTS[n - 1] for n in span[:25]]
        assert (pages.count() == 1) == (len(span) > 25)
    page.context.close()


def test_the_tree_has_the_edited_and_the_other_answer(browser: Any, proxy: Proxy) -> None:
    page = entered(browser, proxy)
    base = first_chat(page)
    page.goto(f"{proxy.url}{base}/branches")
    branches = page.locator(".tree li")
    assert branches.count() == 5
    assert page.locator(".tree .here").count() == 3
    page.locator(".tree a", has_text="And if it rains?").click()
    page.wait_for_url("**?leaf=*")
    assert page.locator("svg .bar").count() == EDITED_AT
    assert page.locator(".turn").last.locator(".user .text").inner_text() == "And if it rains?"
    page.goto(f"{proxy.url}{base}/branches")
    # The answer that was asked for again stands beside the one that the chat goes on from.
    branches.nth(3).locator("a").click()
    page.wait_for_url("**?leaf=*")
    assert page.locator("svg .bar").count() == AGAIN_AT
    page.context.close()


def test_charts_tell_of_each_turn(browser: Any, proxy: Proxy) -> None:
    page = entered(browser, proxy)
    page.goto(proxy.url + first_chat(page))
    for chart, words in zip(page.locator(".charts svg").all(), ("evaluated", "first"), strict=True):
        told = chart.locator("g title").all_text_contents()
        assert [text.split(",")[0] for text in told] == [f"Turn {n + 1}" for n in range(TURNS)]
        assert all(words in text for text in told)
    page.context.close()


def test_what_the_model_saw_is_equal_at_every_turn_and_marks_what_changed(
    browser: Any, proxy: Proxy
) -> None:
    page = entered(browser, proxy)
    base = first_chat(page)
    changed = 0
    for number in range(1, TURNS + 1):
        page.goto(f"{proxy.url}{base}/seen/{number}")
        assert "equal to what was sent" in page.locator("main").inner_text(), number
        new = page.locator(".said.new pre").all_inner_texts()
        assert new[-1] == TEXTS[number - 1]
        gone = page.locator(".said.gone pre").count()
        changed += bool(gone)
        # A compaction takes turns away and puts a summary in; other turns only add.
        assert bool(gone) == any("Earlier in this conversation" in text for text in new), number
    assert changed >= 4
    page.goto(f"{proxy.url}{base}/context")
    assert TEXTS[-1] in page.locator("pre").all_inner_texts()
    page.context.close()


def test_the_live_page_shows_a_request_while_it_runs(
    browser: Any, long_chat: LongChat, tmp_path: Path
) -> None:
    """On a model that nobody has asked anything yet; and an open page does not hold up the end."""
    with opened_copy(long_chat, tmp_path, key="") as proxy:
        page = entered(browser, proxy, width=390)
        page.goto(f"{proxy.url}/inspect/live")
        told(page, "running", "^chats 0, ")
        told(page, "cells", "^0 / [0-9,]+ ")
        told(page, "snapshots", "^[1-9][0-9]* ")
        with asking(proxy):
            told(page, "running", "^chats 1, ")
        told(page, "running", "^chats 0, ")
        told(page, "cells", "^[1-9][0-9,]* / ")
        assert page.troubles == []
    assert "timeout graceful shutdown" not in proxy.log_path.read_text()
    page.wait_for_selector("#hint:text-matches('connection was lost')")
    page.context.close()


@contextmanager
def asking(proxy: Proxy) -> Iterator[None]:
    """One request after the other, until the block ends: an answer may be quick."""
    seen = threading.Event()
    asked = [{"role": "user", "content": "Count from one to a hundred, in words."}]

    def ask() -> None:
        while not seen.is_set():
            proxy.chat(asked, max_tokens=100, temperature=0)

    running = threading.Thread(target=ask)
    running.start()
    try:
        yield
    finally:
        seen.set()
        running.join()


def told(page: Any, fact: str, pattern: str) -> None:
    """Waits until the live page says so."""
    page.wait_for_selector(f"[data-fact={fact}]:text-matches('{pattern}')")


def test_owners_are_chosen_on_the_machine_itself(browser: Any, proxy: Proxy) -> None:
    page = entered(browser, proxy)
    assert "My name is Hanna" in page.locator(".list").inner_text()
    page.get_by_role("link", name="Another owner").click()
    page.wait_for_url("**/inspect/owners")
    page.locator(f'input[value="{ANNA}"] ~ button').click()
    page.wait_for_url(proxy.url + "/")
    assert page.locator(".list .line").all_inner_texts() == ["Anna likes apricots."]
    page.context.close()


def test_two_thousand_turns_scroll_and_fit(browser: Any, axe: str, tmp_path: Path) -> None:
    with served(tmp_path / "data", window_tokens=900) as house:
        long_history.put(house, 2000, name="long")
        page = opened(browser, 390, "light", "en")
        for path in ("", "/turns", "/summaries"):
            page.goto(f"{house.url}/inspect/c/long{path}")
            assert page.evaluate("document.documentElement.scrollHeight") > 3000
            page.mouse.move(200, 400)
            page.mouse.wheel(0, 1_000_000)
            page.locator("main > :last-child").scroll_into_view_if_needed()
            at_end = "scrollY + innerHeight >= document.documentElement.scrollHeight - 100"
            wait(page, at_end)
            assert look(page, axe) == []
        page.goto(f"{house.url}/inspect/c/long")
        page.locator("svg .bar").first.click()
        page.wait_for_url("**#turn1")
        assert "Message 0 of" in page.locator(":target").inner_text()
        assert page.troubles == []
        page.context.close()


def wait(page: Any, condition: str) -> None:
    """Until it holds. The pages' policy forbids the way in which Playwright itself would wait."""
    end = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)
