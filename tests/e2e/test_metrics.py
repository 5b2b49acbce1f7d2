"""/metrics of a real proxy: what it says after a request, and that all of it is documented."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from .serving import ROOT, Proxy


def scrape(proxy: Proxy) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(proxy.get("/metrics").text)
    return {(s.name, *s.labels.values()): s.value for f in families for s in f.samples}


def test_the_engine_counts_what_a_request_was_given(shared: Proxy) -> None:
    shared.wait_idle()
    before = scrape(shared)
    answer = shared.chat([{"role": "user", "content": "Count me, please."}], max_tokens=4)
    shared.wait_idle()
    after = scrape(shared)

    def grown(*name: str) -> float:
        return after[name] - before.get(name, 0)

    usage = answer["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert grown("chatfold_engine_tokens_generated_total", "chat") == usage["completion_tokens"]
    assert grown("chatfold_engine_tokens_cached_total", "chat") == cached
    evaluated = grown("chatfold_engine_tokens_evaluated_total", "chat")
    assert evaluated == usage["prompt_tokens"] - cached
    assert grown("chatfold_engine_queue_seconds_count", "chat") == 1
    assert grown("chatfold_engine_batch_tokens_sum") >= evaluated
    assert 0 < after["chatfold_engine_cells_used",] <= after["chatfold_engine_cells",]


def test_every_metric_of_a_running_proxy_is_documented(shared: Proxy) -> None:
    documented = (ROOT / "docs/metrics.md").read_text()
    for family in text_string_to_metric_families(shared.get("/metrics").text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        if name.endswith("_created"):
            continue  # Comes with every counter and histogram.
        assert f"`{name}" in documented, name


def test_the_documentation_names_no_metric_that_is_not_there(shared: Proxy) -> None:
    shared.chat([{"role": "user", "content": "Hello"}], max_tokens=1)
    text = shared.get("/metrics").text
    for line in Path(ROOT / "docs/metrics.md").read_text().splitlines():
        if line.startswith("| `chatfold_engine_"):
            name = line.split("`")[1].partition("{")[0]
            assert name in text, name
