"""The command line: values, defaults, environment, problems, help."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.config import controller, doctor, node, onebox, prestop, storage, values, volume
from csi_driver.config.commands import parse
from csi_driver.config.flags import Flag, UsageError
from csi_driver.config.made import (
    Command,
    ControllerCommand,
    DemoCommand,
    LocalCommand,
    NodeCommand,
    PreStopCommand,
    StorageCommand,
    VersionCommand,
    VolumeCommand,
)
from csi_driver.controller.ports import ControllerSettings, Fencing, ZonePolicy
from csi_driver.embedded.settings import ClientSettings, StorageSettings
from csi_driver.host_model import RunningRole
from csi_driver.local.settings import DemoSettings, LocalSettings
from csi_driver.node import NodeSettings
from csi_driver.settings import ApiSettings, HttpSettings, RegistrationSettings

TABLES = {
    "controller": controller.CONTROLLER_FLAGS,
    "node": node.NODE_FLAGS,
    "storage": storage.STORAGE_FLAGS,
    "local": onebox.LOCAL_FLAGS,
    "demo": onebox.DEMO_FLAGS,
    "doctor": doctor.DOCTOR_FLAGS,
    "pre-stop": prestop.PRE_STOP_FLAGS,
    "volume": [flag for flag in volume.VOLUME_FLAGS if not flag.is_positional],
}
FLAGS = [pytest.param(role, flag, id=f"{role}{flag.name}") for role, table in TABLES.items() for flag in table]

CONTROLLER = ["controller", "--endpoint=/c.sock", "--management-server=https://m:4000", "--management-password-file=/p"]
NODE = ["node", "--endpoint", "unix:///n.sock"]
STORAGE = ["storage", "--pool", "/pool"]


def command(argv: list[str], environ: Mapping[str, str] | None = None) -> Command:
    return parse(argv, environ or {})


def problems(argv: list[str], environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(UsageError) as refused:
        parse(argv, environ or {})
    return refused.value.problems


# --- roles ------------------------------------------------------------------------------------------------------


def test_the_controller_needs_an_endpoint_and_a_server_and_has_defaults_for_the_rest() -> None:
    made = command(CONTROLLER)
    assert isinstance(made, ControllerCommand)
    assert made.endpoint.socket == Path("/c.sock")
    assert (made.endpoint.default_deadline_s, made.endpoint.drain_s, made.endpoint.pre_shutdown_s) == (60, 30, 0)
    assert made.management.servers == ("https://m:4000",)
    assert made.controller == ControllerSettings()
    assert made.zone == "single-zone-cluster"


def test_a_node_has_the_defaults_of_its_settings() -> None:
    made = command([*NODE, "--node-name", "n"])
    assert isinstance(made, NodeCommand)
    assert made.node == NodeSettings("n", "/var/lib/kubelet/plugins/nvmesh-csi.excelero.com/state")
    assert made.path_roots == (Path("/var/lib/kubelet"),)
    assert made.device_directory == Path("/dev/nvmesh")


def test_a_node_is_called_as_its_host_unless_told_otherwise() -> None:
    made = command(NODE)
    assert isinstance(made, NodeCommand)
    assert made.node.node_name == Path("/proc/sys/kernel/hostname").read_text().strip()


def test_a_node_keeps_no_label_unless_told_to_and_then_needs_to_know_where() -> None:
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "6443"}
    account = Path("/var/run/secrets/kubernetes.io/serviceaccount")
    for argv, environ, expected in (
        (NODE, pod, None),
        ([*NODE, "--node-label"], pod, ApiSettings("10.0.0.1", 6443, account)),
        ([*NODE, "--node-label", "--kubernetes-host", "h"], {}, ApiSettings("h", 443, account)),
    ):
        made = parse(argv, environ)
        assert isinstance(made, NodeCommand)
        assert made.kubernetes == expected
    with pytest.raises(UsageError, match="--kubernetes-host"):
        parse([*NODE, "--node-label"], {})


def test_a_node_takes_off_a_taint_where_it_is_told_its_key() -> None:
    made = command([*NODE, "--startup-taint=a.com/b", "--kubernetes-host=h"])
    assert isinstance(made, NodeCommand)
    assert (made.startup_taint, made.label, made.kubernetes is not None) == ("a.com/b", False, True)
    with pytest.raises(UsageError, match="--startup-taint requires --kubernetes-host"):
        parse([*NODE, "--startup-taint=a.com/b"], {})


def beside(*arguments: str, environ: Mapping[str, str] | None = None) -> Callable[[object], RunningRole]:
    return lambda roles: RunningRole(1, "node", arguments, environ or {})


def test_what_is_run_beside_a_node_works_with_what_the_node_was_told() -> None:
    running = beside(
        "--driver-name", "d.com", "--endpoint=/e", "--node-name=n", environ={"KUBERNETES_SERVICE_HOST": "h"}
    )
    made = parse(["pre-stop", "--node-name", "mine"], {}, running)
    assert isinstance(made, PreStopCommand)
    assert (made.driver_name, made.node_name, made.timeout_s) == ("d.com", "mine", 25)
    assert made.kubernetes is not None
    assert made.kubernetes.host == "h"
    alone = parse(["pre-stop"], {})
    assert isinstance(alone, PreStopCommand)
    assert (alone.driver_name, alone.kubernetes) == ("nvmesh-csi.excelero.com", None)


def test_no_role_takes_what_another_was_told() -> None:
    assert problems(["node"]) != ()
    with pytest.raises(UsageError):
        parse(["node"], {}, beside("--endpoint=/e"))


def test_the_storage_has_the_defaults_of_its_settings() -> None:
    made = command([*STORAGE, "--client", "n=/n"])
    assert isinstance(made, StorageCommand)
    assert made.storage == StorageSettings(Path("/pool"), (ClientSettings.under("n", Path("/n")),))


def test_the_storage_serves_this_machine_where_no_client_is_named() -> None:
    made = command([*STORAGE, "--node-name", "n", "--device-directory", "/d", "--status-directory", "/s"])
    assert isinstance(made, StorageCommand)
    assert made.storage.clients == (ClientSettings("n", Path("/d"), Path("/s")),)


def test_a_local_run_has_the_defaults_of_its_settings() -> None:
    made = command(["local", "--directory", "/d"])
    assert isinstance(made, LocalCommand)
    assert made.settings == LocalSettings(Path("/d"))


def test_the_demo_has_the_defaults_of_its_settings() -> None:
    made = command(["demo"])
    assert isinstance(made, DemoCommand)
    assert made.settings == DemoSettings()


def test_what_is_done_by_hand_needs_an_action_a_handle_and_a_server() -> None:
    made = command(["volume", "allow-format", "z:v1", *CONTROLLER[2:]])
    assert isinstance(made, VolumeCommand)
    assert (made.action, made.handle, made.timeout_s) == ("allow-format", "z:v1", 60.0)
    assert made.management.servers == ("https://m:4000",)
    assert "HANDLE" in problems(["volume", "show"])[0]
    assert any("allow-format" in problem for problem in problems(["volume", "format", "v1", *CONTROLLER[2:]]))


def test_words_by_their_place_are_not_read_from_the_environment() -> None:
    environ = {"NVMESH_CSI_HANDLE": "v1", "NVMESH_CSI_ACTION": "allow-format"}
    assert problems(["volume"], environ) == ("the following arguments are required: ACTION, HANDLE",)


def test_version_takes_nothing() -> None:
    assert isinstance(command(["version"]), VersionCommand)


@pytest.mark.parametrize("argv", [CONTROLLER, NODE, STORAGE])
def test_nothing_is_served_over_http_unless_an_address_is_given(argv: list[str]) -> None:
    made = command(argv)
    assert isinstance(made, (ControllerCommand, NodeCommand, StorageCommand))
    assert made.http is None
    made = command([*argv, "--http-listen", "127.0.0.1:9808"])
    assert isinstance(made, (ControllerCommand, NodeCommand, StorageCommand))
    assert made.http == HttpSettings("127.0.0.1", 9808)


def test_a_node_registers_itself_where_it_is_told_the_directory() -> None:
    made = command(NODE)
    assert isinstance(made, NodeCommand)
    assert made.registration is None
    made = command([*NODE, "--kubelet-registration-directory=/r", "--driver-name=d.example.com"])
    assert isinstance(made, NodeCommand)
    assert made.registration == RegistrationSettings(Path("/r"), "d.example.com", Path("/n.sock"), Path("/"))
    assert made.registration.socket == Path("/r/d.example.com-reg.sock")
    made = command([*NODE, "--kubelet-registration-directory=/r", "--kubelet-endpoint=unix:///k/csi.sock"])
    assert isinstance(made, NodeCommand)
    assert made.registration is not None
    assert made.registration.endpoint == Path("/k/csi.sock")


def test_a_registration_socket_whose_path_is_too_long_is_refused_at_start() -> None:
    room = 107 - len("/-reg.sock") - len("nvmesh-csi.excelero.com")
    fits, exceeds = (["--kubelet-registration-directory", "/" + "d" * (length - 1)] for length in (room, room + 1))
    assert isinstance(command([*NODE, *fits]), NodeCommand)
    with pytest.raises(UsageError, match="expected at most 107 bytes, got 108"):
        command([*NODE, *exceeds])


def test_an_endpoint_for_kubelet_is_refused_where_nothing_is_registered() -> None:
    with pytest.raises(UsageError, match="--kubelet-endpoint requires --kubelet-registration-directory"):
        command([*NODE, "--kubelet-endpoint=/k.sock"])


# --- flags and environment --------------------------------------------------------------------------------------


def test_the_environment_serves_where_no_flag_is_given() -> None:
    made = command(["node"], {"CSI_ENDPOINT": "unix:///e.sock", "NVMESH_CSI_MAX_VOLUMES_PER_NODE": "7"})
    assert isinstance(made, NodeCommand)
    assert made.endpoint.socket == Path("/e.sock")
    assert made.node.max_volumes_per_node == 7


def test_a_flag_beats_the_environment() -> None:
    made = command([*NODE, "--zone", "flag"], {"NVMESH_CSI_ZONE": "environment"})
    assert isinstance(made, NodeCommand)
    assert made.node.zone == "flag"


def test_an_empty_variable_counts_as_unset() -> None:
    made = command(NODE, {"NVMESH_CSI_ZONE": ""})
    assert isinstance(made, NodeCommand)
    assert made.node.zone == "single-zone-cluster"


def test_a_variable_of_something_else_is_ignored() -> None:
    assert isinstance(command(NODE, {"NVMESH_CSI_CONTROLLER_SERVICE_HOST": "10.0.0.1"}), NodeCommand)


def test_a_repeatable_flag_gathers_its_values_in_order() -> None:
    made = command([*NODE, "--path-root", "/a", "--path-root=/b"])
    assert isinstance(made, NodeCommand)
    assert made.path_roots == (Path("/a"), Path("/b"))


def test_a_repeatable_variable_is_separated_by_commas() -> None:
    made = command(NODE, {"NVMESH_CSI_PATH_ROOT": "/a, /b"})
    assert isinstance(made, NodeCommand)
    assert made.path_roots == (Path("/a"), Path("/b"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["node", "--endpont=x"], "unknown flag --endpont for node; did you mean --endpoint?"),
        (["node", "--qqq", "hush"], "unknown flag --qqq for node; see nvmesh-csi --help"),
        (["node", "stray"], "unexpected argument 'stray' for node"),
        (["nod"], "unknown command 'nod'; did you mean node?"),
        (["--log-level=debug"], "no command given; expected one of controller, node, "),
    ],
)
def test_a_mistake_is_told_with_what_was_meant(argv: list[str], said: str) -> None:
    text = "\n".join(problems(argv))
    assert said in text
    assert "hush" not in text  # it may be a secret


@pytest.mark.parametrize(("given", "wanted"), [(["--force-detach"], True), (["--force-detach=false"], False)])
def test_a_switch_may_stand_alone(given: list[str], wanted: bool) -> None:
    made = command([*CONTROLLER, *given])
    assert isinstance(made, ControllerCommand)
    assert made.controller.force_detach is wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], Fencing.RECORDED),
        (["--fencing", "never"], Fencing.NEVER),
        (["--use-preempt"], Fencing.ALWAYS),
        (["--use-preempt=false", "--fencing=always"], Fencing.ALWAYS),
    ],
)
def test_fencing_is_told_by_either_name(given: list[str], wanted: Fencing) -> None:
    made = command([*CONTROLLER, *given])
    assert isinstance(made, ControllerCommand)
    assert made.controller.fencing is wanted


def test_a_node_that_attaches_for_itself_is_told_how() -> None:
    own = ["--attach-by=node", "--management-server=https://m:4000", "--management-password-file=/p", "--use-preempt"]
    made = command([*NODE, *own, "--zone=west", "--max-volumes-per-node=3", "--detach-timeout=7"])
    assert isinstance(made, NodeCommand)
    assert made.attaching is not None
    assert (made.attaching.management.servers, made.attaching.zone) == (("https://m:4000",), "west")
    wanted = ControllerSettings(max_volumes_per_node=3, fencing=Fencing.ALWAYS, detach_wait_s=7)
    assert made.attaching.controller == wanted


def test_a_node_that_attaches_nothing_is_given_no_credentials() -> None:
    with pytest.raises(UsageError, match="--management-password-file requires --attach-by node"):
        command([*NODE, "--management-password-file=/p"])


@pytest.mark.parametrize(("given", "attaches"), [([], True), (["--attach-by=node"], False)])
def test_the_controller_attaches_unless_the_nodes_do(given: list[str], attaches: bool) -> None:
    made = command([*CONTROLLER, *given])
    assert isinstance(made, ControllerCommand)
    assert made.attaches is attaches


def test_fencing_is_not_told_two_ways() -> None:
    with pytest.raises(UsageError, match="--use-preempt and --fencing never are both given"):
        command([*CONTROLLER, "--use-preempt", "--fencing=never"])


def test_without_a_password_file_nobody_logs_in() -> None:
    made = command([*CONTROLLER[:3], "--management-client-certificate", "/c.pem"])
    assert isinstance(made, ControllerCommand)
    assert made.management.username == ""


def test_the_user_may_come_from_a_file() -> None:
    made = command([*CONTROLLER, "--management-user-file", "/run/username", "--management-user", "other"])
    assert isinstance(made, ControllerCommand)
    assert (made.management.username, made.management.username_file) == ("", Path("/run/username"))


@pytest.mark.parametrize(("given", "wanted"), [([], False), (["--allow-incompatible-versions"], True)])
def test_incompatible_managements_are_worked_with_where_that_is_asked_for(given: list[str], wanted: bool) -> None:
    made = command([*CONTROLLER, *given])
    assert isinstance(made, ControllerCommand)
    assert made.management.allow_incompatible_versions is wanted


# --- several clusters -------------------------------------------------------------------------------------------

ZONED = ["controller", "--endpoint=/c.sock", "--management-password-file=/p"]


def described(path: Path, text: str, *flags: str) -> ControllerCommand:
    path.write_text(text)
    made = command([*ZONED, f"--clusters-file={path}", *flags])
    assert isinstance(made, ControllerCommand)
    return made


def test_a_description_of_clusters_brings_its_topology_key_and_policy(tmp_path: Path) -> None:
    text = "{topologyKey: a.com/z, zoneSelectionPolicy: random, zones: {a: {servers: m}}}"
    made = described(tmp_path / "c", text)
    assert (made.controller.topology_key, made.controller.zone_policy) == ("a.com/z", ZonePolicy.RANDOM)
    assert made.clusters is not None
    flags = ("--topology-key=b.com/z", "--zone-selection-policy=round-robin")
    made = described(tmp_path / "c", text, *flags)
    assert (made.controller.topology_key, made.controller.zone_policy) == ("b.com/z", ZonePolicy.ROUND_ROBIN)


def test_an_older_config_map_sets_what_no_flag_sets(tmp_path: Path) -> None:
    values = {
        "management.servers": "m", "tlsVerify": "true", "attachIOEnabledTimeout": "7", "detachTimeout": "8",
        "forceDetach": "true", "usePreempt": "true", "logLevel": "WARNING",
    }  # fmt: skip
    made = described(tmp_path / "c", json.dumps(values), "--detach-timeout=9")
    settings = made.controller
    assert (settings.attach_wait_s, settings.detach_wait_s, settings.force_detach) == (7, 9, True)
    assert (settings.fencing, made.log.level) == (Fencing.ALWAYS, "warning")


def test_what_is_wrong_with_a_description_is_told_with_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_text("{topologyKey: '-', zoneSelectionPolicy: best, zones: {a: {servers: m}}}")
    found = problems([*ZONED, f"--clusters-file={path}", "--management-server=https://m:1", "--nonsense"])
    text = "\n".join(found)
    for wanted in ("topologyKey: expected", "zoneSelectionPolicy: expected", "both given", "--nonsense"):
        assert wanted in text
    path.write_text("{zones: {a: {servers: m, colour: red}}, shape: round}")
    text = "\n".join(problems([*ZONED, f"--clusters-file={path}"]))
    assert "unknown key 'colour'" in text
    assert "unknown key 'shape'" in text


def test_a_node_finds_its_zone_out_unless_it_is_told() -> None:
    made = command(NODE)
    assert isinstance(made, NodeCommand)
    assert (made.evidence.zone, made.evidence.topology_key, made.node.zone) == (None, None, "single-zone-cluster")
    assert (made.evidence.client_config, made.evidence.nodes_file) == (
        Path("/etc/nvmesh/nvmesh.conf"), Path("/topology/zones")
    )  # fmt: skip
    made = command([*NODE, "--zone=a", "--topology-key=a.com/b"])
    assert isinstance(made, NodeCommand)
    assert (made.evidence.zone, made.evidence.topology_key) == ("a", "a.com/b")


# --- problems ---------------------------------------------------------------------------------------------------


def test_all_problems_are_reported_together() -> None:
    found = problems(["controller", "--drain-seconds", "soon", "--nonsense", "--zone=-"], {"NVMESH_CSI_LOG_LEVEL": "x"})
    text = "\n".join(found)
    wanted = ("--nonsense", "--endpoint", "--drain-seconds: expected", "--zone", "NVMESH_CSI_LOG_LEVEL", "-server")
    assert [word for word in wanted if word not in text] == []


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
        [*STORAGE, "--tls-key", "/k"],
        [*STORAGE, "--client", "a=/x", "--client", "a=/y"],
        [*STORAGE, "--client", "a=/x", "--client", "b=/x"],
        [*STORAGE, "--size", "0"],
        ["demo", "--volume-size", "2GiB", "--expanded-size", "1GiB"],
        ["demo", "--fs-type", "ntfs"],
        ["controller", "--endpoint=/c.sock", "--management-server=m:4000", "--management-password-file=/p"],
        ["version", "--log-level", "info"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_used_is_refused(argv: list[str]) -> None:
    assert problems(argv)


# --- help -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "flag"), FLAGS)
def test_the_help_tells_unit_default_and_variable_of_every_flag(
    role: str, flag: Flag[object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse([role, "--help"], {})
    shown = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    assert ended.value.code == 0
    assert " ".join(flag.describe().replace("%%", "%").split()).replace("- ", "-") in shown
    assert f"Environment: {flag.variable}" in shown
    assert ("Unit: " in flag.describe()) == bool(flag.unit)
    assert isinstance(flag.default, (str, bool, Path, tuple, type(None))) or flag.unit, "a number has a unit"


@pytest.mark.parametrize(("role", "flag"), FLAGS)
def test_the_default_that_is_shown_is_the_default_that_is_used(role: str, flag: Flag[object]) -> None:
    word = flag.shown_default.partition(",")[0]
    try:
        read = flag.read(word)
    except ValueError:
        assert flag.default in (None, "", Path(), ("", Path())), f"{word!r} is no value and the default is not empty"
    else:
        assert read == flag.default or flag.default in (None, "", ("", Path())) or not word


# --- values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("1024", 1024), ("10GiB", 10 * 2**30), ("10Gi", 10 * 2**30), ("10 gib", 10 * 2**30),
        ("1.5KiB", 1536), ("10GB", 10**10), ("10G", 10**10), ("7PiB", 7 * 2**50), ("0.1kB", 100),
        ("9007199254740993", 9007199254740993), ("8388607.999TiB", None), ("1B", 1),
        ("", None), ("GiB", None), ("-1", None), ("1.5", None), ("0.3KiB", None), ("1e3", None), ("10GiBs", None),
    ],
)  # fmt: skip
def test_a_size_is_read_exactly_or_not_at_all(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(ValueError, match="a size"):
            values.size(text)
    else:
        assert values.size(text) == size


@given(st.integers(0, 2**63))
def test_every_whole_number_of_bytes_is_itself(number: int) -> None:
    assert values.size(str(number)) == number


@given(st.integers(0, 2**33))
def test_every_whole_number_of_gibibytes_is_exact(number: int) -> None:
    assert values.size(f"{number}GiB") == number << 30


@pytest.mark.parametrize(
    ("text", "seconds"), [("60", 60), ("1.5", 1.5), ("90s", 90), ("2m", 120), ("1h", 3600), ("250ms", 0.25)]
)
def test_a_time_is_read_in_its_unit(text: str, seconds: float) -> None:
    assert values.seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0:9808", ("0.0.0.0", 9808)), ("localhost:0", ("localhost", 0)), (":9808", ("", 9808)),
        ("[::]:9808", ("::", 9808)), ("[fd00::a]:9808", ("fd00::a", 9808)), ("fd00::a:9808", ("fd00::a", 9808)),
        ("9808", None), ("::", None), ("h:65536", None), ("[h]:1", None), ("h", None), ("", None), ("a:b:1", None),
        (":", None), (":x", None), (":65536", None),
    ],
)  # fmt: skip
def test_an_address_to_listen_on_is_read_with_brackets_or_without(text: str, address: tuple[str, int] | None) -> None:
    if address is None:
        with pytest.raises(ValueError, match="HOST:PORT"):
            values.listen_address(text)
    else:
        assert values.listen_address(text) == address


@pytest.mark.parametrize(
    ("text", "path"),
    [("unix:///a/b.sock", "/a/b.sock"), ("unix:/a/b.sock", "/a/b.sock"), ("/a/b.sock", "/a/b.sock")],
)
def test_an_endpoint_is_read_in_each_of_its_forms(text: str, path: str) -> None:
    assert values.endpoint(text) == Path(path)


def test_a_relative_endpoint_starts_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert values.endpoint("unix://csi.sock") == tmp_path / "csi.sock"


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (values.endpoint, "tcp://1.2.3.4:5"), (values.endpoint, ""), (values.endpoint, "unix://"),
        (values.endpoint, "/" + "x" * 107), (values.endpoint, "/a/"), (values.endpoint, "/a\0b"),
        (values.seconds, "0"), (values.seconds, "-1"), (values.seconds, "inf"), (values.seconds, "nan"),
        (values.count, "-1"), (values.count, "1.0"), (values.count, "²"), (values.positive_count, "0"),
        (values.driver_name, "1a"), (values.driver_name, "a" * 64), (values.driver_name, "a/b"),
        (values.zone, ""), (values.zone, "a:b"), (values.zone, "z" * 64), (values.topology_key, "A.com/zone"),
        (values.topology_key, "a/b/c"), (values.topology_key, "/zone"), (values.node_name, "a/b"),
        (values.named_directory, "=/d"), (values.named_directory, "name"), (values.named_directory, "a="),
        (values.host_port, "host"), (values.host_port, "::1:80"), (values.host_port, "h:65536"),
        (values.host_port_or_fd, "fd:2"), (values.host_port_or_fd, "fd:x"), (values.host_port_or_fd, "fd:"),
        (values.boolean, "maybe"), (values.path, ""),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_used_is_refused(read: Callable[[str], object], text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        read(text)


@pytest.mark.parametrize(
    ("text", "read"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:80", ("::1", 80)), ("localhost:4000", ("localhost", 4000))],
)
def test_an_address_is_read(text: str, read: tuple[str, int]) -> None:
    assert values.host_port(text) == read == values.host_port_or_fd(text)


def test_an_inherited_socket_is_named_by_its_descriptor() -> None:
    assert values.host_port_or_fd("fd:17") == 17
