"""A proxy that the tests here share, without a key, and one with two keys."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from served import TEXTS, Served, served


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
