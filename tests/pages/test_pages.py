"""The pages over a real socket: what they show, to whom, and what they refuse."""

from __future__ import annotations

import asyncio
import json
import re
from html import unescape
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
from served import HTML, Served, served

from proxy.headers import owner_of
from proxy.pages import importing

TABS = ("", "/turns", "/summaries", "/branches", "/context")
WICKED = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}</pre></title>"


class Seen(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def checked(response: httpx.Response) -> str:
    """The page's text, once it is seen to hold nothing that its policy would not run."""
    assert response.status_code == 200, response.text
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"
    for tag, attributes in Seen(response.text).tags:
        assert tag not in ("style", "iframe", "object", "base"), tag
        assert not any(name.startswith("on") or name == "style" for name in attributes), attributes
        if tag == "script":
            assert str(attributes["src"]).startswith("/inspect/files/")
        for name in ("href", "src", "action"):
            value = attributes.get(name) or ""
            assert not re.match(r"(?i)\s*(javascript|data):|https?://|//", value), value
    return response.text


@pytest.mark.parametrize("language", ["en", "ja"])
def test_every_page_renders_clean_in_both_languages(open_house: Served, language: str) -> None:
    chat = f"/inspect/c/{open_house.only()}"
    pages = ["/", "/?q=ferry", "/?q=harbours", "/inspect/live", "/inspect/import"]
    pages += ["/inspect/forget", "/inspect/owners", f"{chat}/forget"]
    for path in [*pages, *(chat + tab for tab in TABS)]:
        text = checked(open_house.page(path, headers={"accept-language": language}))
        assert f'<html lang="{language}">' in text


def test_root_is_a_page_for_browsers_and_the_chat_route_for_librechat(open_house: Served) -> None:
    assert open_house.page("/").headers["content-type"].startswith("text/html")
    api = httpx.get(open_house.url + "/", headers={"accept": "*/*"})
    assert (api.status_code, api.json()["error"]["code"]) == (404, "unknown_url")
    posted = httpx.post(
        open_house.url + "/", json={"messages": [{"role": "user", "content": "Hi there."}]}
    )
    assert posted.json()["object"] == "chat.completion"
    open_house.wait_idle()


def test_a_conversation_shows_its_turns_summaries_and_branches(open_house: Served) -> None:
    found = open_house.page("/?q=pier+23").text
    chat = re.search(r"/inspect/c/([0-9a-f]+)/turns", found)
    assert chat
    base = f"/inspect/c/{chat[1]}"
    leaf = re.search(r"leaf=([0-9a-f]{40})", found)
    assert leaf
    overview = open_house.page(f"{base}?leaf={leaf[1]}").text
    assert overview.count('class="bar ') == 24
    assert 'class="span active"' in overview and 'class="bar verbatim"' in overview
    assert "They spoke of harbours" in overview
    number = re.search(rf"{base}/summary/(\d+)", overview)
    assert number
    behind = open_house.page(f"{base}/summary/{number[1]}?leaf={leaf[1]}").text
    assert "Message" in behind and "in use" in behind
    assert "Or by train?" in open_house.page(f"{base}/branches").text


def test_the_context_shown_is_the_one_that_is_sent(open_house: Served) -> None:
    """Word for word what the engine was given, up to the next message."""
    opening = "The lighthouse keeper has 7 lamps."
    messages = open_house.say([opening, "And the lamps are green."])
    open_house.wait_idle()
    chat = re.search(r"/inspect/c/([0-9a-f]+)", open_house.page("/?q=lighthouse").text)
    assert chat
    page = open_house.page(f"/inspect/c/{chat[1]}/context").text
    shown = [
        unescape(re.sub(r"<[^>]+>", "", p)) for p in re.findall(r"<pre>(.*?)</pre>", page, re.S)
    ]
    open_house.ask([*messages, {"role": "user", "content": "How many lamps?"}])
    sent = [m.text for m in open_house.engine.chat_calls()[-1].context.messages]
    assert shown == sent[:-1]
    open_house.wait_idle()


def test_search_finds_while_somebody_types(open_house: Served) -> None:
    whole = open_house.page("/?q=sandwich").text
    assert "<mark>sandwich</mark>" in whole
    part = open_house.page("/?q=Miso&part=results").text
    assert "<html" not in part and "<mark>Miso</mark>" in part
    assert "Nothing was found" in open_house.page("/?q=zebra").text
    for typed in ('"', "*", "a AND (", "%00", "NEAR(", "%ED%A0%80", "x" * 5000):
        checked(open_house.page(f"/?q={typed}"))


def test_whatever_was_said_is_text_on_every_page(fresh: Served) -> None:
    fresh.say([WICKED, WICKED], user=None)
    fresh.wait_idle()
    chat = f"/inspect/c/{fresh.only()}"
    for path in ["/", "/?q=alert", "/?q=" + WICKED.replace("&", "%26"), f"{chat}/forget"]:
        text = checked(fresh.page(path))
        assert "<script>alert" not in text and "<img" not in text
    for tab in TABS:
        text = checked(fresh.page(chat + tab))
        assert "<script>alert" not in text and "<img" not in text
        assert "49" not in re.findall(r"\{\{|49\}\}", text)


def test_exports_lead_to_files_of_harmless_names(open_house: Served) -> None:
    chat = f"/inspect/c/{open_house.only()}"
    for path, kind in (
        ("/export.md", "text/markdown"),
        ("/export.json", "application/json"),
        ("/librechat.json", "application/json"),
    ):
        response = open_house.page(chat + path)
        assert response.headers["content-type"].startswith(kind)
        named = response.headers["content-disposition"]
        assert re.fullmatch(r'attachment; filename="chatfold-[A-Za-z0-9-]+\.(md|json)"', named)


@pytest.mark.parametrize(
    "name", ["..%2f..%2fetc%2fpasswd", "../words.py", "%2e%2e/render.py", "base.html", "x.css"]
)
def test_only_the_pages_own_files_are_served(open_house: Served, name: str) -> None:
    response = open_house.page(f"/inspect/files/{name}")
    assert response.status_code == 404 and "import" not in response.text


@pytest.mark.parametrize(
    "path", ["/inspect/c/nothing", "/inspect/c/..%2f..", "/inspect/c/{chat}/summary/999999"]
)
def test_what_is_not_there_is_said(open_house: Served, path: str) -> None:
    response = open_house.page(path.format(chat=open_house.only()))
    assert response.status_code == 404
    assert open_house.page(f"/inspect/c/{open_house.only()}?leaf=zz").status_code == 404


def test_forgetting_asks_first_and_then_leaves_nothing(fresh: Served) -> None:
    fresh.say(["My locker code is 4711.", "Remember it."])
    fresh.wait_idle()
    chat = f"/inspect/c/{fresh.only()}"
    asked = fresh.page(f"{chat}/forget").text
    assert "Forget this conversation?" in asked and "4711" in fresh.page("/").text
    done = fresh.act(f"{chat}/forget", {"token": fresh.token(f"{chat}/forget")})
    assert done.status_code == 303
    assert "Forgotten: 4 messages" in fresh.page(done.headers["location"]).text
    assert "4711" not in fresh.page("/").text
    assert fresh.page(chat).status_code == 404
    assert not fresh.engine.resident
    files = fresh.app.state.config.data.glob("*.db*")
    assert not any(b"4711" in file.read_bytes() for file in files)


def test_forgetting_everything_asks_first(fresh: Served) -> None:
    fresh.say(["One."])
    fresh.say(["Two."])
    assert "All 2 conversations" in fresh.page("/inspect/forget").text
    done = fresh.act("/inspect/forget", {"token": fresh.token()})
    assert done.status_code == 303
    assert "no conversations yet" in fresh.page("/").text


def test_acts_from_elsewhere_are_refused(fresh: Served) -> None:
    fresh.say(["Stay here."])
    chat, token = f"/inspect/c/{fresh.only()}", fresh.token()
    for fields, headers in (
        ({}, {}),
        ({"token": "0" * 64}, {}),
        ({"token": token}, {"origin": "http://evil.example"}),
        ({"token": token}, {"origin": "null"}),
        ({"token": token}, {"sec-fetch-site": "cross-site"}),
    ):
        for path in (f"{chat}/forget", "/inspect/forget"):
            assert fresh.act(path, fields, **headers).status_code == 403
    sent = httpx.post(
        fresh.url + "/inspect/import", content=b"[]", headers={"x-chatfold-token": "x"}
    )
    assert sent.status_code == 403
    assert fresh.page(chat).status_code == 200


def test_another_name_for_this_machine_is_refused(open_house: Served) -> None:
    for path in ("/", f"/inspect/c/{open_house.only()}", "/inspect/live", "/inspect/events"):
        response = open_house.page(path, headers={"host": "rebound.example"})
        assert response.status_code == 403, path
        assert "Miso" not in response.text
    assert open_house.page("/", headers={"x-forwarded-for": "10.1.1.1"}).status_code == 403


def test_several_owners_on_one_machine_are_shown_one_at_a_time(fresh: Served) -> None:
    fresh.say(["Anna likes plums."], user="anna")
    fresh.say(["Bert likes quinces."], user="bert")
    first = fresh.page("/")
    assert first.headers["location"] == "/inspect/owners"
    owners = fresh.page("/inspect/owners").text
    assert "plums" not in owners
    anna = owner_of({}, "anna")
    token = fresh.token("/inspect/owners")
    assert fresh.act("/inspect/owner", {"token": token, "owner": "nobody"}).status_code == 404
    chosen = fresh.act("/inspect/owner", {"token": token, "owner": anna})
    assert "httponly" in chosen.headers["set-cookie"].lower()
    page = fresh.page("/").text
    assert "plums" in page and "quinces" not in page


# -- with keys -----------------------------------------------------------------------------------


def log_in(house: Served, key: str, user: str = "") -> httpx.Response:
    house.client.cookies.clear()
    token = house.token("/inspect/login")
    return house.act("/inspect/login", {"token": token, "key": key, "user": user})


def test_without_a_login_nothing_is_shown(locked: Served) -> None:
    locked.client.cookies.clear()
    for path in ("/", "/inspect/live", "/inspect/events", "/inspect/owners", "/inspect/import"):
        response = locked.page(path)
        assert (response.status_code, response.headers["location"]) == (303, "/inspect/login")
    for wrong in ("", "third", "first,second", "FIRST"):
        response = log_in(locked, wrong)
        assert response.status_code == 401 and "set-cookie" not in response.headers


def test_a_key_opens_what_was_said_under_it_and_nothing_else(locked: Served) -> None:
    response = log_in(locked, "first")
    cookie = response.headers["set-cookie"].lower()
    assert response.status_code == 303
    assert "httponly" in cookie and "samesite=strict" in cookie
    page = locked.page("/").text
    assert "plum" in page and "quince" not in page and "apricot" not in page
    mine = locked.only()
    assert "<mark>" not in locked.page("/?q=quince").text
    assert "<mark>plum</mark>" in locked.page("/?q=plum").text
    log_in(locked, "second")
    theirs = locked.only()
    assert mine != theirs
    log_in(locked, "first")
    for path in (*TABS, "/forget", "/export.md", "/export.json", "/librechat.json"):
        assert locked.page(f"/inspect/c/{theirs}{path}").status_code == 404
    token = locked.token()
    assert locked.act(f"/inspect/c/{theirs}/forget", {"token": token}).status_code == 404
    assert locked.page("/inspect/owners").status_code == 404
    log_in(locked, "second")
    assert "quince" in locked.page("/").text


def test_a_users_chats_open_with_the_users_id_or_the_owners_name(locked: Served) -> None:
    anna = owner_of({"authorization": "Bearer first"}, "anna")
    for user in ("anna", anna):
        assert log_in(locked, "first", user).status_code == 303
        page = locked.page("/").text
        assert "apricot" in page and "plum" not in page
    assert log_in(locked, "second", anna).status_code == 401


def test_logging_out_ends_the_session(locked: Served) -> None:
    log_in(locked, "first")
    cookies = dict(locked.client.cookies)
    token = locked.token()
    assert locked.act("/inspect/logout", {"token": token}).status_code == 303
    locked.client.cookies.clear()
    again = httpx.get(locked.url + "/", headers=HTML, cookies=cookies)
    assert again.status_code == 303


def test_a_token_of_one_session_is_none_of_anothers(locked: Served) -> None:
    log_in(locked, "second")
    token = locked.token()
    log_in(locked, "first")
    assert locked.act("/inspect/forget", {"token": token}).status_code == 403


def test_a_login_is_only_taken_from_our_own_form(locked: Served) -> None:
    locked.client.cookies.clear()
    fields = {"token": locked.token("/inspect/login"), "key": "first"}
    foreign = locked.act("/inspect/login", fields, origin="http://evil.example")
    assert foreign.status_code == 403
    assert locked.act("/inspect/login", {"key": "first"}).status_code == 403


@pytest.mark.parametrize(("inspect", "status"), [("off", 404), ("key", 403)])
def test_the_switch(tmp_path: Any, inspect: str, status: int) -> None:
    with served(tmp_path / "data", inspect=inspect) as house:
        for path in ("/", "/inspect/live", "/inspect/events", "/inspect/c/x", "/inspect/login"):
            assert house.page(path).status_code == status, path


# -- files in and out ------------------------------------------------------------------------------


def take(house: Served, value: Any) -> httpx.Response:
    token = re.search(r'data-token="([0-9a-f]{64})"', house.page("/inspect/import").text)
    assert token
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    headers = {"x-chatfold-token": token[1], "origin": house.url}
    return house.client.post(house.url + "/inspect/import", content=body, headers=headers)


def test_what_was_exported_is_imported_and_goes_on(fresh: Served, open_house: Served) -> None:
    exported = open_house.page(f"/inspect/c/{open_house.only()}/librechat.json").json()
    first = take(fresh, exported).json()
    assert first["conversations"] == 1 and first["messages"] == len(exported["messages"])
    assert take(fresh, exported).status_code == 200
    chat = fresh.only()
    page = fresh.page(f"/inspect/c/{chat}/branches").text
    assert fresh.page("/").text.count('<li><a href="/inspect/c/') == 1
    messages = fresh.page(f"/inspect/c/{chat}/export.json").json()["messages"]
    fresh.ask([*messages, {"role": "user", "content": "And now on."}])
    fresh.wait_idle()
    assert fresh.only() == chat and page


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"messages": 3}', b"\xff\xfe", b"[" * 100000])
def test_a_file_that_is_no_export_is_refused_in_one_sentence(fresh: Served, body: bytes) -> None:
    response = take(fresh, body)
    assert response.status_code == 400
    assert "no conversations yet" in fresh.page("/").text


def test_a_file_is_read_beside_everybody_elses_requests(
    fresh: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that nests deeply takes seconds: not on the thread that serves all."""
    threads: dict[str, bool] = {}

    def noting(name: str) -> None:
        real = getattr(importing, name)

        def noted(*args: Any, **options: Any) -> Any:
            threads[name] = asyncio._get_running_loop() is None
            return real(*args, **options)

        monkeypatch.setattr(importing, name, noted)

    noting("parse_export")
    noting("nodes_of")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]
    assert take(fresh, {"messages": messages}).json()["messages"] == 2
    assert threads == {"parse_export": True, "nodes_of": True}
    threads.clear()
    messages[0]["content"] = "another"
    sent = httpx.post(fresh.url + "/api/import", json={"messages": messages}, trust_env=False)
    assert sent.json()["messages"] == 2
    assert threads == {"parse_export": True, "nodes_of": True}


def test_live_state_comes_as_events(open_house: Served) -> None:
    with httpx.stream("GET", open_house.url + "/inspect/events", headers=HTML) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                facts = json.loads(line[6:])
                break
    assert facts["engine"] == "-" and facts["background"] == "0 running, 0 waiting"
    assert "chats 0" in facts["running"]
