# SPDX-License-Identifier: Apache-2.0
"""The clusters file in its own form and those of the older drivers: required and refused settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.management.clusters import ClustersFile, parse_clusters, server_url
from csi_driver.management.settings import ClusterDefaults, ManagementSettings
from csi_driver.yaml_document import InvalidDocument, read_source

NOTHING = ClusterDefaults(ManagementSettings(()), "single-zone-cluster")
USER = ClusterDefaults(
    ManagementSettings((), username="admin@nvidia.com", password_file=Path("/secret/password")),
    "single-zone-cluster",
    tls_is_decided=True,
)
OWN = """
topologyKey: example.com/cluster
zoneSelectionPolicy: round-robin
zones:
  east:
    servers: [https://m1:4000, "m2:4001"]
    user: csi@nvidia.com
    passwordFile: /secrets/east/password
    caFile: /secrets/east/ca.pem
    requestTimeout: 7
  west:
    servers: m3, m4:4000
    tlsVerify: false
    clientCertificateFile: /secrets/west/tls.crt
    clientKeyFile: /secrets/west/tls.key
"""
TOPOLOGY = {
    "type": "multiple-nvmesh-clusters",
    "topologyKey": "nvmesh-csi.excelero.com/zone",
    "zoneSelectionPolicy": "random",
    "zones": {
        "a": {"management": {"servers": "a1:4000,a2:4000", "user": "admin", "password": "hush-a", "tlsVerify": False}},
        "b": {
            "management": {
                "servers": "b1:4000", "username": "csi", "password": "hush-b", "protocol": "http", "ws_port": 4001,
            }
        },
    },
}  # fmt: skip
CONFIG_MAP = {
    "management.servers": "m1:4000,m2:4000",
    "management.protocol": "https",
    "attachIOEnabledTimeout": "45",
    "detachTimeout": "90",
    "forceDetach": "true",
    "usePreempt": "false",
    "sdkHttpRequestTimeout": "20",
    "grpcMaxWorkers": "50",
    "zoneMaxDisabledTimeInSeconds": "120",
    "logLevel": "DEBUG",
    "sdkLogLevel": "DEBUG",
    "kubeClientLogLevel": "INFO",
    "printStackTraces": "false",
    "topologyConfigMapName": "nvmesh-csi-topology",
    "csiConfigMapName": "nvmesh-csi-config",
    "tlsVerify": "true",
    "allowIncompatibleVersions": "true",
    "topology": "",
}


def problems(source: str | Mapping[str, str], defaults: ClusterDefaults = NOTHING) -> list[str]:
    with pytest.raises(InvalidDocument) as caught:
        parse_clusters(source, defaults)
    return list(caught.value.problems)


def one(file: ClustersFile) -> ManagementSettings:
    (settings,) = file.zones.values()
    return settings


# --- the own form ------------------------------------------------------------------------------------------------


def test_each_zone_has_its_servers_and_credentials() -> None:
    file = parse_clusters(OWN, NOTHING)
    assert list(file.zones) == ["east", "west"]
    assert file.flags == {
        "--topology-key": ("topologyKey", "example.com/cluster"),
        "--zone-selection-policy": ("zoneSelectionPolicy", "round-robin"),
    }
    east, west = file.zones.values()
    assert east.servers == ("https://m1:4000", "https://m2:4001")
    assert (east.username, east.password_file) == ("csi@nvidia.com", Path("/secrets/east/password"))
    assert (east.ca_file, east.tls_verify, east.request_timeout_s) == (Path("/secrets/east/ca.pem"), True, 7)
    assert west.servers == ("https://m3:4000", "https://m4:4000")
    assert (west.username, west.tls_verify) == ("", False)
    assert (west.client_certificate, west.client_key) == (Path("/secrets/west/tls.crt"), Path("/secrets/west/tls.key"))


def test_json_is_read_like_yaml() -> None:
    text = json.dumps({"zones": {"a": {"servers": ["https://m:4000"]}}}, indent="\t")
    assert parse_clusters(text, USER) == parse_clusters("zones: {a: {servers: ['https://m:4000']}}", USER)


def test_a_zone_uses_the_command_line_for_absent_keys() -> None:
    defaults = replace(USER, management=replace(USER.management, ca_file=Path("/ca.pem"), request_timeout_s=3))
    settings = one(parse_clusters("zones: {a: {servers: m}}", defaults))
    assert settings == replace(defaults.management, servers=("https://m:4000",), zone="a")


def test_a_zone_with_a_certificate_takes_no_user_from_the_command_line() -> None:
    settings = one(parse_clusters("zones: {a: {servers: m, clientCertificateFile: /tls.crt}}", USER))
    assert (settings.username, settings.password_file, settings.client_certificate) == ("", None, Path("/tls.crt"))


def test_a_zone_with_a_user_file_uses_the_password_file_of_the_command_line() -> None:
    settings = one(parse_clusters("zones: {a: {servers: m, userFile: /u}}", USER))
    assert (settings.username, settings.username_file, settings.password_file) == (
        "", Path("/u"), Path("/secret/password")
    )  # fmt: skip


def test_all_problems_of_a_file_are_reported_together() -> None:
    text = """
    zones:
      a: {servers: 5, tlsVerify: perhaps, colour: red}
      b: {servers: "ftp://m", passwordFile: /p, requestTimeout: -1}
      "not a name": {}
      c: nothing
    shape: round
    """
    told = "\n".join(problems(text))
    for wanted in (
        "unknown key 'shape'", "zone a: unknown key 'colour'", "zone a: servers: expected a list",
        "zone a: tlsVerify: expected", "zone b: management server: expected https://HOST:PORT, got 'ftp://m'",
        "zone b: requestTimeout: expected a time", "zone name: expected at most 63", "got 'not a name'",
        "zone c: expected a mapping",
    ):  # fmt: skip
        assert wanted in told


@pytest.mark.parametrize("text", ["", "[]", "zones: {}", "zones: 5", "5", "{}", '"text"'])
def test_a_file_without_zones_is_refused(text: str) -> None:
    assert problems(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("zones:\n  a:\n    password: hush\n   x: y\n", "line 4"),
        ('{"zones": {"a": {"password": "hush"}}\n "x": 1}', "line 2"),
        ("zones: {a: {servers: m, password: hush, password: hush}}", "'password' is given twice"),
        ('{"zones": {"a": {"password": "hush", "password": "hush"}}}', "'password' is given twice"),
        ("zones: {a: {servers: m, password: hush}}", "set passwordFile"),
        ("zones: {a: {servers: m, passwordFile: [hush]}}", "passwordFile: expected text"),
        ("hush", "expected a mapping"),
        ("zones: !!python/object/apply:os.system ['hush']", "line 1"),
    ],
)
def test_a_problem_names_the_key_or_line_and_never_the_value(text: str, place: str) -> None:
    told = "; ".join(problems(text, USER))
    assert place in told
    assert "hush" not in told


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("m", "https://m:4000"),
        ("m:1", "https://m:1"),
        ("http://m:1/", "http://m:1"),
        ("10.0.0.1", "https://10.0.0.1:4000"),
        ("[::1]:1", "https://[::1]:1"),
        ("[::1]", "https://[::1]:4000"),
        ("fe80::1", "https://[fe80::1]:4000"),
    ],
)
def test_a_server_may_be_a_url_host_or_host_and_port(address: str, url: str) -> None:
    assert server_url(address, "https") == url


# --- the older drivers' ------------------------------------------------------------------------------------------


def test_the_topology_of_1_4_is_accepted() -> None:
    file = parse_clusters(json.dumps(TOPOLOGY), NOTHING)
    a, b = file.zones["a"], file.zones["b"]
    assert (a.servers, a.username, a.password) == (("https://a1:4000", "https://a2:4000"), "admin", "hush-a")
    assert (b.servers, b.username, b.password) == (("http://b1:4000",), "csi", "hush-b")
    assert [text for _, text in file.flags.values()] == ["nvmesh-csi.excelero.com/zone", "random"]
    assert any("ws_port has no effect" in warning for warning in file.warnings)


def test_repr_hides_passwords() -> None:
    assert "hush" not in repr(parse_clusters(json.dumps(TOPOLOGY), NOTHING))


def test_the_config_map_of_1_4_is_accepted() -> None:
    file = parse_clusters(CONFIG_MAP, replace(USER, tls_is_decided=False))
    settings = file.zones["single-zone-cluster"]
    assert settings.servers == ("https://m1:4000", "https://m2:4000")
    assert (settings.tls_verify, settings.request_timeout_s, settings.allow_incompatible_versions) == (True, 20, True)
    assert {flag: text for flag, (_, text) in file.flags.items()} == {
        "--attach-io-enabled-timeout": "45", "--detach-timeout": "90", "--force-detach": "true",
        "--log-level": "debug",
    }  # fmt: skip
    told = " ".join(file.warnings)
    for key in (
        "grpcMaxWorkers", "zoneMaxDisabledTimeInSeconds", "sdkLogLevel", "kubeClientLogLevel", "printStackTraces",
        "topologyConfigMapName", "csiConfigMapName",
    ):  # fmt: skip
        assert f"{key} has no effect" in told


def test_a_topology_in_the_config_map_takes_precedence_over_its_servers() -> None:
    file = parse_clusters({**CONFIG_MAP, "topology": json.dumps(TOPOLOGY)}, NOTHING)
    assert list(file.zones) == ["a", "b"]
    assert file.zones["b"].request_timeout_s == 20


def test_the_config_map_may_be_one_file() -> None:
    assert parse_clusters(json.dumps(CONFIG_MAP), USER) == parse_clusters(CONFIG_MAP, USER)


def test_the_api_params_of_1_9_are_accepted() -> None:
    params = {
        "managementServers": "m1:4000,m2:4000",
        "managementProtocol": "https",
        "user": "csi@nvidia.com",
        "password": "hush",
        "tlsVerify": False,
    }
    settings = one(parse_clusters(json.dumps({"apiParams": params}), NOTHING))
    assert settings.servers == ("https://m1:4000", "https://m2:4000")
    assert (settings.username, settings.password, settings.tls_verify) == ("csi@nvidia.com", "hush", False)


def test_use_preempt_is_warned_about() -> None:
    assert "usePreempt takes volumes" in " ".join(parse_clusters({**CONFIG_MAP, "usePreempt": "True"}, USER).warnings)


def test_an_old_configuration_must_set_tls_verify() -> None:
    old = {key: value for key, value in CONFIG_MAP.items() if key != "tlsVerify"}
    assert "tlsVerify: expected true or false" in "; ".join(problems(old, replace(USER, tls_is_decided=False)))
    assert parse_clusters(old, USER).zones
    plain = {**old, "management.protocol": "http"}
    assert parse_clusters(plain, replace(USER, tls_is_decided=False)).zones


def test_an_old_configuration_must_set_user_and_password() -> None:
    told = problems({key: value for key, value in CONFIG_MAP.items() if key != "tlsVerify"})
    assert len(told) == 2
    assert "user and password: expected a value, got none; the account built into the older driver" in told[0]
    assert "tlsVerify: expected true or false" in told[1]
    without = json.loads(json.dumps(TOPOLOGY))
    del without["zones"]["a"]["management"]["password"]
    (problem,) = problems(json.dumps(without))
    assert problem.startswith("zone a: password: expected a value")


def test_unknown_keys_of_older_forms_are_refused() -> None:
    assert "unknown key 'shape'" in problems({**CONFIG_MAP, "shape": "round"}, USER)[0]
    wrong = json.loads(json.dumps(TOPOLOGY))
    wrong["zones"]["a"]["management"]["shape"] = "round"
    assert "zone a: management: unknown key 'shape'" in problems(json.dumps(wrong))[0]


# --- reading ------------------------------------------------------------------------------------------------------


def test_a_mounted_config_map_is_read_as_one_version(tmp_path: Path) -> None:
    version = tmp_path / "..2026_11_24"
    version.mkdir()
    (version / "management.servers").write_text("m:4000\n")
    (tmp_path / "..data").symlink_to(version.name)
    (tmp_path / "management.servers").symlink_to("..data/management.servers")
    assert read_source(tmp_path) == {"management.servers": "m:4000\n"}


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidDocument, match=r"absent cannot be read: No such file"):
        read_source(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(InvalidDocument, match="expected UTF-8"):
        read_source(tmp_path / "binary")


@pytest.mark.parametrize("server", ["https://m1:4000", "M1", "https://m1:4000/"])
def test_two_zones_may_not_share_a_server(server: str) -> None:
    zones = {"a": {"servers": ["m1:4000"]}, "b": {"servers": ["m2", server]}}
    with pytest.raises(InvalidDocument, match="zone a too; describe each cluster as one zone"):
        parse_clusters(json.dumps({"zones": zones}), USER)
    old = {
        zone: {"management": {"servers": "m1:4000", "user": "csi", "password": "x", "tlsVerify": True}} for zone in "ab"
    }
    with pytest.raises(InvalidDocument, match="zone a too; describe each cluster as one zone"):
        parse_clusters(json.dumps({"zones": old}), NOTHING)
