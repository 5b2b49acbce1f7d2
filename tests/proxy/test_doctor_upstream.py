"""A password in the upstream's URL is nobody's business, the doctor's neither."""

from __future__ import annotations

from pathlib import Path

from proxy.config import Config, shown_url
from proxy.doctor import examine


def test_the_doctor_names_the_upstream_without_its_password(tmp_path: Path) -> None:
    config = Config(data=tmp_path, upstream="http://someone:hunter2@127.0.0.1:9/v1")
    shown = " ".join(finding.detail + finding.trouble for finding in examine(config))
    assert "http://***@127.0.0.1:9/v1" in shown
    assert "hunter2" not in shown


def test_a_url_without_a_password_is_shown_as_it_is() -> None:
    assert shown_url("http://127.0.0.1:8000/v1") == "http://127.0.0.1:8000/v1"
