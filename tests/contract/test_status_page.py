# SPDX-License-Identifier: Apache-2.0
"""The controller's status page over the client of the management, the embedded manager behind it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from csi_driver.controller.status import ClusterStatus, StatusManagement
from csi_driver.deadline import Deadline
from csi_driver.http_requests import HttpResponse
from csi_driver.management.client import ManagementClient
from csi_driver.management.settings import ManagementSettings
from csi_driver.settings import HttpSettings
from csi_driver.status_page.server import serving_status
from tests.unit.embedded.fake_reflinks import FakeReflinks
from tests.unit.embedded.manager import Manager, running, settings_in
from tests.unit.status_page.storage import text_only

ZONE = "zone-1"


class OneZone:
    def __init__(self, client: ManagementClient) -> None:
        self.client = client

    def zones(self) -> Sequence[str]:
        return (ZONE,)

    def management(self, zone: str) -> StatusManagement | None:
        return self.client if zone == ZONE else None


class Caller:
    """A user of the page at an address."""

    def __init__(self, address: HttpSettings) -> None:
        self.url = f"http://{address}"
        self.session = requests.Session()

    def log_in(self, password: str) -> int:
        form = {"username": "admin", "password": password}
        headers = {"Origin": self.url}
        answer = self.session.post(f"{self.url}/status/login", form, headers=headers, allow_redirects=False, timeout=60)
        return answer.status_code

    def read(self, view: str) -> str:
        answer = self.session.get(f"{self.url}/status/{view}", allow_redirects=False, timeout=60)
        assert answer.status_code == 200, answer.status_code
        return text_only(answer.text)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with running(settings_in(tmp_path), reflinks=FakeReflinks()) as manager:
        manager.server.start()
        yield manager


@contextmanager
def client_of(manager: Manager) -> Iterator[ManagementClient]:
    settings = ManagementSettings(
        (manager.server.url,), username="admin@nvidia.com", password_file=manager.server.password.path
    )
    client = ManagementClient(settings)
    yield client
    client.close()


@pytest.fixture
def caller(manager: Manager) -> Iterator[Caller]:
    with (
        client_of(manager) as client,
        serving_status(HttpSettings("127.0.0.1", 0), ClusterStatus(OneZone(client), "driver")) as address,
    ):
        yield Caller(address)


def test_the_page_shows_what_the_management_tells(manager: Manager, caller: Caller) -> None:
    manager.save("a", metadata={"csi_name": "pvc-1"})
    manager.attach("a")
    manager.cut("snap-1", "a")
    assert caller.log_in(manager.server.password.read()) == 303
    assert "1 Volumes" in caller.read("")
    assert "93.1 GiB" in caller.read("")
    assert "node-1 ready node-2 ready" in caller.read("")
    assert "a pvc-1 953 MiB healthy online" in caller.read("volumes")
    assert "node-1 attached enabled SHARED_READ_WRITE" in caller.read("volume?name=a")
    assert "snapshot snap-1" in caller.read("volume?name=a")
    assert "a attached enabled" in caller.read("attachments?node=node-1")
    assert "snap-1 a 2" in caller.read("snapshots")


def test_a_list_is_read_part_by_part_and_from_a_prefix(manager: Manager, caller: Caller) -> None:
    names = [f"v-{index:03d}" for index in range(60)]
    for name in ("a", *names, "w"):
        manager.save(name)
    caller.log_in(manager.server.password.read())
    first, second = caller.read("volumes?q=v-").split(), caller.read("volumes?q=v-&at=v-049").split()
    assert [word for word in first if word in ("a", "w", *names)] == names[:50]
    assert [word for word in second if word in ("a", "w", *names)] == names[50:]
    assert "No volume matches" in caller.read("volumes?q=%C3%BC")


def test_a_login_is_checked_once_by_the_management_and_opens_no_other_session(
    manager: Manager, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    logins: list[str | None] = []
    real = manager.server.api.public["POST", "/login"]

    def note(request):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        logins.append(request.headers.get("user-agent"))
        return real(request)

    monkeypatch.setitem(manager.server.api.public, ("POST", "/login"), note)
    assert caller.log_in("wrong") == 401
    assert caller.log_in(manager.server.password.read()) == 303
    assert len(logins) == 2
    caller.read("volumes")
    # The third is the controller's own. The manager tells them apart by their User-Agent.
    assert [str(agent).endswith("/status-page") for agent in logins] == [True, True, False]


def test_guesses_at_the_page_never_delay_the_controller_s_own_login(manager: Manager, caller: Caller) -> None:
    answers = [caller.log_in("wrong") for _ in range(20)]
    assert answers == [401] * 5 + [429] * 15
    with client_of(manager) as own:
        assert own.system_info(deadline=Deadline.after(60)).version


def test_a_management_that_fails_is_named_to_users_that_are_logged_in(
    manager: Manager, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller.log_in(manager.server.password.read())
    monkeypatch.setattr(manager.server._http, "respond", lambda _: HttpResponse(503))
    answer = caller.session.get(f"{caller.url}/status/volumes", timeout=60)
    assert answer.status_code == 503
    assert manager.server.url in answer.text


@pytest.mark.parametrize("module", ["csi_driver.embedded.server", "csi_driver.serving"])
def test_a_role_loads_no_template_engine_before_a_page_is_asked_for(module: str) -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"],
        stdout=subprocess.PIPE, text=True, timeout=60, check=True,
    ).stdout.split()  # fmt: skip
    assert module in loaded
    assert not {"jinja2", "csi_driver.status_page.web", "csi_driver.embedded.status"} & set(loaded)
