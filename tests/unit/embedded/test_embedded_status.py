# SPDX-License-Identifier: Apache-2.0
"""The status page of a running manager: what it shows, what a page costs, and that reading changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_driver.embedded.http import COOKIE
from csi_driver.embedded.model import VOLUMES, Volume
from csi_driver.embedded.store import Change
from csi_driver.http_requests import HttpRequest, HttpResponse
from tests.unit.embedded.fake_reflinks import FakeReflinks
from tests.unit.embedded.manager import Manager, running, settings_in
from tests.unit.status_page.storage import Browser, text_of

VIEWS = (
    "",
    "volumes",
    "volumes?unhealthy=1&order=desc",
    "volume?name=a",
    "attachments",
    "snapshots",
    "errors",
    "login",
)


@contextmanager
def shown(directory: Path, **changes: object) -> Iterator[tuple[Manager, Browser]]:
    with running(settings_in(directory, **changes), reflinks=FakeReflinks()) as manager:
        yield manager, logged_in(manager)


def logged_in(manager: Manager) -> Browser:
    class Page:
        def respond(self, request: HttpRequest) -> HttpResponse:
            return manager.server.api.respond(request)

    browser = Browser(Page())  # type: ignore[arg-type]
    assert browser.log_in(manager.server.password.read(), username="admin@nvidia.com").status == 303
    return browser


def put_volumes(manager: Manager, number: int) -> None:
    """Record volumes like `a` under other names, without files."""
    (like,) = manager.server.store.all(VOLUMES)

    def put(change: Change) -> None:
        for index in range(number):
            name = f"v{index:05d}"
            values = {key: getattr(like, key) for key in Volume.__slots__}
            health = "critical" if index % 1000 == 7 else "healthy"
            change.put(VOLUMES, name, Volume(**{**values, "name": name, "uuid": f"uuid-{index}", "health": health}))

    manager.server.store.write(put)


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the records that each list of the store gives."""
    from csi_driver.embedded.store import Store

    counts: list[int] = []
    for name in ("page", "all", "everywhere"):
        real = getattr(Store, name)

        def counted(self, *arguments, real=real, **more):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN003, ANN202
            rows = real(self, *arguments, **more)
            counts.append(len(rows))
            return rows

        monkeypatch.setattr(Store, name, counted)
    return counts


def test_each_page_shows_what_the_manager_holds(tmp_path: Path) -> None:
    with shown(tmp_path) as (manager, browser):
        metadata = {
            "csi_name": "pvc-1",
            "csi.storage.k8s.io/pvc/namespace": "team",
            "csi.storage.k8s.io/pvc/name": "<b>",
        }
        manager.save("a", metadata=metadata)
        manager.attach("a", mode="EXCLUSIVE_READ_WRITE")
        manager.cut("snap-1", "a")
        manager.clone("snap-1", "copy", kind="snapshot", uuid=manager.snapshot("snap-1")["uuid"])
        manager.cut("snap-2", "copy")
        overview, volumes = text_of(browser.get("/status/")), text_of(browser.get("/status/volumes"))
        assert "2 Volumes 0 Unhealthy volumes 1 Attachments 2 Snapshots" in overview
        assert "node-1 ready 1 node-2 ready 0" in overview
        assert "a team/&lt;b&gt; 953 MiB healthy online node-1" in volumes
        assert "snapshot snap-1" in volumes
        volume = text_of(browser.get("/status/volume?name=a"))
        assert "Claim team/&lt;b&gt;" in volume
        assert "node-1 attached enabled EXCLUSIVE_READ_WRITE loop0 at" in volume
        assert "this volume a snapshot snap-1" in volume
        assert "volume copy" in volume
        tree = text_of(browser.get("/status/volume?name=copy"))
        assert "volume a snapshot snap-1 this volume copy snapshot snap-2" in tree
        assert manager.uuid("a") in text_of(browser.get("/status/attachments"))
        assert "No volume is attached" in text_of(browser.get("/status/attachments?node=node-2"))
        assert "snap-1 a 2" in text_of(browser.get("/status/snapshots"))


def test_a_volume_without_its_file_is_in_the_list_of_unhealthy_ones(tmp_path: Path) -> None:
    with shown(tmp_path) as (manager, browser):
        manager.save("a")
        manager.save("b")
        manager.attach("a")
        manager.detach("a")
        manager.server.pool.file(manager.uuid("a")).unlink()
        manager.server.volumes.check_files()
        listed = text_of(browser.get("/status/volumes?unhealthy=1"))
        assert "1 volume " in listed
        assert "a 953 MiB critical offline" in listed
        assert "problem Volumes 1 of 2 not healthy" in text_of(browser.get("/status/"))


