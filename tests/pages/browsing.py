"""What tests ask of a page in a real browser."""

from __future__ import annotations

import json
import re
from typing import Any

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

WIDTHS = (1200, 390)
SCHEMES = ("light", "dark")
SERIOUS = ("serious", "critical")

AXE = "async () => JSON.stringify((await axe.run()).violations)"

OUTSIDE = """
() => {
  const width = document.documentElement.clientWidth;
  const scrolls = (e) => e && (["auto", "scroll"].includes(getComputedStyle(e).overflowX)
    || scrolls(e.parentElement));
  const out = [];
  for (const element of document.body.querySelectorAll("*")) {
    if (element.matches(".skip") || !element.checkVisibility()) continue;
    const box = element.getBoundingClientRect();
    if (box.width && (box.left < -1 || box.right > width + 1) && !scrolls(element.parentElement))
      out.push(`${element.outerHTML.slice(0, 100)} ${box.left}..${box.right} of ${width}`);
  }
  return out;
}
"""
"""Elements beyond the edges of the screen, but for the skip link, which waits there for the
keyboard."""


def opened(browser: Any, width: int, scheme: str, language: str) -> Any:
    """A page of its own, that notes script errors in `troubles`."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, locale=language
    )
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.troubles = []
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on(
        "console",
        lambda said: page.troubles.append(said.text) if said.type == "error" else None,
    )
    return page


def look(page: Any, axe: str) -> list[str]:
    """What is wrong with the open page at both widths and in both lights: wider than the screen,
    or serious by axe-core's rules."""
    page.evaluate(axe)
    found = []
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        wide = page.evaluate("document.documentElement.scrollWidth")
        if wide > width:
            found.append(f"{width}: the page is {wide} wide")
        found += [f"{width}: outside: {what}" for what in page.evaluate(OUTSIDE)]
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)
            for violation in json.loads(page.evaluate(AXE)):
                if violation["impact"] in SERIOUS:
                    where = [node["html"][:120] for node in violation["nodes"]][:3]
                    found.append(f"{width} {scheme}: {violation['id']} {where}")
    return [f"{page.url}: {what}" for what in found]


def log_in(page: Any, url: str, key: str) -> None:
    page.goto(url)
    page.fill("#key", key)
    page.locator("button.main").click()
    page.wait_for_url(url + "/")


def first_chat(page: Any) -> str:
    """The path of the newest conversation in the list that is open."""
    found = re.search(r"/inspect/c/[0-9a-f]+", page.content())
    assert found, page.content()
    return found[0]
