# SPDX-License-Identifier: Apache-2.0
"""User and password from a mounted Secret that changes while the driver runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import Denied, Unauthenticated
from csi_driver.management.client import ManagementClient
from csi_driver.management.settings import Credentials, ManagementSettings, read_credentials
from csi_driver.storage_model import Volume
from tests.unit.management.double import PASSWORD, USER, ManagementDouble, Says

INFO = "/systemInfo"
VOLUME = Volume("v1", "74025fd0-e73d-11f1-a2b3-7550e9e5980f", 2441216, 4096, 10.0, "online", "none")
DONE = Says([{"_id": "v1", "uuid": VOLUME.uuid, "success": True, "error": None, "payload": None}])
NOT_ADMIN = Says({"message": "Operation not permitted.", "id": 401}, 401)


class Secret:
    """A directory like a Secret mounted by kubelet: each file is a link into the newest version."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._versions = 0
        self.put(USER, PASSWORD)
        for name in ("username", "password"):
            (directory / name).symlink_to(f"..data/{name}")

    def put(self, username: str, password: str) -> None:
        self._versions += 1
        version = self.directory / f"..v{self._versions}"
        version.mkdir(parents=True)
        (version / "username").write_text(username + "\n")
        (version / "password").write_text(password)
        link = self.directory / "..new"
        link.symlink_to(version.name)
        link.replace(self.directory / "..data")


@pytest.fixture
def secret(tmp_path: Path) -> Secret:
    return Secret(tmp_path / "secret")


@pytest.fixture
def client(server: ManagementDouble, secret: Secret) -> Iterator[ManagementClient]:
    made = ManagementClient(
        ManagementSettings(
            servers=(server.url,),
            username_file=secret.directory / "username",
            password_file=secret.directory / "password",
        )
    )
    yield made
    made.close()


def test_user_and_password_come_from_the_secret(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline
) -> None:
    client.system_info(deadline=deadline)
    assert server.logins == [{"username": USER, "password": PASSWORD}]


def test_a_changed_secret_does_not_end_the_session(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, secret: Secret
) -> None:
    client.system_info(deadline=deadline)
    server.password = "rotated"
    secret.put(USER, "rotated")
    client.system_info(deadline=deadline)
    assert len(server.logins) == 1


def test_a_changed_password_is_used_at_the_next_login(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, secret: Secret
) -> None:
    client.system_info(deadline=deadline)
    server.password = "rotated"
    secret.put(USER, "rotated")
    server.expire_sessions()
    client.system_info(deadline=deadline)
    assert server.logins[-1] == {"username": USER, "password": "rotated"}


def test_a_corrected_secret_ends_the_refused_logins(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, secret: Secret
) -> None:
    server.password = "rotated"
    for _ in range(3):
        with pytest.raises(Unauthenticated):
            client.system_info(deadline=deadline)
    secret.put(USER, "rotated")
    assert client.system_info(deadline=deadline).api_version == "18.0.0"


def test_a_denied_request_is_sent_again_with_changed_credentials(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, secret: Secret
) -> None:
    """The session of the old user lasts for another hour, so the error is the occasion to read the Secret."""
    server.on("POST", "/volumes/update", NOT_ADMIN, NOT_ADMIN, DONE)
    with pytest.raises(Denied):
        client.set_metadata(VOLUME, {}, deadline=deadline)
    assert len(server.logins) == 1
    server.password = "admin's"
    secret.put(USER, "admin's")
    client.set_metadata(VOLUME, {}, deadline=deadline)
    assert len(server.logins) == 2


def test_after_a_forced_change_of_the_password_the_new_one_is_used(
    server: ManagementDouble, client: ManagementClient, deadline: Deadline, secret: Secret
) -> None:
    must_change = Says({"_id": None, "uuid": None, "success": False, "error": {"id": 1268}, "payload": None})
    server.on("GET", INFO, must_change)
    with pytest.raises(Unauthenticated, match="changePassword"):
        client.system_info(deadline=deadline)
    server.password = "changed"
    secret.put(USER, "changed")
    server.on("GET", INFO, Says({"version": "3.5.0", "APIVersion": "18.0.0"}))
    client.system_info(deadline=deadline)
    assert server.logins[-1] == {"username": USER, "password": "changed"}


def test_a_missing_credentials_file_is_named(client: ManagementClient, deadline: Deadline, secret: Secret) -> None:
    (secret.directory / "username").unlink()
    with pytest.raises(Unauthenticated, match=r"user file .*/username"):
        client.system_info(deadline=deadline)


def test_user_and_password_come_from_one_version_of_the_secret(secret: Secret, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Secret changes between the reading of the two files."""
    settings = ManagementSettings(
        servers=(), username_file=secret.directory / "username", password_file=secret.directory / "password"
    )
    read_text, reads = Path.read_text, [0]

    def read_and_change(path: Path, **options: str) -> str:
        text = read_text(path, **options)
        reads[0] += 1
        if reads[0] == 1:
            secret.put("new user", "new password")
        return text

    monkeypatch.setattr(Path, "read_text", read_and_change)
    assert read_credentials(settings) == Credentials("new user", "new password")


def test_repr_of_credentials_hides_the_password() -> None:
    assert "canary" not in repr(Credentials("user", "canary"))
