# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from csi_driver.errors import InvalidRequest
from csi_driver.management.client import ManagementClient
from csi_driver.management.settings import ManagementSettings


def settings(*servers: str, **options: object) -> ManagementSettings:
    wanted: dict[str, object] = {"username": "csi@example.com", "password_file": Path("/run/password"), **options}
    return ManagementSettings(servers=servers or ("https://m1:4000",), **wanted)  # type: ignore[arg-type]


def test_a_user_with_a_password_file_is_valid() -> None:
    assert settings().problems() == ()


def test_a_client_certificate_needs_no_user() -> None:
    assert settings(username="", password_file=None, client_certificate=Path("/tls/c.pem")).problems() == ()


def test_a_user_may_come_from_a_file() -> None:
    assert settings(username="", username_file=Path("/run/username")).problems() == ()


@pytest.mark.parametrize(
    "wrong",
    [
        settings("http://127.0.0.1:4000", username="", password_file=None, client_certificate=Path("/tls/c.pem")),
        settings(username="", username_file=Path("/run/username"), password_file=None),
        ManagementSettings(servers=(), username="u", password_file=Path("/p")),
        settings("m1:4000"),
        settings("ftp://m1"),
        settings("https://"),
        settings("https://m1:99999"),
        settings("https://m1:4000/api"),
        settings("https://user:secret@m1:4000"),
        settings("https://m1", "https://m1"),
        settings(password_file=None),
        settings(username=""),
        settings(client_key=Path("/tls/k.pem")),
        settings(request_timeout_s=0),
        settings(max_requests_in_flight=0),
    ],
)
def test_each_invalid_setting_is_one_problem(wrong: ManagementSettings) -> None:
    assert len(wrong.problems()) == 1


def test_all_problems_are_reported_together() -> None:
    assert len(settings("m1", "m2", password_file=None).problems()) == 3


def test_credentials_in_a_url_are_not_quoted() -> None:
    assert "secret" not in "".join(settings("https://user:secret@m1:4000").problems())


def test_plain_http_to_another_machine_is_warned_about() -> None:
    assert len(list(settings("http://m1:4000").warnings())) == 1


@pytest.mark.parametrize("server", ["http://127.0.0.1:4000", "http://localhost:4000", "http://[::1]:4000"])
def test_plain_http_on_this_machine_is_not_warned_about(server: str) -> None:
    assert list(settings(server).warnings()) == []


def test_an_unverified_server_is_warned_about() -> None:
    assert len(list(settings(tls_verify=False).warnings())) == 1


def test_invalid_settings_make_no_client() -> None:
    with pytest.raises(InvalidRequest, match="expected https://HOST:PORT"):
        ManagementClient(settings("m1"))
