"""The proxy that tests share which neither kill it nor count what it holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .serving import Proxy, serving

WINDOW_TOKENS = 2048


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with serving(tmp_path_factory.mktemp("shared"), "--n-ctx", str(WINDOW_TOKENS)) as proxy:
        yield proxy
