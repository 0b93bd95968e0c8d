# SPDX-License-Identifier: Apache-2.0
"""The management servers in the storage client's configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from csi_driver.errors import HostFailure
from csi_driver.host.connectors.nvmesh import management_hosts, parse_management_servers


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ('MANAGEMENT_PROTOCOL="https"\nMANAGEMENT_SERVERS="m1:4001,m2:4001"\n', ("m1", "m2")),
        ("MANAGEMENT_SERVERS=m1:4001", ("m1",)),
        ("export MANAGEMENT_SERVERS='m1:4001 m2'  # both", ("m1", "m2")),
        ('MANAGEMENT_SERVERS = "wss://m1.example.com:4001/"', ("m1.example.com",)),
        ('MANAGEMENT_SERVERS="[fe80::1]:4001,10.0.0.1:4001,fe80::2"', ("fe80::1", "10.0.0.1", "fe80::2")),
        ('# MANAGEMENT_SERVERS="m1:4001"', ()),
        ('MANAGEMENT_SERVERS="m1:4001"\nMANAGEMENT_SERVERS="m2:4001"', ("m2",)),
        ('MANAGEMENT_SERVERS="m1"\nMANAGEMENT_SERVERS=""', ()),
        ('OTHER_MANAGEMENT_SERVERS="m1"', ()),
        ("", ()),
    ],
)
def test_management_servers_are_read_as_by_a_shell(text: str, hosts: tuple[str, ...]) -> None:
    assert tuple(host for host, _ in parse_management_servers(text)) == hosts


def test_a_missing_configuration_has_no_servers(tmp_path: Path) -> None:
    assert management_hosts(tmp_path / "nvmesh.conf") == ()


def test_an_unreadable_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostFailure, match="cannot be read"):
        management_hosts(tmp_path)
