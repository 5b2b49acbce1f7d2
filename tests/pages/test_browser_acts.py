"""What a page changes, by hand in a real browser, on a chat of 60 turns with the real model behind
it: the next request sees the change, and finds it evaluated already.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from browsing import first_chat, log_in, look, opened
from long_chat import KEY, SECRET, SECRET_AT, TEXTS, USER, LongChat, opened_copy

from memory.erasure import FORGOTTEN
from memory.integrity import integrity
from proxy.app import DATABASE
from proxy.headers import owner_of
from tests.e2e.serving import Proxy

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(400)]

MARKUP_TOKENS = 12
"""Around a short question: the marks of its message, and the header of the answer."""


@dataclass
class Desk:
    """The proxy, a page that is logged in, and the chat as the client knows it."""

    proxy: Proxy
    page: Any
    chat: LongChat

    @property
    def base(self) -> str:
        """The address of the conversation's page."""
        self.page.goto(self.proxy.url)
        return self.proxy.url + first_chat(self.page)

    def say(self, text: str) -> dict[str, Any]:
        """The next turn. Its usage."""
        messages = [*self.chat.messages, {"role": "user", "content": text}]
        answer = self.proxy.chat(messages, max_tokens=4, temperature=0)
        self.chat.messages = [*messages, answer["choices"][0]["message"]]
        self.proxy.wait_idle()
        usage: dict[str, Any] = answer["usage"]
        return usage

    def seen_last(self) -> str:
        """What the model saw at the last turn, as the page shows it, without what is gone."""
        base = self.base
        n_turns = sum(m["role"] == "user" for m in self.chat.messages)
        self.page.goto(f"{base}/seen/{n_turns}")
        assert "equal to what was sent" in self.page.locator("main").inner_text()
        return "".join(self.page.locator(".said:not(.gone) pre").all_inner_texts())


@pytest.fixture(scope="module")
def desk(
    browser: Any, long_chat: LongChat, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Desk]:
    chat = replace(long_chat)
    with opened_copy(chat, tmp_path_factory.mktemp("desk")) as proxy:
        page = opened(browser, 390, "dark", "en")
        log_in(page, proxy.url, KEY)
        yield Desk(proxy, page, chat)
        assert page.troubles == []
        page.context.close()


