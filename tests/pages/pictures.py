"""Makes the pages' pictures in docs/ from the long chat: `make pictures`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from tests.pages.browsing import FLAGS, first_chat, log_in, opened
from tests.pages.long_chat import KEY, LongChat, made, opened_copy

DOCS = Path(__file__).parent.parent.parent / "docs"


@dataclass(frozen=True, slots=True)
class Picture:
    """`page` is what follows the conversation's own address."""

    name: str
    page: str
    width: int = 1200
    scheme: str = "light"
    language: str = "en"
    height: int = 900


PICTURES = [
    Picture("inspect-chat", ""),
    Picture("inspect-context", "/context"),
    Picture("inspect-phone-ja", "", width=390, scheme="dark", language="ja", height=800),
]


def main() -> int:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        print("pictures: Chromium is not installed", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="chatfold-pictures-") as directory:
        chat = made(Path(directory) / "made")
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
            take(browser, chat, Path(directory) / "shown")
            browser.close()
    return 0


def take(browser: Any, chat: LongChat, directory: Path) -> None:
    with opened_copy(chat, directory) as proxy:
        for picture in PICTURES:
            page = opened(browser, picture.width, picture.scheme, picture.language)
            page.set_viewport_size({"width": picture.width, "height": picture.height})
            log_in(page, proxy.url, KEY)
            page.goto(proxy.url + first_chat(page) + picture.page)
            page.screenshot(path=DOCS / f"{picture.name}.png")
            page.context.close()


if __name__ == "__main__":
    sys.exit(main())
