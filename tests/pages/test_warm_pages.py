"""What of a chat's context is warm: in words and in the timeline's picture."""

from __future__ import annotations

import re
from typing import Any

import pytest
from served import TEXTS, Served

from memory.context import Context
from proxy.engines.base import EngineUnavailable, Place, Warmth
from proxy.headers import owner_of
from proxy.pages.warmth import warm_messages


def test_a_message_is_warm_where_all_of_it_is_in_front() -> None:
    costs = [10, 20, 30]  # behind a head of 40 tokens
    found = [warm_messages(costs, of=100, n_tokens=n, slack=0) for n in (0, 39, 40, 49, 50, 99)]
    assert found == [None, None, 0, 0, 1, 2]
    assert warm_messages(costs, of=100, n_tokens=98, slack=3) == 3
    assert warm_messages([], of=40, n_tokens=40, slack=0) == 0


def told(house: Served) -> tuple[str, str]:
    page = house.page(f"/inspect/c/{house.only()}").text
    found = re.search(r'id="warm">(.*?)</p>', page)
    assert found
    return found[1], page


def strips(page: str) -> dict[str, float]:
    found = re.findall(r'class="strip (\w+)" x="0" y="[\d.]+" width="([\d.]+)"', page)
    return {kind: float(width) for kind, width in found}


def test_after_the_keepers_work_all_of_the_context_is_warm(fresh: Served) -> None:
    fresh.say(TEXTS[:14])
    fresh.wait_idle()
    words, page = told(fresh)
    found = re.fullmatch(r"Warm: ([\d,]+) of ([\d,]+) tokens .* are in memory\.", words)
    assert found and found[1] == found[2]
    assert strips(page) == {"memory": 1000.0}
    fresh.app.state.engine.resident.clear()
    words, page = told(fresh)
    assert words.startswith("Cold: none of the") and strips(page) == {}


def test_only_the_owners_own_cache_is_asked_after(fresh: Served) -> None:
    fresh.say(TEXTS[:3], user="anna")
    fresh.say(TEXTS[:3], user="bert")
    fresh.wait_idle()
    fresh.app.state.engine.resident.pop(owner_of({}, "bert"))
    for user, begins in (("anna", "Warm"), ("bert", "Cold")):
        token = fresh.token("/inspect/owners")
        fresh.act("/inspect/owner", {"token": token, "owner": owner_of({}, user)})
        assert told(fresh)[0].startswith(begins)


def test_a_snapshot_on_disk_is_told_and_drawn(
    fresh: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.say(TEXTS[:6])
    fresh.wait_idle()

    async def warmth(self: Any, owner: str, context: Context) -> Warmth:
        return Warmth(of=1000, in_memory=0, on_disk=1000)

    monkeypatch.setattr(type(fresh.engine), "warmth", warmth)
    words, page = told(fresh)
    assert "0 of 1,000 tokens" in words and "1,000 on disk" in words
    assert strips(page) == {"disk": 1000.0}


@pytest.mark.parametrize(
    ("place", "begins"),
    [
        (Place.SLOT, "Warm: this conversation sits in a slot"),
        (Place.FILE, "This conversation was left in a file"),
        (Place.SEQUENCE, "Warm: the server&#39;s one sequence"),
        (Place.COLD, "Cold, by chatfold&#39;s own books"),
        (None, "What of this is warm is not known"),
    ],
)
def test_another_programs_server_is_told_of_from_the_books(
    fresh: Served, monkeypatch: pytest.MonkeyPatch, place: Place | None, begins: str
) -> None:
    fresh.say(TEXTS[:2])
    fresh.wait_idle()
    asked = []

    class Books:
        tells_warmth = False

        def __getattr__(self, name: str) -> Any:
            return getattr(fresh.engine, name)

        def place(self, owner: str, conversation: str) -> Place | None:
            asked.append((owner, conversation))
            return place

    monkeypatch.setattr(fresh.app.state, "engine", Books())
    words, page = told(fresh)
    assert words.startswith(begins) and strips(page) == {}
    assert asked == [(owner_of({}), fresh.only())]


def test_an_engine_that_cannot_tell_leaves_the_page_as_it_is(
    fresh: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.say(TEXTS[:6])
    fresh.wait_idle()

    async def warmth(self: Any, owner: str, context: Context) -> Warmth:
        raise EngineUnavailable("The model process ended.")

    monkeypatch.setattr(type(fresh.engine), "warmth", warmth)
    words, page = told(fresh)
    assert "is not known" in words and strips(page) == {} and 'class="bar ' in page
