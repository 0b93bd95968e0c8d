# SPDX-License-Identifier: Apache-2.0
"""The requests of the status page: login, hostile texts, forged requests, and what a browser may do with a page."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from html.parser import HTMLParser
from urllib.parse import quote

import pytest

from csi_driver.errors import StorageUnavailable
from csi_driver.telemetry import log
from tests.fakes.clock import FakeClock
from tests.unit.status_page.storage import (
    HOSTILE,
    PASSWORD,
    Browser,
    HostileStorage,
    logged_in,
    page_of,
    text_of,
    values_of,
)

VIEWS = ("", "volumes", "volume?name=x", "attachments", "snapshots", "errors")
PATHS = (*VIEWS, "login", "nothing", "style.css", "icon.svg", "volume?name=absent", "..%2f..%2fetc%2fpasswd")


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture
def hostile_log() -> Iterator[None]:
    """Put a hostile line into the log of the process."""
    root = logging.getLogger()
    root.addHandler(kept := log.Recent())
    logging.getLogger(HOSTILE).error("%s", HOSTILE)
    yield
    root.removeHandler(kept)


# --- what a page shows ---


@pytest.mark.usefixtures("hostile_log")
@pytest.mark.parametrize("view", VIEWS)
def test_texts_of_the_storage_make_no_element_and_no_attribute(view: str) -> None:
    response = logged_in().get(f"/status/{view}")
    assert response.status == 200
    found = Elements(response.body.decode()).tags
    assert "alert" in response.body.decode()
    assert not [tag for tag, _ in found if tag in ("script", "style", "iframe", "object", "base", "meta-refresh")]
    assert not [name for _, attributes in found for name in attributes if name.startswith("on") or name == "style"]
    assert "603729" not in text_of(response)  # a template in a text is not evaluated


@pytest.mark.parametrize("view", VIEWS)
def test_each_address_of_a_page_leads_to_the_page_itself(view: str) -> None:
    tags = Elements(logged_in().get(f"/status/{view}").body.decode()).tags
    addresses = [
        value for _, attributes in tags for name in ("href", "src", "action") if (value := attributes.get(name))
    ]
    assert addresses
    assert not [address for address in addresses if ":" in address.partition("?")[0] or address.startswith("//")]


@pytest.mark.parametrize("path", PATHS)
def test_every_response_keeps_a_browser_from_other_sites_and_from_its_cache(path: str) -> None:
    response = logged_in().get(f"/status/{path}")
    (policy,) = values_of(response, "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'self';")
    assert "frame-ancestors 'none'" in policy
    assert "script-src" not in policy
    assert "unsafe" not in policy
    assert values_of(response, "X-Content-Type-Options") == ["nosniff"]
    assert values_of(response, "Referrer-Policy") == ["same-origin"]
    assert values_of(response, "Cache-Control") == ["no-store"]


def test_no_header_has_a_text_of_a_request_or_of_the_storage() -> None:
    browser = logged_in()
    for path in PATHS:
        response = browser.get(f"/status/{path}?zone={quote(HOSTILE)}", referer=HOSTILE)
        assert not [value for _, value in response.headers if "\n" in value or "alert" in value]
    for text in (HOSTILE, "a\r\nb"):
        response = browser.post("/status/login", {"username": text, "password": text, "zone": text})
        assert not [value for _, value in response.headers if "\n" in value or "alert" in value]


def test_an_error_of_the_storage_is_shown_to_a_user_who_is_logged_in() -> None:
    storage = HostileStorage()
    browser = logged_in(page_of(storage))
    storage.failure = StorageUnavailable("the management <b>hangs</b>")
    response = browser.get("/status/volumes")
    assert response.status == 503
    assert "the management &lt;b&gt;hangs&lt;/b&gt;" in response.body.decode()


def test_other_refusals_tell_a_number_and_nothing_else() -> None:
    browser = logged_in()
    response = browser.get("/status/<script>")
    assert (response.status, text_of(response).split()) == (
        404,
        ["Not", "possible", "Not", "found", "404", "Go", "to", "the", "overview"],
    )


def test_a_search_for_a_persistent_volume_is_one_for_its_volume() -> None:
    wanted = []

    class Watched(HostileStorage):
        def volumes(self, zone, wanted_part):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            wanted.append(wanted_part.prefix)
            return super().volumes(zone, wanted_part)

    browser = logged_in(page_of(Watched()))
    uuid = "0be9ece0-af5e-42fb-938a-760c08a8d2f6"
    for search in (f"pvc-{uuid}", "pvc-0be9", f"zone-1:csi-0be9ece0:{uuid}", " data ", 9000 * "a"):
        browser.get(f"/status/volumes?q={search}")
    assert wanted == ["csi-0be9ece0-af5e-42fb", "csi-0be9", "csi-0be9ece0", "data", 256 * "a"]


# --- login ---


@pytest.mark.parametrize("view", VIEWS)
def test_a_stranger_sees_the_login_alone(view: str) -> None:
    response = Browser(page_of()).get(f"/status/{view}")
    assert (response.status, values_of(response, "Location"), response.body) == (303, ["/status/login"], b"")


@pytest.mark.parametrize(
    "cookie", ["status=", "status=x", "status=" + "A" * 43, "status;", "x=status", "status=;status"]
)
def test_a_forged_cookie_is_no_session(cookie: str) -> None:
    page = page_of()
    logged_in(page)
    assert Browser(page, cookie=cookie).get("/status/").status == 303


@pytest.mark.parametrize(("is_tls", "end"), [(False, "/status/"), (True, "/status/; Secure")])
def test_the_cookie_is_for_the_page_alone_and_for_no_other_site(is_tls: bool, end: str) -> None:
    (cookie,) = values_of(Browser(page_of(is_tls=is_tls)).log_in(), "Set-Cookie")
    assert cookie.split("; ", 1)[1] == f"HttpOnly; SameSite=Strict; Path={end}"


def test_each_login_gives_another_session_and_ends_the_former() -> None:
    browser = logged_in()
    former = browser.cookie
    browser.log_in()
    assert browser.cookie != former
    assert Browser(browser.page, cookie=former).get("/status/").status == 303
    assert browser.get("/status/").status == 200


def test_a_logout_ends_the_session() -> None:
    browser = logged_in()
    cookie = browser.cookie
    assert browser.post("/status/logout", {}).status == 303
    assert Browser(browser.page, cookie=cookie).get("/status/").status == 303


def test_a_session_ends_after_its_idle_time() -> None:
    clock = FakeClock()
    browser = logged_in(page_of(clock=clock))
    for _ in range(3):
        clock.now_s += 600
        assert browser.get("/status/").status == 200
    clock.now_s += 601
    assert browser.get("/status/").status == 303


def test_a_session_that_is_used_all_the_time_ends_after_half_a_day() -> None:
    clock = FakeClock()
    browser = logged_in(page_of(clock=clock))
    answers = []
    for _ in range(80):
        clock.now_s += 600
        answers.append(browser.get("/status/").status)
    assert answers == [200] * 72 + [303] * 8


def test_the_number_of_sessions_is_bounded() -> None:
    first = logged_in()
    others = [logged_in(first.page) for _ in range(first.page.sessions.most)]
    assert first.get("/status/").status == 303
    assert {other.get("/status/").status for other in others} == {200}


def test_a_wrong_password_is_refused_and_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    response = Browser(page_of()).log_in("a secret that is wrong")
    assert response.status == 401
    assert "Wrong user or password." in text_of(response)
    assert "a secret" not in response.body.decode() + caplog.text


def test_a_login_asks_the_storage_once() -> None:
    storage = HostileStorage()
    browser = Browser(page_of(storage))
    browser.log_in("wrong")
    browser.log_in()
    assert storage.attempts == ["zone-1", "zone-1"]


def test_guesses_become_slow_and_are_not_passed_on() -> None:
    storage, clock = HostileStorage(), FakeClock()
    browser = Browser(page_of(storage, clock=clock))
    answers = [browser.log_in("wrong").status for _ in range(100)]
    assert answers == [401] * 3 + [429] * 97
    assert len(storage.attempts) == 3
    for _ in range(3600):
        clock.now_s += 1
        browser.log_in("wrong")
    assert len(storage.attempts) < 3 + 7 + 60


def test_a_right_password_is_refused_only_for_the_pause() -> None:
    clock = FakeClock()
    browser = Browser(page_of(clock=clock))
    for _ in range(3):
        browser.log_in("wrong")
    refused = browser.log_in()
    assert (refused.status, values_of(refused, "Retry-After")) == (429, ["1"])
    clock.now_s += 1
    assert browser.log_in().status == 303
    assert [browser.log_in("wrong").status for _ in range(3)] == [401] * 3


def test_a_management_that_hangs_is_no_wrong_password(caplog: pytest.LogCaptureFixture) -> None:
    storage = HostileStorage(failure=StorageUnavailable("no response from 10.0.0.1"))
    response = Browser(page_of(storage)).log_in()
    assert response.status == 503
    assert "10.0.0.1" not in response.body.decode()
    assert "10.0.0.1" in caplog.text
    assert PASSWORD not in caplog.text


def test_a_login_of_a_zone_shows_that_zone_alone() -> None:
    browser = Browser(page_of(HostileStorage(names=("a", "b"))))
    assert browser.log_in(zone="b").status == 303
    assert browser.get("/status/volumes?zone=b").status == 200
    assert browser.get("/status/volumes").status == 200
    assert browser.get("/status/volumes?zone=a").status == 303
    assert browser.log_in(zone="a").status == 303
    assert [browser.get(f"/status/?zone={zone}").status for zone in ("a", "b", "c")] == [200, 200, 303]


# --- forged requests ---


@pytest.mark.parametrize(("path", "form"), [("login", {"username": "admin", "password": PASSWORD}), ("logout", {})])
@pytest.mark.parametrize("headers", [
    {"origin": ""}, {"origin": "null"}, {"origin": "http://evil.example"}, {"origin": "http://127.0.0.1:9807"},
    {"origin": "http://127.0.0.1:9806.evil.example"}, {"origin": "http://["}, {"sec_fetch_site": "cross-site"},
    {"sec_fetch_site": "same-site"},
])  # fmt: skip
def test_a_form_of_another_site_is_refused(path: str, form: dict[str, str], headers: dict[str, str]) -> None:
    browser = logged_in()
    cookie = browser.cookie
    assert browser.post(f"/status/{path}", form, **headers).status == 403
    assert (browser.cookie, browser.get("/status/").status) == (cookie, 200)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:9806", "", "[", "127.0.0.1.evil.example", "a b.example"]
)
def test_a_name_that_is_not_this_machine_s_is_refused(host: str) -> None:
    browser = logged_in()
    browser.headers = {"host": host}
    for path in PATHS:
        assert browser.get(f"/status/{path}").status == 421
    assert browser.log_in().status == 421


@pytest.mark.parametrize("host", [
    "localhost:1", "127.0.0.1", "[::1]:80", "10.1.2.3:4000", "storage", "a.svc", "a.b.svc.cluster.local",
])  # fmt: skip
def test_names_of_a_machine_or_a_cluster_are_served(host: str) -> None:
    browser = Browser(page_of(), headers={"host": host})
    assert browser.log_in().status == 303


def test_with_tls_the_certificate_has_the_names() -> None:
    assert Browser(page_of(is_tls=True), headers={"host": "storage.example.com"}).get("/status/login").status == 200


@pytest.mark.parametrize(("body", "type", "status"), [
    (b"a=" + b"b" * 9000, "application/x-www-form-urlencoded", 413),
    (b"&".join(b"a%d=1" % number for number in range(20)), "application/x-www-form-urlencoded", 400),
    (b"password=%ff&username=a", "application/x-www-form-urlencoded", 400),
    (b"username=a&username=b&password=c", "application/x-www-form-urlencoded", 400),
    (b"username=a&password=" + b"x" * 2000, "application/x-www-form-urlencoded", 400),
    (b"\xff", "application/x-www-form-urlencoded", 400), (b"", "application/x-www-form-urlencoded", 400),
    (b'{"username": "admin"}', "application/json", 415), (b"", "", 415),
])  # fmt: skip
def test_a_form_that_no_page_sends_is_refused(body: bytes, type: str, status: int) -> None:  # noqa: A002
    storage = HostileStorage()
    assert Browser(page_of(storage)).post("/status/login", body, content_type=type).status == status
    assert not storage.attempts


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_but_login_and_logout_takes_another_method(method: str) -> None:
    browser = logged_in()
    assert {browser.get(f"/status/{path}", method).status for path in (*VIEWS, "style.css", "nothing")} == {405}
