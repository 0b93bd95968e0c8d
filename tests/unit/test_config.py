# SPDX-License-Identifier: Apache-2.0
"""Commands: their settings from flags, environment and clusters file, and all problems of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import pytest

from csi_driver.config import VersionCommand, parse
from csi_driver.config.command import Command, UsageError
from csi_driver.config.csi_commands import ControllerCommand, NodeCommand, PreStopCommand, VolumeCommand
from csi_driver.config.local_commands import DemoCommand, LocalCommand, StorageCommand
from csi_driver.embedded.settings import ClientSettings, StorageSettings
from csi_driver.host_model import RunningRole
from csi_driver.local.settings import DemoSettings, LocalSettings
from csi_driver.node_settings import NodeSettings, RegistrationSettings
from csi_driver.settings import (
    ApiSettings,
    AttachBy,
    AttachSettings,
    ControllerSettings,
    Fencing,
    HttpSettings,
    ZonePolicy,
)

Kind = TypeVar("Kind", bound=Command)

CONTROLLER = ["controller", "--endpoint=/c.sock", "--management-server=https://m:4000", "--management-password-file=/p"]
NODE = ["node", "--endpoint", "unix:///n.sock"]
STORAGE = ["storage", "--pool", "/pool"]


def read(kind: type[Kind], argv: list[str], environ: Mapping[str, str] | None = None) -> Kind:
    """Return the command that was read, which must be of this class."""
    command = parse(argv, environ or {})
    assert isinstance(command, kind)
    return command


def controller(*flags: str) -> ControllerCommand:
    return read(ControllerCommand, [*CONTROLLER, *flags])


def node(*flags: str, environ: Mapping[str, str] | None = None) -> NodeCommand:
    return read(NodeCommand, [*NODE, *flags], environ)


def problems(argv: list[str], environ: Mapping[str, str] | None = None) -> str:
    with pytest.raises(UsageError) as refused:
        parse(argv, environ or {})
    return "\n".join(refused.value.problems)


# --- commands ---------------------------------------------------------------------------------------------------


def test_a_controller_needs_an_endpoint_and_a_server() -> None:
    command = controller()
    assert command.endpoint.socket == Path("/c.sock")
    assert (command.endpoint.default_deadline_s, command.endpoint.drain_s, command.endpoint.pre_shutdown_s) == (
        60,
        30,
        0,
    )
    assert command.access.management.servers == ("https://m:4000",)
    assert command.controller == ControllerSettings()
    assert command.access.zone == "single-zone-cluster"


def test_a_node_has_defaults() -> None:
    command = node("--node-name", "n")
    assert command.node == NodeSettings("n", Path("/var/lib/kubelet/plugins/nvmesh-csi.excelero.com/state"))
    assert command.paths.path_roots == (Path("/var/lib/kubelet"),)
    assert command.paths.device_directory == Path("/dev/nvmesh")


def test_a_node_has_the_name_of_its_host() -> None:
    assert node().node.node_name == os.uname().nodename


def test_a_node_that_maintains_its_object_needs_the_api_server() -> None:
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "6443"}
    assert node(environ=pod).node_object.label is False
    labelled = node("--node-label", environ=pod)
    assert labelled.node_object.label is True
    assert labelled.api == ApiSettings("10.0.0.1", 6443)
    assert node("--node-label", "--kubernetes-host", "h").api == ApiSettings("h", 443)
    assert "--node-label requires --kubernetes-host" in problems([*NODE, "--node-label"])
    tainted = node("--startup-taint=a.com/b", "--kubernetes-host=h")
    assert tainted.node_object.startup_taint == "a.com/b"
    assert "--startup-taint requires --kubernetes-host" in problems([*NODE, "--startup-taint=a.com/b"])


def test_a_command_beside_a_role_takes_its_flags_and_environment() -> None:
    flags = ("--driver-name", "d.com", "--endpoint=/e", "--node-name=n")

    def running(*flags: str) -> Callable[[object], RunningRole]:
        return lambda roles: RunningRole(1, "node", flags, {"KUBERNETES_SERVICE_HOST": "h"})

    command = parse(["pre-stop", "--node-name", "mine"], {}, running(*flags))
    assert isinstance(command, PreStopCommand)
    assert (command.driver_name, command.node_name, command.timeout_s) == ("d.com", "mine", 25)
    assert command.api.host == "h"
    alone = read(PreStopCommand, ["pre-stop"])
    assert (alone.driver_name, alone.api.host) == ("nvmesh-csi.excelero.com", "")
    with pytest.raises(UsageError):  # a role takes nothing from another one
        parse(["node"], {}, running("--endpoint=/e"))


def test_a_storage_manager_has_defaults() -> None:
    command = read(StorageCommand, [*STORAGE, "--client", "n=/n"])
    assert command.storage == StorageSettings(Path("/pool"), (ClientSettings.under("n", Path("/n")),))


def test_a_storage_manager_serves_this_machine_by_default() -> None:
    flags = ["--node-name", "n", "--device-directory", "/d", "--status-directory", "/s"]
    clients = read(StorageCommand, [*STORAGE, *flags]).storage.clients
    assert clients == (ClientSettings("n", Path("/d"), Path("/s")),)


def test_a_storage_manager_listens_on_an_address_or_an_inherited_socket() -> None:
    assert read(StorageCommand, [*STORAGE, "--listen", "[::1]:80"]).storage.listen == ("::1", 80)
    assert read(StorageCommand, [*STORAGE, "--listen", "fd:7"]).storage.listen == 7


def test_local_and_demo_have_defaults() -> None:
    assert read(LocalCommand, ["local", "--directory", "/d"]).settings == LocalSettings(Path("/d"))
    assert read(DemoCommand, ["demo"]).settings == DemoSettings()


def test_volume_needs_an_action_a_handle_and_a_server() -> None:
    command = read(VolumeCommand, ["volume", "allow-format", "z:v1", *CONTROLLER[2:]])
    assert (command.action, command.handle, command.timeout_s) == ("allow-format", "z:v1", 60.0)
    assert command.access.management.servers == ("https://m:4000",)
    assert "HANDLE is required for show" in problems(["volume", "show"])
    assert "unexpected argument 'z:v1'" in problems(["volume", "list", "z:v1", *CONTROLLER[2:]])
    assert read(VolumeCommand, ["volume", "list", *CONTROLLER[2:]]).handle == ""
    assert read(VolumeCommand, ["volume", "holders", "z:v1"]).device_directory == Path("/dev/nvmesh")
    assert "allow-format" in problems(["volume", "format", "v1", *CONTROLLER[2:]])


def test_positional_words_are_not_read_from_the_environment() -> None:
    environ = {"NVMESH_CSI_HANDLE": "v1", "NVMESH_CSI_ACTION": "allow-format"}
    assert problems(["volume"], environ) == "the following arguments are required: ACTION"


def test_version_has_no_flags() -> None:
    read(VersionCommand, ["version"])
    assert problems(["version", "--log-level", "info"])


@pytest.mark.parametrize("argv", [CONTROLLER, NODE, STORAGE])
def test_health_pages_need_an_address(argv: list[str]) -> None:
    for flags, expected in (([], None), (["--http-listen", "127.0.0.1:9808"], HttpSettings("127.0.0.1", 9808))):
        command = parse([*argv, *flags], {})
        assert isinstance(command, (ControllerCommand, NodeCommand, StorageCommand))
        assert command.http == expected


def test_a_node_registers_itself_with_a_directory() -> None:
    assert node().registration is None
    registration = node("--kubelet-registration-directory=/r", "--driver-name=d.example.com").registration
    assert registration == RegistrationSettings(Path("/r"), "d.example.com", Path("/n.sock"), Path("/"))
    assert registration.socket == Path("/r/d.example.com-reg.sock")
    registration = node("--kubelet-registration-directory=/r", "--kubelet-endpoint=unix:///k/csi.sock").registration
    assert registration is not None
    assert registration.endpoint == Path("/k/csi.sock")


def test_the_path_of_a_registration_socket_is_bounded() -> None:
    room = 107 - len("/-reg.sock") - len("nvmesh-csi.excelero.com")
    fits, exceeds = (["--kubelet-registration-directory", "/" + "d" * (length - 1)] for length in (room, room + 1))
    assert node(*fits).registration is not None
    assert "expected at most 107 bytes, got 108" in problems([*NODE, *exceeds])


# --- flags and environment --------------------------------------------------------------------------------------


def test_the_environment_sets_flags() -> None:
    command = read(NodeCommand, ["node"], {"CSI_ENDPOINT": "unix:///e.sock", "NVMESH_CSI_MAX_VOLUMES_PER_NODE": "7"})
    assert command.endpoint.socket == Path("/e.sock")
    assert command.node.max_volumes_per_node == 7


def test_a_flag_wins_over_the_environment() -> None:
    assert node("--zone", "flag", environ={"NVMESH_CSI_ZONE": "environment"}).node.zone == "flag"


def test_an_empty_variable_is_ignored() -> None:
    assert node(environ={"NVMESH_CSI_ZONE": ""}).node.zone == "single-zone-cluster"


def test_an_unknown_variable_is_ignored() -> None:
    node(environ={"NVMESH_CSI_CONTROLLER_SERVICE_HOST": "10.0.0.1"})


def test_a_repeatable_flag_keeps_the_order() -> None:
    assert node("--path-root", "/a", "--path-root=/b").paths.path_roots == (Path("/a"), Path("/b"))


def test_a_repeatable_variable_is_separated_by_commas() -> None:
    assert node(environ={"NVMESH_CSI_PATH_ROOT": "/a, /b"}).paths.path_roots == (Path("/a"), Path("/b"))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["node", "--endpont=x"], "unknown flag --endpont for node; did you mean --endpoint?"),
        (["node", "--qqq", "hush"], "unknown flag --qqq for node; see nvmesh-csi --help"),
        (["node", "stray"], "unexpected argument 'stray' for node"),
        (["nod"], "unknown command 'nod'; did you mean node?"),
        (["--log-level=debug"], "no command given; expected one of controller, node, "),
    ],
)
def test_an_unknown_word_gets_a_suggestion(argv: list[str], expected: str) -> None:
    text = problems(argv)
    assert expected in text
    assert "hush" not in text  # it may be a secret


@pytest.mark.parametrize(("given", "expected"), [(["--force-detach"], True), (["--force-detach=false"], False)])
def test_a_switch_needs_no_value(given: list[str], expected: bool) -> None:
    assert controller(*given).controller.force_detach is expected


def test_a_node_that_attaches_has_settings_of_the_controller() -> None:
    management = ["--management-server=https://m:4000", "--management-password-file=/p"]
    flags = ["--fencing=always", "--zone=west", "--max-volumes-per-node=3", "--detach-timeout=7"]
    command = node("--attach-by=node", *management, *flags)
    assert (command.access.management.servers, command.access.zone) == (("https://m:4000",), "west")
    assert command.attach == AttachSettings(3, fencing=Fencing.ALWAYS, detach_wait_s=7)


def test_a_node_that_does_not_attach_takes_no_credentials() -> None:
    text = problems([*NODE, "--management-password-file=/p", "--fencing=never", "--max-volumes-per-node=3"])
    assert "--management-password-file, --fencing requires --attach-by node" in text


@pytest.mark.parametrize(("given", "expected"), [([], AttachBy.CONTROLLER), (["--attach-by=node"], AttachBy.NODE)])
def test_the_controller_attaches_by_default(given: list[str], expected: AttachBy) -> None:
    assert controller(*given).attach_by is expected


def test_a_certificate_needs_no_user() -> None:
    command = read(ControllerCommand, [*CONTROLLER[:3], "--management-client-certificate", "/c.pem"])
    assert command.access.management.username == ""


def test_a_password_file_has_a_default_user() -> None:
    assert controller().access.management.username == "admin@nvidia.com"
    assert controller("--management-user=me").access.management.username == "me"


def test_a_user_file_replaces_the_user() -> None:
    management = controller("--management-user-file", "/run/username", "--management-user", "other").access.management
    assert (management.username, management.username_file) == ("", Path("/run/username"))


@pytest.mark.parametrize(("given", "expected"), [([], False), (["--management-tls-verify"], True)])
def test_a_clusters_file_knows_whether_the_flag_for_tls_is_given(given: list[str], expected: bool) -> None:
    command = controller(*given)
    assert command.access.defaults.tls_is_decided is expected
    assert command.access.management.tls_verify is True


# --- clusters file ----------------------------------------------------------------------------------------------

ZONED = ["controller", "--endpoint=/c.sock", "--management-password-file=/p"]


def with_file(path: Path, text: str, *flags: str) -> ControllerCommand:
    path.write_text(text)
    return read(ControllerCommand, [*ZONED, f"--clusters-file={path}", *flags])


def test_a_clusters_file_sets_topology_key_and_zone_policy(tmp_path: Path) -> None:
    text = "{topologyKey: a.com/z, zoneSelectionPolicy: random, zones: {a: {servers: m}}}"
    settings = with_file(tmp_path / "c", text).controller
    assert (settings.topology_key, settings.zone_policy) == ("a.com/z", ZonePolicy.RANDOM)
    flags = ("--topology-key=b.com/z", "--zone-selection-policy=round-robin")
    settings = with_file(tmp_path / "c", text, *flags).controller
    assert (settings.topology_key, settings.zone_policy) == ("b.com/z", ZonePolicy.ROUND_ROBIN)


def test_an_older_config_map_sets_what_no_flag_sets(tmp_path: Path) -> None:
    values = {
        "management.servers": "m", "tlsVerify": "true", "attachIOEnabledTimeout": "7", "detachTimeout": "8",
        "forceDetach": "true", "usePreempt": "true", "logLevel": "WARNING",
    }  # fmt: skip
    command = with_file(tmp_path / "c", json.dumps(values), "--detach-timeout=9")
    settings = command.controller
    assert (settings.attach_wait_s, settings.detach_wait_s, settings.force_detach) == (7, 9, True)
    assert (settings.fencing, command.log.level) == (Fencing.ALWAYS, "warning")
    assert with_file(tmp_path / "c", json.dumps(values), "--fencing=never").controller.fencing is Fencing.NEVER


def test_an_invalid_value_of_an_older_config_map_is_named_by_its_key(tmp_path: Path) -> None:
    path = tmp_path / "c"
    values = {"forceDetach": "perhaps", "detachTimeout": "soon", "logLevel": "LOUD"}
    path.write_text(json.dumps({"management.servers": "m", "tlsVerify": "true", **values}))
    text = problems([*ZONED, f"--clusters-file={path}"])
    for key in values:
        assert f"{key}: expected" in text


def test_a_node_that_attaches_reads_the_older_config_map(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_text(json.dumps({"management.servers": "m", "tlsVerify": "true", "detachTimeout": "8"}))
    flags = (f"--clusters-file={path}", "--management-password-file=/p")
    assert node("--attach-by=node", *flags).attach.detach_wait_s == 8
    assert node(flags[0]).attach.detach_wait_s == 60


def test_problems_of_a_clusters_file_are_reported_with_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_text("{topologyKey: '-', zoneSelectionPolicy: best, zones: {a: {servers: m}}}")
    text = problems([*ZONED, f"--clusters-file={path}", "--management-server=https://m:1", "--nonsense"])
    for expected in ("topologyKey: expected", "zoneSelectionPolicy: expected", "both given", "--nonsense"):
        assert expected in text
    path.write_text("{zones: {a: {servers: m, colour: red}}, shape: round}")
    for argv in (ZONED, ["volume", "show", "v1", "--management-password-file=/p"]):
        text = problems([*argv, f"--clusters-file={path}"])
        assert "unknown key 'colour'" in text
        assert "unknown key 'shape'" in text


def test_a_node_detects_its_zone_unless_a_flag_sets_it() -> None:
    command = node()
    assert (command.paths.zone, command.paths.topology_key, command.node.zone) == (None, None, "single-zone-cluster")
    assert command.paths.client_configuration == Path("/etc/nvmesh/nvmesh.conf")
    assert command.paths.older_topology_file == Path("/topology/zones")
    command = node("--zone=a", "--topology-key=a.com/b")
    assert (command.paths.zone, command.paths.topology_key) == ("a", "a.com/b")


# --- problems ---------------------------------------------------------------------------------------------------


def test_all_problems_are_reported_together() -> None:
    text = problems(["controller", "--drain-seconds", "soon", "--nonsense", "--zone=-"], {"NVMESH_CSI_LOG_LEVEL": "x"})
    expected = ("--nonsense", "--endpoint", "--drain-seconds: expected", "--zone", "NVMESH_CSI_LOG_LEVEL", "-server")
    assert [word for word in expected if word not in text] == []


def test_no_problem_is_reported_twice() -> None:
    lines = problems(["controller", "--zone=-", "--management-requests=0"]).split("\n")
    assert len(lines) == len(set(lines)) == 4


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["node"],
        ["storage"],
        ["local"],
        [*NODE, "--drain"],
        [*NODE, "--drain-second", "5"],
        [*NODE, "positional"],
        [*NODE, "--kubelet-endpoint=/k.sock"],
        [*STORAGE, "--tls-key", "/k"],
        [*STORAGE, "--client", "a=/x", "--client", "a=/y"],
        [*STORAGE, "--client", "a=/x", "--client", "b=/x"],
        [*STORAGE, "--size", "0"],
        ["demo", "--volume-size", "2GiB", "--expanded-size", "1GiB"],
        ["demo", "--fs-type", "ntfs"],
        ["controller", "--endpoint=/c.sock", "--management-server=m:4000", "--management-password-file=/p"],
    ],
    ids=" ".join,
)
def test_an_invalid_command_line_is_refused(argv: list[str]) -> None:
    assert problems(argv)
