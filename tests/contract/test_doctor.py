# SPDX-License-Identifier: Apache-2.0
"""`nvmesh-csi doctor` as a process, with real problems: in mount namespaces, on sockets, in TLS."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from csi_driver.config import parse
from csi_driver.config.local_commands import DoctorCommand
from csi_driver.local.doctor import run_doctor
from csi_driver.local.doctor_checks import checks
from tests.contract.pki import Authority, Pair
from tests.contract.small_api_server import Cluster, served
from tests.contract.test_management_tls import TlsDouble
from tests.unit.management.double import PASSWORD, USER, Hangs, Says, running, serving

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]
DRIVER, UUID = "d.com", "0d1c7c56-6f0e-4d43-9a5f-000000000001"
NODES, CSI_NODES = "/api/v1/nodes", "/apis/storage.k8s.io/v1/csinodes"
_PATIENCE_S = 60


@dataclass
class Findings:
    """The findings of a run; `text` is its whole output."""

    status: int
    text: str
    entries: list[dict[str, str]] = field(default_factory=list)

    def of(self, check: str, severity: str) -> str:
        """Return the findings of a check with a severity as one text."""
        chosen = (entry for entry in self.entries if entry["check"] == check and entry["severity"] == severity)
        return "; ".join(f"{entry['found']} | {entry.get('expected')} | {entry.get('fix')}" for entry in chosen)

    def faults(self) -> set[str]:
        return {entry["check"] for entry in self.entries if entry["severity"] == "error"}


class Machine:
    """The directories of a node, below one of pytest's, checked in a separate mount namespace.

    `prepare`: shell commands that run there first.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kubelet = directory / "kubelet"
        self.status = directory / "proc"
        self.prepare = [f"mount --bind {self.kubelet} {self.kubelet}", f"mount --make-shared {self.kubelet}"]
        self.flags = [
            "--timeout=60", "--role", "node", "--driver-name", DRIVER, "--node-name", "node-1",
            "--path-root", str(self.kubelet),
            "--state-directory", str(self.kubelet / "plugins" / DRIVER / "state"),
            "--device-directory", str(directory / "dev"), "--status-directory", str(self.status),
            "--client-configuration", str(directory / "nvmesh.conf"), "--endpoint", str(directory / "csi.sock"),
        ]  # fmt: skip
        for made in ("pods", "plugins_registry", f"plugins/{DRIVER}"):
            (self.kubelet / made).mkdir(parents=True)
        (directory / "dev").mkdir()
        self.status.mkdir()
        (self.status / "status.json").write_text(json.dumps({"main": {"uuid": UUID}}))
        (self.status / "version").write_text(json.dumps({"module": "embedded"}))

    def run(self, *flags: str, how: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        script = " && ".join([*self.prepare, 'exec "$@"'])
        inside = ["unshare", "--mount", "--propagation", "private", "--", "sh", "-ec", script, "sh", *how]
        argv = [*inside, sys.executable, "-m", "csi_driver", "doctor", *self.flags, *flags]
        environ = {"PATH": os.environ["PATH"], "HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(argv, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=_PATIENCE_S)

    def check_in_namespace(self, *flags: str, how: Sequence[str] = ()) -> Findings:
        """Run the doctor in a separate mount namespace."""
        done = self.run("--json", *flags, how=how)
        assert done.stderr == "", done.stderr
        return Findings(done.returncode, done.stdout, json.loads(done.stdout)["findings"])

    def check(self, *flags: str) -> Findings:
        """Run the doctor in this process, for checks that need no namespace."""
        command = parse(["doctor", *self.flags, "--json", *flags], {})
        assert isinstance(command, DoctorCommand)
        lines: list[str] = []
        status = run_doctor(command.target, checks(command.target.role), lines.append)
        return Findings(status, "\n".join(lines), json.loads("\n".join(lines))["findings"])


@pytest.fixture
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("m"))  # short: the path of a socket has at most 107 bytes


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki") / "one", "one")


# --- the machine ------------------------------------------------------------------------------------------------


def test_a_complete_machine_has_no_error(machine: Machine) -> None:
    machine.flags = machine.flags[:-2]  # no driver runs
    told = machine.run()
    assert told.returncode == 0, told.stdout
    assert told.stdout.startswith(f"driver {DRIVER}, node node-1\n")
    assert "\n0 errors, " in told.stdout
    for check in ("kernel", "tools", "devices", "propagation", "state-directory", "client", "zone"):
        assert re.search(rf"(?m)^OK +{check} ", told.stdout), told.stdout
    assert UUID in told.stdout


def test_a_warning_fails_with_strict(machine: Machine) -> None:
    machine.flags = machine.flags[:-2]
    (machine.kubelet / "pods").rmdir()
    (machine.kubelet / "plugins_registry").rmdir()
    assert machine.check_in_namespace("--strict").status == 1
    found = machine.check_in_namespace()
    assert "no kubelet uses it" in found.of("propagation", "warning")
    assert found.status == 0


def test_a_container_without_tools_devices_and_propagation_gets_an_error_for_each(machine: Machine) -> None:
    tools = ("mkfs.ext4", "blkid", "mkfs.xfs", "cryptsetup")
    places = [f"{place}/{tool}" for tool in tools for place in ("/usr/local/sbin", "/usr/sbin", "/usr/bin", "/sbin")]
    state = machine.kubelet / "plugins" / DRIVER
    machine.prepare += [
        f"mount --make-private {machine.kubelet}",
        f"for t in {' '.join(places)}; do [ ! -e $t ] || [ /dev/null -ef $t ] || mount --bind /dev/null $t; done",
        "mount -t tmpfs none /dev",
        "mknod -m 666 /dev/null c 1 3",
        f"mount -t tmpfs -o size=1M none {state}",
    ]
    found = machine.check_in_namespace("--encrypted-volumes", "--device-directory", "/dev/nvmesh")
    assert found.status == 1
    assert f"mount --make-rshared {machine.kubelet}" in found.of("propagation", "error")
    assert "/dev is tmpfs" in found.of("devices", "error")
    assert "lost at a reboot" in found.of("state-directory", "error")
    assert "has 1 MiB" in found.of("state-directory", "warning")
    missing = found.of("tools", "error")
    for tool, package in (("mkfs.ext4", "e2fsprogs"), ("blkid", "util-linux"), ("cryptsetup", "cryptsetup-bin")):
        assert f"{tool} is not installed" in missing
        assert f"install the package {package}" in missing
    assert "mkfs.xfs is not installed" in found.of("tools", "warning")
    assert "/dev/mapper/control does not exist" in found.of("kernel", "error")
    assert "/dev/loop-control does not exist" in found.of("kernel", "warning")
    found = machine.check_in_namespace(how=("setpriv", "--bounding-set=-sys_admin,-sys_resource", "--inh-caps=-all"))
    assert "/dev is tmpfs" in found.of("devices", "warning")
    assert "cryptsetup is not installed" in found.of("tools", "warning")
    assert "as root" in found.of("privileges", "skipped")


def test_another_user_than_root_gets_the_findings_that_need_no_privilege(machine: Machine) -> None:
    directories = (machine.directory, *machine.directory.parents)
    for directory in directories[: directories.index(Path(tempfile.gettempdir()))]:
        directory.chmod(0o755)
    found = machine.check_in_namespace(how=("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"))
    assert "user 65534" in found.of("state-directory", "error")
    assert found.of("kernel", "ok")


def test_an_absent_or_unusable_client_is_an_error(machine: Machine) -> None:
    (machine.status / "version").write_text(json.dumps({"version": ""}))
    assert "is unusable" in machine.check().of("client", "error")
    (machine.status / "status.json").unlink()
    assert "is not running" in machine.check().of("client", "error")
    (machine.status / "version").unlink()
    machine.status.rmdir()
    assert "has no storage client" in machine.check().of("client", "error")


def test_the_file_of_an_unfinished_client_upgrade_is_a_warning(machine: Machine) -> None:
    """Only success or a reboot removes it."""
    mark = "/var/run/nvmesh/nvmeshclient/upgrade"
    machine.prepare += ["mount -t tmpfs none /run", f"mkdir -p {Path(mark).parent}", f"touch {mark}"]
    assert mark in machine.check_in_namespace().of("client", "warning")
    (machine.status / "status.json").unlink()
    assert mark in machine.check_in_namespace().of("client", "warning")


@pytest.mark.parametrize(
    ("state", "said"), [("preempted", "taken over by another node"), ("io-lost", "carries no I/O")]
)
def test_a_mounted_volume_without_io_is_a_warning(machine: Machine, state: str, said: str) -> None:
    name = "csi-1234567890abcdef12"
    staging = machine.kubelet / "plugins/kubernetes.io/csi" / DRIVER / "0123/globalmount"
    staging.mkdir(parents=True)
    record = {"driverName": DRIVER, "volumeHandle": f"z:{name}:7f0e2a10-5b1c-11f1-8a3e-0123456789ab"}
    (staging.parent / "vol_data.json").write_text(json.dumps(record))
    status = machine.status / "volumes" / name / "status.json"
    status.parent.mkdir(parents=True)
    status.write_bytes((ROOT / f"tests/recordings/nvmesh-client/volumes/B-{state}.json").read_bytes())
    machine.prepare.append(f"mount -t tmpfs {machine.directory}/dev/{name} {staging}")
    assert said in machine.check_in_namespace().of("volumes", "warning")


def test_orphaned_mounts_and_unreadable_usage_records_are_warnings(machine: Machine) -> None:
    staging = machine.kubelet / "plugins/kubernetes.io/csi" / DRIVER / "0123/globalmount"
    staging.mkdir(parents=True)
    marks = machine.kubelet / "plugins" / DRIVER / "state/format-marks"
    marks.mkdir(parents=True)
    (marks / f"{UUID}.mark").write_text("torn")
    other, deleted = UUID.replace("1", "2"), UUID.replace("1", "3")
    for begun in (other, deleted):
        (marks / f"{begun}.mark").write_text(json.dumps({"volume": begun, "attachment": 1, "filesystem": "ext4"}))
    (machine.status / "volumes/csi-other").mkdir(parents=True)
    (machine.status / "volumes/csi-other/status.json").write_text(json.dumps({"name": "csi-other", "uuid": other}))
    machine.prepare.append(f"mount -t tmpfs none {staging}")
    found = machine.check_in_namespace()
    assert "kubelet has no record of it" in found.of("volumes", "warning")
    assert f"{UUID}.mark cannot be read" in found.of("usage-records", "warning")
    counted = found.of("usage-records", "ok")
    assert "1 with an unfinished format" in counted
    assert "1 no longer here" in counted


def test_a_loop_device_without_its_file_is_a_warning(machine: Machine) -> None:
    file = machine.directory / "pool"
    file.write_bytes(bytes(1 << 20))
    device = subprocess.run(
        ["losetup", "--find", "--show", file], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        assert device not in machine.check().of("loop-devices", "warning")
        file.unlink()
        assert f"losetup --detach {device}" in machine.check().of("loop-devices", "warning")
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


# --- other drivers ---------------------------------------------------------------------------------------------


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        yield server


def test_another_driver_of_the_same_name_is_an_error(machine: Machine) -> None:
    registry, plugin = machine.kubelet / "plugins_registry", machine.kubelet / "plugins" / DRIVER
    with listening(registry / f"{DRIVER}-reg.sock"):
        assert "is served" in machine.check().of("sockets", "ok")
        with listening(registry / f"{DRIVER}.sock"), listening(plugin / "csi.sock"):
            said = machine.check().of("sockets", "error")
        assert "registered with kubelet by" in said
        assert f"{plugin}/csi.sock is served by another driver" in said
        assert "no process serves" in machine.check().of("sockets", "warning")
    flag = "--kubelet-registration-directory"
    assert "does not exist" in machine.check(flag, str(machine.directory / "none")).of("sockets", "error")
    (registry / f"{DRIVER}-reg.sock").unlink()
    (registry / f"{DRIVER}.sock").unlink()
    assert f"has no socket of {DRIVER}" in machine.check(flag, str(registry)).of("sockets", "error")


def test_a_driver_that_does_not_respond_does_not_delay_other_checks(machine: Machine) -> None:
    with listening(machine.directory / "csi.sock"):
        found = machine.check("--timeout=4")
    assert found.of("driver", "skipped") or found.of("driver", "error")
    assert found.of("kernel", "ok")


# --- the management ---------------------------------------------------------------------------------------------


def login(machine: Machine, *servers: str, ca: Path | None = None) -> list[str]:
    """Return the flags for a management."""
    password = machine.directory / "password"
    password.write_text(PASSWORD)
    flags = [flag for server in servers for flag in ("--management-server", server)]
    flags += ["--management-user", USER, "--management-password-file", str(password)]
    return [*flags, *(("--management-ca-file", str(ca)) if ca is not None else ())]


def clients(*rows: tuple[str, str]) -> Says:
    return Says([{"_id": name, "uuid": uuid, "client_status": 1} for name, uuid in rows])


def test_the_management_is_checked_for_the_client_of_this_machine(machine: Machine) -> None:
    with running() as double:
        double.on("GET", "/clients/all/0/0", clients(("node-1", UUID), ("node-2", UUID.replace("1", "2"))))
        found = machine.check(*login(machine, double.url))
        assert "accepts the login" in found.of("login", "ok")
        assert "is node-1 there, READY" in found.of("clients", "ok")
        double.on("GET", "/clients/all/0/0", clients(("node-2", UUID.replace("1", "2"))))
        assert "does not know" in machine.check(*login(machine, double.url)).of("clients", "warning")
        double.on("GET", "/clients/all/0/0", clients(("node-1", UUID), ("node-2", UUID)))
        assert "node-1, node-2 have one uuid" in machine.check(*login(machine, double.url)).of("clients", "error")


def test_a_refused_login_is_an_error_without_the_password(machine: Machine) -> None:
    with running() as double:
        double.password = "another one"
        done = machine.run(*login(machine, double.url))
        assert f"does not accept user '{USER}'" in done.stdout
        assert PASSWORD not in done.stdout + done.stderr
        assert done.returncode == 1


def test_an_old_api_version_is_an_error(machine: Machine) -> None:
    with running() as double:
        double.on("GET", "/systemInfo", Says({"APIVersion": "14.1.0", "version": "2.0"}))
        assert "expected API version 15 or newer" in machine.check(*login(machine, double.url)).of("login", "error")


@pytest.mark.parametrize(
    ("first", "last", "gravity", "word"),
    [
        ("20200101000000Z", "20200201000000Z", "error", "expired"),
        ("20200101000000Z", "20991231000000Z", "ok", "ends on 2099-12-31"),
        ("", "", "warning", "ends on"),
    ],
)
def test_a_certificate_is_checked_for_its_end(
    machine: Machine, authority: Authority, first: str, last: str, gravity: str, word: str
) -> None:
    pair = authority.issue_between(f"until-{last}", first, last) if first else authority.issue("two-days")
    with serving(TlsDouble(pair)) as double:
        found = machine.check(*login(machine, double.url, ca=authority.certificate))
        assert word in found.of("certificate", gravity), found.text


def test_a_certificate_that_is_not_verified_is_a_warning(machine: Machine, authority: Authority) -> None:
    with serving(TlsDouble(authority.issue("unverified"))) as double:
        found = machine.check(*login(machine, double.url), "--management-tls-verify=false")
        assert "is not verified" in found.of("certificate", "warning")


def test_a_certificate_of_another_authority_is_an_error(machine: Machine, authority: Authority, tmp_path: Path) -> None:
    pair: Pair = Authority(tmp_path / "other", "other").issue("server")
    with serving(TlsDouble(pair)) as double:
        said = machine.check(*login(machine, double.url, ca=authority.certificate)).of("certificate", "error")
        assert "--management-ca-file" in said


def test_unreachable_and_hanging_servers_do_not_hide_the_others(machine: Machine) -> None:
    with running() as good, running() as hanging, socket.create_server(("127.0.0.1", 0)) as silent:
        good.on("GET", "/clients/all/0/0", clients(("node-1", UUID)))
        hanging.on("GET", "/systemInfo", Hangs())
        mute = f"http://127.0.0.1:{silent.getsockname()[1]}"
        servers = ("http://127.0.0.1:1", "http://no-such-host.invalid:4000", mute, hanging.url, good.url)
        found = machine.check(*login(machine, *servers), "--timeout=4")
    warned = found.of("management", "warning")
    assert "http://127.0.0.1:1: Connection refused" in warned
    assert "no-such-host.invalid:4000: " in warned
    assert f"{mute}: timed out" in warned
    assert f"{good.url} accepts the login" in found.of("login", "ok")
    assert f"{hanging.url}: no result within" in found.of("management", "skipped")
    assert found.of("kernel", "ok")


def test_the_servers_of_the_client_are_connected_to(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (machine.directory / "nvmesh.conf").write_text(f'MANAGEMENT_SERVERS="127.0.0.1:{port},127.0.0.1:1"\n')
        found = machine.check()
        assert f"127.0.0.1:{port} accepts connections" in found.of("client-management", "ok")
        assert "cannot reach 127.0.0.1:1" in found.of("client-management", "warning")
    assert "cannot reach" in machine.check().of("client-management", "error")


def test_an_ambiguous_zone_is_an_error(machine: Machine) -> None:
    description = machine.directory / "clusters"
    description.write_text("{zones: {a: {servers: [m1]}, b: {servers: [m2]}}}")
    found = machine.check("--clusters-file", str(description))
    assert "expected one of a, b" in found.of("zone", "error")
    description.write_text("zones: [")
    assert str(description) in machine.check("--clusters-file", str(description)).of("clusters-file", "error")


# --- Kubernetes -------------------------------------------------------------------------------------------------


def csi_node(name: str, node_id: str) -> dict[str, object]:
    return {"metadata": {"name": name}, "spec": {"drivers": [{"name": DRIVER, "nodeID": node_id}]}}


def test_kubernetes_is_checked_for_node_taint_registration_and_duplicates(
    machine: Machine, authority: Authority, tmp_path: Path
) -> None:
    account = tmp_path / "account"
    account.mkdir()
    cluster = Cluster()
    with served(cluster, authority, authority.issue("api"), account) as api:
        flags = ["--kubernetes-host=127.0.0.1", f"--kubernetes-port={api.port}", f"--kubernetes-account={account}"]
        flags += ["--startup-taint=key.example.com/x"]
        found = machine.check(*flags)
        assert "has no node node-1" in found.of("api-server", "error")
        assert "kubelet has not registered" in found.of("registration", "error")
        taints = [{"key": "key.example.com/x", "effect": "NoSchedule"}]
        cluster.objects[f"{NODES}/node-1"] = {"metadata": {"name": "node-1"}, "spec": {"taints": taints}}
        one, two = csi_node("node-1", UUID), csi_node("node-2", UUID)
        cluster.objects |= {f"{CSI_NODES}/node-1": one, CSI_NODES: {"items": [one, two]}}
        found = machine.check(*flags)
        assert "kubectl taint node node-1 key.example.com/x-" in found.of("api-server", "warning")
        assert "node-1, node-2 are registered with one id" in found.of("registration", "error")
        cluster.objects[f"{CSI_NODES}/node-1"] = csi_node("node-1", "old-id")
        assert f"registered as old-id, its id is {UUID} now" in machine.check(*flags).of("registration", "error")
        (machine.status / "status.json").write_text("{}")
        found = machine.check(*flags)
        assert "shows no id now" in found.of("registration", "skipped")
        assert "its id is" not in found.text
        cluster.forbidden = (f"GET {CSI_NODES}", f"GET {NODES}")
        found = machine.check(*flags)
        assert "may not get nodes" in found.of("api-server", "skipped")
        assert "uniq -d" in found.of("registration", "skipped")
        (account / "token").write_text("top secret")
        assert "top secret" not in machine.run(*flags).stdout
    assert "refused" in machine.check(*flags).of("api-server", "error")


# --- nothing is changed -----------------------------------------------------------------------------------------


def snapshot(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return mode, size and times of every file below, without times of access."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted([directory, *directory.rglob("*")]):
        status = path.lstat()
        changes = 0 if stat.S_ISSOCK(status.st_mode) else status.st_ctime_ns
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, changes)
    return found


def mounts_in(mountinfo: str, directory: Path) -> list[list[str]]:
    """Return the mounts that a test of `directory` has to itself: other tests change those of their directories."""
    lines = [line.split() for line in mountinfo.splitlines()]
    return [line for line in lines if is_its_own(Path(line[4]), directory)]


def is_its_own(path: Path, directory: Path) -> bool:
    return path.is_relative_to(directory) or not path.is_relative_to(tempfile.gettempdir())


def test_the_doctor_changes_nothing_and_needs_no_writable_directory(machine: Machine) -> None:
    (machine.directory / "nvmesh.conf").write_text('MANAGEMENT_SERVERS="127.0.0.1:1"\n')
    (machine.kubelet / "plugins" / DRIVER / "state/format-marks").mkdir(parents=True)
    place = f"/run/{machine.directory.name}-{os.getpid()}"  # other runs have directories of this name
    files = [Path(f"{place}-{name}") for name in ("before", "after")]
    compare = 'cat /proc/self/mountinfo > $0-before; "$@"; s=$?; cat /proc/self/mountinfo > $0-after; exit $s'
    with listening(machine.directory / "csi.sock"):
        before = snapshot(machine.directory)
        machine.check_in_namespace("--timeout=1", how=("sh", "-c", compare, place))
        assert snapshot(machine.directory) == before
    mounts_before, mounts_after = (mounts_in(file.read_text(), machine.directory) for file in files)
    assert mounts_before == mounts_after
    for file in files:
        file.unlink()
    # On a read-only filesystem the findings are the same, except for the state directory.
    machine.prepare.append(f"mount -o remount,bind,ro / && mount -o remount,bind,ro {machine.kubelet}")
    found = machine.check_in_namespace()
    assert found.of("kernel", "ok")
    assert "cannot be written" in found.of("state-directory", "error")
