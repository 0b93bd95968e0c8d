# SPDX-License-Identifier: Apache-2.0
"""API versions: forms, the lowest supported one, and one request for each session."""

from __future__ import annotations

import logging

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import PreconditionFailed
from csi_driver.management.client import ManagementClient
from csi_driver.management.server_session import ManagementTooOld
from tests.unit.management.conftest import Connect
from tests.unit.management.double import ManagementDouble, Says, sample

INFO = "/systemInfo"
WORK = ["15", 15, "16", 16, "17.2.0", "18.0.0", "18", "v18.0.0", "18.0.0-rc1", " 16 ", 17.2]
NEWER = ["19", 19, "20.1.0", "18446744"]
GARBAGE = ["latest", "eighteen", "1 8", "18,0", [], {}, True, "9" * 50]
TOO_OLD = ["14", 14, "9", "2.7.2", 5, "0", None, ""]


def info(version: object) -> Says:
    return Says({**sample("system-info"), "APIVersion": version})


def reads(server: ManagementDouble, client: ManagementClient, version: object) -> None:
    """Read a volume from a server of this version."""
    server.on("GET", INFO, info(version))
    server.on("GET", "/volumes/v1", Says(sample("volume")))
    client.volume("v1", deadline=Deadline.after(10))


@pytest.mark.parametrize("version", WORK, ids=repr)
def test_a_known_version_works_without_a_warning(
    server: ManagementDouble, client: ManagementClient, version: object, caplog: pytest.LogCaptureFixture
) -> None:
    reads(server, client, version)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("version", [*NEWER, *GARBAGE], ids=repr)
def test_an_unknown_version_works_with_one_warning(
    server: ManagementDouble, client: ManagementClient, version: object, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        reads(server, client, version)
        server.expire_sessions()
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


@pytest.mark.parametrize("version", TOO_OLD, ids=repr)
def test_a_version_below_the_lowest_is_refused(
    server: ManagementDouble, client: ManagementClient, version: object
) -> None:
    with pytest.raises(PreconditionFailed, match=r"expected API version 15 or newer.*--allow-incompatible-versions"):
        reads(server, client, version)
    assert not server.seen("/volumes/v1")


def test_a_server_without_a_version_is_refused(server: ManagementDouble, client: ManagementClient) -> None:
    server.on("GET", INFO, Says({"version": "2.5.0"}))
    with pytest.raises(ManagementTooOld, match="got an API without a version"):
        client.volume("v1", deadline=Deadline.after(10))


def test_the_error_names_the_version(server: ManagementDouble, client: ManagementClient) -> None:
    with pytest.raises(ManagementTooOld, match=r"API version '9\.1'"):
        reads(server, client, "9.1")


@pytest.mark.parametrize("version", TOO_OLD, ids=repr)
def test_an_allowed_version_below_the_lowest_works_with_a_warning(
    server: ManagementDouble, connect: Connect, version: object, caplog: pytest.LogCaptureFixture
) -> None:
    reads(server, connect(server.url, allow_incompatible_versions=True), version)
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_an_upgraded_server_is_no_longer_refused(server: ManagementDouble, client: ManagementClient) -> None:
    with pytest.raises(ManagementTooOld):
        reads(server, client, 9)
    reads(server, client, "18.0.0")


def test_system_information_of_an_old_server_is_refused(server: ManagementDouble, client: ManagementClient) -> None:
    server.on("GET", INFO, info(9))
    with pytest.raises(ManagementTooOld):
        client.system_info(deadline=Deadline.after(10))


# --- when it is asked for -------------------------------------------------------------------------------


def test_no_request_is_sent_before_the_first_call(server: ManagementDouble, client: ManagementClient) -> None:
    assert (server.received, server.logins) == ([], [])


def test_the_version_is_requested_once_a_session(server: ManagementDouble, client: ManagementClient) -> None:
    for _ in range(5):
        reads(server, client, "18.0.0")
    assert len(server.seen(INFO)) == 1
    server.expire_sessions()
    reads(server, client, "18.0.0")
    assert len(server.seen(INFO)) == 2