def assert_warm(usage: dict[str, Any], text: str) -> None:
    """Nothing was evaluated but the new message: a word has few tokens more than one."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert usage["prompt_tokens"] > 250, usage
    assert usage["prompt_tokens"] - cached <= 2 * len(text.split()) + MARKUP_TOKENS, usage


def test_a_pinned_fact_is_in_the_next_context_and_warm(desk: Desk) -> None:
    page, fact, asked = desk.page, "My sister Ines eats no fish.", "And who eats what?"
    page.goto(desk.base)
    page.fill("#pin", fact)
    page.get_by_role("button", name="Pin", exact=True).click()
    page.wait_for_selector(".pins .text")
    desk.proxy.wait_idle()
    assert_warm(desk.say(asked), asked)
    assert fact in desk.seen_last()
    page.goto(desk.base)
    page.get_by_role("button", name=f"Unpin: {fact}").click()
    page.wait_for_selector(".pins", state="detached")
    desk.proxy.wait_idle()
    assert_warm(desk.say("And without it?"), "And without it?")
    assert fact not in desk.seen_last()


def test_a_corrected_summary_is_in_the_next_context_and_warm(desk: Desk) -> None:
    page, mine = desk.page, "They travel slowly, and Ida always finds the baker."
    page.goto(desk.base)
    card = page.locator(".card.active").last
    before = card.locator(".text").inner_text()
    card.locator("h3 a").click()
    page.wait_for_url("**/summary/*")
    page.locator(".correct summary").click()
    assert page.input_value("textarea") == before
    page.fill("textarea", mine)
    page.get_by_role("button", name="Put it in place").click()
    page.wait_for_selector(".card.summary .text")
    desk.proxy.wait_idle()
    assert_warm(desk.say("Where is the baker?"), "Where is the baker?")
    seen = desk.seen_last()
    assert mine in seen and before not in seen
    page.goto(f"{desk.base}/summaries")
    assert before in page.locator(".card.past .text").all_inner_texts()
    assert mine in page.locator(".card.active .text").all_inner_texts()


def test_a_forgotten_message_is_in_no_context_and_on_no_disk(desk: Desk) -> None:
    """Though the client sends it again, as chat UIs do."""
    page = desk.page
    page.goto(f"{desk.base}/turns?depth={2 * SECRET_AT - 2}")
    said = page.locator(".said", has_text=SECRET)
    said.get_by_role("link", name="Forget").click()
    assert page.locator("blockquote").inner_text() == SECRET
    page.get_by_role("link", name="Keep it").click()
    page.wait_for_selector(f".said:has-text('{SECRET}')")
    said.get_by_role("link", name="Forget").click()
    page.get_by_role("button", name="Yes, forget it").click()
    page.wait_for_selector(f".said:has-text('{FORGOTTEN}')")
    desk.proxy.wait_idle()
    assert "48213" not in page.content()
    assert_warm(desk.say("What opens the locker?"), "What opens the locker?")
    seen = desk.seen_last()
    assert "48213" not in seen and FORGOTTEN in seen
    assert any(m["content"] == SECRET for m in desk.chat.messages)
    assert holding(desk.proxy.data, b"48213") == []
    page.goto(f"{desk.proxy.url}/?q=48213")
    assert page.locator("#results .empty").count() == 1


@pytest.fixture
def other_desk(browser: Any, long_chat: LongChat, tmp_path: Path) -> Iterator[Desk]:
    """Another copy, for what leaves nothing."""
    chat = replace(long_chat)
    with opened_copy(chat, tmp_path) as proxy:
        page = opened(browser, 1200, "light", "en")
        log_in(page, proxy.url, KEY)
        yield Desk(proxy, page, chat)
        assert page.troubles == []
        page.context.close()


def test_exports_arrive_and_what_was_forgotten_comes_back_from_one(
    other_desk: Desk, tmp_path: Path
) -> None:
    """Three files, then the conversation is forgotten, down to the bytes; the import of one file
    brings it back, and the chat goes on; everything is forgotten while its summaries are written,
    and stays forgotten."""
    page, proxy, data = other_desk.page, other_desk.proxy, other_desk.proxy.data
    base = other_desk.base
    files = {
        name: saved(page, base, name, tmp_path) for name in ("Markdown", "OpenAI", "LibreChat")
    }
    sent = [(m["role"], m["content"]) for m in other_desk.chat.messages]
    said = json.loads(files["OpenAI"].read_text())["messages"]
    assert [(m["role"], m["content"]) for m in said] == sent
    assert all(text in files["Markdown"].read_text() for _, text in sent)
    exported = json.loads(files["LibreChat"].read_text())["messages"]
    assert {m["text"] for m in exported} >= {text for role, text in sent if role != "system"}

    mine, annas = (owner_of(proxy.headers, user) for user in (None, USER))
    assert len(snapshots(data, mine)) > 0
    others = snapshots(data, annas)
    marks = [text.encode() for text in TEXTS[::7]] + [b"48213", b"bergen", b"obidos"]
    assert all(holding(data, mark) for mark in marks)
    forget(page, base, "Forgotten: 123 messages.")
    assert [mark for mark in marks if holding(data, mark)] == []
    proxy.wait("forgotten", lambda _: not snapshots(data, mine))
    assert snapshots(data, annas) == others
    assert integrity(data / DATABASE) == []
    assert page.locator("#results .empty").count() == 1

    page.get_by_role("link", name="Import").click()
    page.set_input_files("#file", files["LibreChat"])
    page.get_by_role("button", name="Import").click()
    page.wait_for_selector("#outcome:not([hidden])")
    assert f"{len(exported)} messages" in page.locator("#outcome").inner_text()
    asked = [*other_desk.chat.messages, {"role": "user", "content": "Do you remember me?"}]
    proxy.chat(asked, max_tokens=4, temperature=0)
    # Sixty turns at once: the keeper has work for a while.
    assert proxy.status()["background"] != {"running": 0, "pending": 0}
    assert other_desk.base == base
    page.goto(f"{base}/branches")
    assert page.locator(".tree li").count() == 5

    page.goto(proxy.url)
    page.get_by_role("link", name="Forget everything").click()
    with page.expect_navigation():
        page.get_by_role("link", name="Keep it").click()
    assert page.locator("#results .list li").count() == 1
    page.get_by_role("link", name="Forget everything").click()
    page.get_by_role("button", name="Yes, forget it").click()
    page.wait_for_selector("#results .empty")
    proxy.wait_idle()
    assert integrity(data / DATABASE) == []
    assert [mark for mark in marks if holding(data, mark)] == []
    assert snapshots(data, annas) == others and not snapshots(data, mine)


def test_log_in_and_out(browser: Any, axe: str, desk: Desk) -> None:
    """A wrong key opens nothing, and what was open is shut after the logout."""
    page = opened(browser, 1200, "dark", "ja")
    page.goto(desk.proxy.url)
    found = look(page, axe)
    page.fill("#key", "quince")
    page.locator("button.main").click()
    page.wait_for_selector("[role=alert]")
    found += look(page, axe)
    assert found == []
    log_in(page, desk.proxy.url, KEY)
    base = desk.proxy.url + first_chat(page)
    page.locator("header button").click()
    page.wait_for_url("**/inspect/login")
    page.goto(base)
    page.wait_for_url("**/inspect/login")
    # The 401 of the wrong key is noted by the browser too.
    assert [t for t in page.troubles if "401" not in t] == []
    page.context.close()


def saved(page: Any, base: str, name: str, folder: Path) -> Path:
    """The file that this link of the conversation's page sends."""
    page.goto(base)
    with page.expect_download() as download:
        page.locator(".acts a", has_text=name).click()
    assert download.value.suggested_filename.startswith("chatfold-")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def forget(page: Any, base: str, outcome: str) -> None:
    """The conversation, after it was asked about and kept once."""
    page.goto(base)
    page.locator(".acts a.danger").click()
    assert TEXTS[0] in page.locator("blockquote").inner_text()
    page.get_by_role("link", name="Keep it").click()
    page.wait_for_url(base)
    page.locator(".acts a.danger").click()
    page.get_by_role("button", name="Yes, forget it").click()
    page.wait_for_selector(f".notice:text('{outcome}')")


def holding(data: Path, mark: bytes) -> list[str]:
    """The files under the proxy's folder with these bytes, the case of letters apart."""
    files = [p for p in data.rglob("*") if p.is_file()]
    return [p.name for p in files if mark.lower() in p.read_bytes().lower()]


def snapshots(data: Path, owner: str) -> list[str]:
    return sorted(p.name for p in (data / "snapshots").glob("*/*.kv") if is_of(p, owner))


def is_of(path: Path, owner: str) -> bool:
    """A snapshot's header, at the beginning of the file, names whose it is."""
    head = path.read_bytes()[:4096]
    return owner.encode() in head and (":" in owner or owner.encode() + b":" not in head)