def test_a_get_of_every_path_changes_nothing(tmp_path: Path) -> None:
    with shown(tmp_path) as (manager, browser):
        manager.save("a")
        manager.attach("a")
        manager.cut("snap-1", "a")
        store = manager.server.store
        store.flush()
        before = store._connection.total_changes, store._staged.puts, dict(store._unsaved), repr(store._committed)
        for view in VIEWS:
            assert browser.get(f"/status/{view}").status == 200
        assert before == (store._connection.total_changes, store._staged.puts, store._unsaved, repr(store._committed))


def test_a_page_of_ten_thousand_volumes_reads_its_own_rows(tmp_path: Path, rows_read: list[int]) -> None:
    with shown(tmp_path) as (manager, browser):
        manager.save("a")
        put_volumes(manager, 10_000)
        for view in (
            "volumes",
            "volumes?at=150&order=desc",
            "volumes?q=v01",
            "volumes?unhealthy=1",
            "volume?name=a",
            "",
        ):
            rows_read.clear()
            assert browser.get(f"/status/{view}").status == 200
            assert sum(rows_read) <= 60, view


def test_pages_of_a_list_have_each_volume_once_in_both_orders(tmp_path: Path) -> None:
    with shown(tmp_path) as (manager, browser):
        manager.save("a")
        put_volumes(manager, 120)
        names = ["a", *(f"v{index:05d}" for index in range(120))]
        for order, expected in (("", names), ("&order=desc", names[::-1])):
            pages = [text_of(browser.get(f"/status/volumes?at={at}{order}")).split() for at in range(3)]
            assert [word for page in pages for word in page if word in names] == expected
        assert "1\N{EN DASH}50 of 121 volumes" in text_of(browser.get("/status/volumes?at=99"))
        assert "51\N{EN DASH}100 of 100 volumes" in text_of(browser.get("/status/volumes?q=v000&at=1"))
        assert "20 volumes" in text_of(browser.get("/status/volumes?q=v001"))


def test_a_list_follows_the_changes_of_its_volumes(tmp_path: Path) -> None:
    with shown(tmp_path) as (manager, browser):
        assert "There are no volumes yet" in text_of(browser.get("/status/volumes"))
        manager.save("a")
        assert "1 volume " in text_of(browser.get("/status/volumes"))
        put_volumes(manager, 8)
        assert "v00007" in text_of(browser.get("/status/volumes?unhealthy=1"))
        manager.delete("a")
        assert "8 volumes" in text_of(browser.get("/status/volumes"))


def test_a_session_of_the_page_is_none_of_the_api(tmp_path: Path) -> None:
    with shown(tmp_path) as (manager, browser):
        token = browser.cookie.partition("=")[2]
        for path in ("/volumes/all/0/0", "/systemInfo"):
            refused = manager.server.api.respond(HttpRequest("GET", path, {}, {"cookie": f"{COOKIE}={token}"}))
            assert refused.status == 302
        page = manager.server.api.respond(
            HttpRequest(
                "GET", "/status/", {}, {"host": "localhost", "cookie": f"nvmesh-storage-status={manager._session}"}
            )
        )
        assert page.status == 303


def log_in_at_api(manager: Manager, password: str, peer: str, user: str = "admin", **headers: str) -> HttpResponse:
    body = f'{{"username": "{user}", "password": "{password}"}}'.encode()
    sent = {"content-type": "application/json", **headers}
    return manager.server.api.respond(HttpRequest("POST", "/login", {}, sent, body, peer))


def test_failed_logins_at_the_api_slow_down_that_client_alone(tmp_path: Path) -> None:
    with shown(tmp_path) as (manager, _):
        right = manager.server.password.read()
        answers = [log_in_at_api(manager, "wrong", "192.0.2.1").status for _ in range(30)]
        assert answers == [401] * 10 + [429] * 20
        assert log_in_at_api(manager, right, "192.0.2.1").status == 429
        assert log_in_at_api(manager, right, "192.0.2.2").status == 200
        assert [log_in_at_api(manager, "wrong", "192.0.2.2", f"user{n}").status for n in range(11)] == [401] * 10 + [
            429
        ]
        assert log_in_at_api(manager, right, "192.0.2.2").status == 200


def test_logins_that_a_controller_checks_for_its_page_do_not_slow_down_its_own(tmp_path: Path) -> None:
    with shown(tmp_path) as (manager, _):
        agent = {"user-agent": "nvmesh-csi.excelero.com/status-page"}
        for _ in range(30):
            log_in_at_api(manager, "wrong", "192.0.2.1", **agent)
        assert log_in_at_api(manager, manager.server.password.read(), "192.0.2.1", **agent).status == 429
        assert log_in_at_api(manager, manager.server.password.read(), "192.0.2.1").status == 200


def test_guesses_at_the_page_do_not_keep_the_driver_of_the_same_machine_out(tmp_path: Path) -> None:
    with shown(tmp_path) as (manager, browser):
        answers = [browser.log_in("wrong").status for _ in range(12)]
        assert answers == [401] * 10 + [429] * 2
        assert log_in_at_api(manager, manager.server.password.read(), "192.0.2.1").status == 200
        assert browser.log_in(manager.server.password.read()).status == 429
