# SPDX-License-Identifier: Apache-2.0
"""`kubectl nvmesh` with a kubectl that answers from files: what it asks for, prints, changes, and how often it asks."""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from csi_driver.plugin import main as plugin
from csi_driver.plugin.kubectl import Kubectl
from tests.unit.plugin import objects as made

KUBECTL = """
import json, sys
from pathlib import Path
here, words = Path(sys.argv[1]), sys.argv[2:]
content = sys.stdin.buffer.read()
with (here / "calls").open("a") as calls:
    calls.write(json.dumps(words) + "\\n")
world = json.loads((here / "world.json").read_text())
if words[0] == "get" and words[1] == "--raw":
    print("ok")
elif words[0] == "get":
    kinds = words[1].split(",")
    known = [kind for kind in kinds if kind in world["kinds"]]
    items = [item for kind in known for item in world["kinds"][kind]]
    if "-n" in words:
        items = [each for each in items if each["metadata"].get("namespace") in (None, words[words.index("-n") + 1])]
    if "--selector" in words:
        items = [each for each in items if "app.kubernetes.io/part-of" in each["metadata"].get("labels", {})]
    print(json.dumps({"kind": "List", "items": items}))
    if len(known) < len(kinds):
        missing = [kind for kind in kinds if kind not in known]
        print(f"Error from server (Forbidden): {missing[0]} is forbidden", file=sys.stderr)
        sys.exit(1)
elif words[0] == "exec":
    pod, command = words[1], words[words.index("--") + 1 :]
    if "--scan" in command:
        secret = world["secrets"].get(pod, "").encode()
        print(json.dumps({"found": ["/etc/password (plain)"] if secret and secret in content else []}))
    else:
        answer = world["answers"].get(" ".join(command[1:3]))
        print(json.dumps(answer) if answer is not None else "", end="")
        sys.exit(0 if answer is not None else 1)
elif words[0] == "logs":
    print(world["logs"])
"""
HELD = made.stored(holders=[made.holder()])
LISTING = {"zones": [{"zone": "zone-a", "error": ""}], "volumes": [HELD], "snapshots": []}
SHOWN = {
    **HELD, "reservation": {"mode": "exclusive_read_write", "version": 3, "reservedBy": "node-1", "attached": []},
    "madeFor": "ext4", "attachments": "the latest has number 2", "formatting": "only if every block is zero",
}  # fmt: skip
NONE = (
    "volumesnapshots", "volumesnapshotclasses", "volumesnapshotcontents", "csistoragecapacities", "deployments",
    "daemonsets", "statefulsets", "replicasets", "leases", "networkpolicies",
)  # fmt: skip
USERS = {
    "name": "csi-1", "device": "/dev/nvmesh/csi-1", "opens": 1, "clientProcesses": [], "devices": ["259:1"],
    "mounts": ["/var/lib/kubelet/pods/12345678-1234-1234-1234-123456789012/volumes/x/mount"],
    "processes": [{"pid": 7, "command": "cat", "file": "/dev/nvmesh/csi-1"}],
}  # fmt: skip


@dataclass
class World:
    """The cluster that the kubectl of a test shows."""

    directory: Path
    document: dict[str, Any]

    def write(self) -> None:
        (self.directory / "world.json").write_text(json.dumps(self.document))

    def run(self, *words: str) -> int:
        self.write()
        return plugin.main(words, version="1.2.3")

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.directory / "calls").read_text().splitlines()]

    def changes(self) -> list[list[str]]:
        return [call for call in self.calls() if call[0] in ("taint", "delete", "patch") or "allow-format" in call]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    (tmp_path / "kubectl.py").write_text(KUBECTL)
    program = (sys.executable, "-I", "-S", str(tmp_path / "kubectl.py"), str(tmp_path))
    monkeypatch.setattr(plugin, "Kubectl", lambda options: Kubectl(options, program))
    user = made.pod()
    user["metadata"]["uid"] = "12345678-1234-1234-1234-123456789012"
    storage = made.driver_pod("storage")
    storage["spec"]["containers"] = [{"name": "storage", "args": ["storage"]}]
    kinds = {
        "pods": [user, made.driver_pod("controller"), made.driver_pod("node"), storage],
        "persistentvolumeclaims": [made.claim()],
        "persistentvolumes": [made.volume_of_claim()],
        "volumeattachments": [made.attachment()],
        "storageclasses": [made.storage_class()],
        "csidrivers": [made.made("CSIDriver", made.DRIVER)],
        "csinodes": [made.csi_node()],
        "nodes": [made.node()],
        "events": [],
        "resourcequotas": [],
        **{kind: [] for kind in NONE},
    }  # fmt: skip
    answers = {
        "volume list": LISTING, "volume show": SHOWN, "volume holders": USERS,
        "volume allow-format": {"done": "allowed"},
        "doctor --json": {"findings": [{"check": "clock", "severity": "ok", "found": "equal"}]},
    }  # fmt: skip
    return World(tmp_path, {"kinds": kinds, "answers": answers, "secrets": {}, "logs": "a line"})


def test_volumes_are_listed_with_the_same_calls_for_any_number(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.run("volumes") == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "default", "data", "web", "node-1", "10Gi", "node-1", "healthy"
    ]  # fmt: skip
    few = len(world.calls())
    (world.directory / "calls").unlink()
    world.document["kinds"]["pods"] += [made.pod(f"web-{number}") for number in range(500)]
    world.document["kinds"]["persistentvolumes"] += [made.volume_of_claim(f"pv-{number}") for number in range(500)]
    assert world.run("volumes", "-o", "json") == 0
    assert len(world.calls()) == few == 4
    assert len(json.loads(capsys.readouterr().out)["volumes"]) == 501


def test_every_request_has_a_time_limit(world: World) -> None:
    world.run("why", "data", "-n", "default")
    assert all("--request-timeout=50s" in call for call in world.calls() if call[0] == "get")


def test_a_silent_zone_is_named(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.document["answers"]["volume list"] = {**LISTING, "zones": [{"zone": "zone-b", "error": "no response"}]}
    assert world.run("volumes") == 2
    assert "zone zone-b: no response" in capsys.readouterr().err


def test_why_ends_with_0_for_a_healthy_claim_and_pod(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("data", "pvc/data", "pod/web", "web"):
        assert world.run("why", name, "-n", "default") == 0
        assert "OK       nothing is wrong" in capsys.readouterr().out


def test_why_ends_with_1_for_what_is_wrong(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.document["kinds"]["nodes"] = [made.node(ready="Unknown")]
    assert world.run("why", "data", "-n", "default") == 1
    assert "PROBLEM  node node-1: is not Ready" in capsys.readouterr().out


def test_why_ends_with_2_for_what_cannot_be_told(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    del world.document["kinds"]["nodes"]
    assert world.run("why", "data", "-n", "default") == 2
    assert "nodes is forbidden" in capsys.readouterr().out


def test_why_goes_on_without_the_storage(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    del world.document["answers"]["volume show"]
    assert world.run("why", "data", "-n", "default", "-o", "json") == 2
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert "exit status 1" in finding["problem"]


def test_holders_name_the_pods_behind_the_mounts(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.run("holders", "data", "-n", "default") == 0
    shown = capsys.readouterr().out
    assert "reservation: exclusive_read_write by node-1, version 3" in shown
    assert "node node-1: device /dev/nvmesh/csi-1, opened 1 times\n  pod default/web\n" in shown
    assert "process 7 (cat)" in shown


@pytest.mark.parametrize("name", ["pvc-1", made.HANDLE])
def test_a_volume_is_found_by_its_persistent_volume_and_handle(world: World, name: str) -> None:
    assert world.run("holders", name, "-n", "default", "-o", "json") == 0


def test_an_unknown_volume_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.run("holders", "nothing", "-n", "default") == 2
    assert "neither a claim" in capsys.readouterr().err


def test_a_format_is_not_allowed_while_pods_use_the_volume(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.run("allow-format", "data", "-n", "default", "--yes") == 2
    assert "pods use the volume: web" in capsys.readouterr().err
    assert world.changes() == []


@pytest.mark.parametrize(("typed", "status", "changes"), [("data", 0, 1), ("dat", 1, 0)])
def test_a_format_is_allowed_for_the_name_that_is_typed(
    world: World,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    typed: str,
    status: int,
    changes: int,
) -> None:
    world.document["kinds"]["pods"] = world.document["kinds"]["pods"][1:]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{typed}\n"))
    assert world.run("allow-format", "data", "-n", "default") == status
    assert "ALL data" in capsys.readouterr().out
    assert len(world.changes()) == changes


def lose_the_node(world: World) -> None:
    world.document["kinds"]["nodes"] = [made.node(ready="Unknown")]
    world.document["answers"]["volume show"] = {**SHOWN, "holders": [made.holder(status="down")]}


def test_a_release_is_a_dry_run_until_it_is_wanted(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    lose_the_node(world)
    assert world.run("release", "data", "-n", "default", "--node", "node-1") == 0
    assert "kubectl taint nodes node-1" in capsys.readouterr().out
    assert world.changes() == []
    assert world.run("release", "data", "-n", "default", "--node", "node-1", "--yes") == 0
    assert [call[:3] for call in world.changes()] == [["taint", "nodes", "node-1"]]


def test_a_volume_that_many_nodes_write_to_is_not_released(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    lose_the_node(world)
    world.document["kinds"]["persistentvolumes"][0]["spec"]["accessModes"] = ["ReadWriteMany"]
    assert world.run("release", "data", "-n", "default", "--node", "node-1", "--yes") == 1
    assert "does not cut the lost one off" in capsys.readouterr().out
    assert world.changes() == []


def test_a_living_node_is_never_released(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.run("release", "data", "-n", "default", "--node", "node-1", "--yes") == 1
    assert "is Ready" in capsys.readouterr().out
    assert world.changes() == []


def test_a_storage_that_does_not_answer_releases_nothing(world: World) -> None:
    lose_the_node(world)
    del world.document["answers"]["volume show"]
    assert world.run("release", "data", "-n", "default", "--node", "node-1", "--yes") == 2
    assert world.changes() == []


def test_a_bundle_has_logs_pages_objects_and_findings(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    target = world.directory / "bundle.tar.gz"
    assert world.run("doctor", "--bundle", str(target)) == 0
    assert "no secret of controller, storage, node is in it" in capsys.readouterr().out
    with tarfile.open(target) as archive:
        names = {name.removeprefix("nvmesh-csi-bundle/") for name in archive.getnames()}
    assert {"logs.txt", "volumes.json", "findings.txt", "versions.json", "objects/PersistentVolume.json"} <= names
    assert "pods/nvmesh-csi-controller-node-1/doctor.json" in names


def test_no_bundle_reads_a_secret(world: World) -> None:
    world.run("doctor", "--bundle", str(world.directory / "b"))
    asked = {kind for call in world.calls() if call[0] == "get" for kind in call[1].split(",")}
    assert not {kind for kind in asked if "secret" in kind or "configmap" in kind}


def test_a_bundle_has_nothing_of_the_programs_in_users_pods(world: World) -> None:
    user = world.document["kinds"]["pods"][0]
    user["spec"]["containers"][0] |= {
        "args": ["-u", "canary-1"],
        "command": ["sh", "-c", "curl -u me:canary-2"],
        "livenessProbe": {"exec": {"command": ["redis-cli", "-a", "canary-3"]}},
        "lifecycle": {"postStart": {"httpGet": {"httpHeaders": [{"name": "X-Key", "value": "canary-4"}]}}},
    }
    user["spec"]["volumes"].append({"name": "x", "csi": {"driver": "other", "volumeAttributes": {"k": "canary-5"}}})
    ended = {"terminated": {"reason": "Error", "exitCode": 1, "message": "bad login canary-6"}}
    user["status"]["containerStatuses"] = [{"name": "main", "lastState": ended}]
    of_pod = made.event("Pod", "web", "Unhealthy", "Liveness probe failed: canary-7")
    of_pod["involvedObject"]["uid"] = user["metadata"]["uid"]
    mount = made.event("Pod", "web", "FailedMount", "a message about the mount")
    mount["involvedObject"]["uid"] = user["metadata"]["uid"]
    world.document["kinds"]["events"] = [of_pod, mount]
    world.document["kinds"]["pods"].append(made.made("Pod", "n", "nvmesh-csi", spec={"args": ["canary-8"]}))
    target = world.directory / "b"
    world.run("doctor", "--bundle", str(target))
    content = gzip.decompress(target.read_bytes())
    assert re.findall(rb"canary-\d", content) == []
    assert all(part in content for part in (b'"claimName": "data"', b'"exitCode": 1', b"a message about the mount"))


def test_a_bundle_with_the_secret_of_a_pod_is_not_written(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.document["secrets"] = {"nvmesh-csi-storage-node-1": "hunter-2000"}
    world.document["logs"] = "the password is of course hunter-2000"
    assert world.run("doctor", "--bundle", str(world.directory / "b")) == 2
    assert "nvmesh-csi-storage-node-1: /etc/password (plain)" in capsys.readouterr().err
    assert not (world.directory / "b").exists()


def test_a_bundle_of_a_large_cluster_asks_few_nodes(world: World) -> None:
    nodes = [made.driver_pod("node", node_name=f"node-{number}", ready=number != 77) for number in range(100)]
    world.document["kinds"]["pods"] += nodes
    world.run("doctor", "--nodes", "3")
    asked = [call[1] for call in world.calls() if call[0] == "exec"]
    assert len(asked) == 5
    assert "nvmesh-csi-node-node-77" in asked


COMMANDS = ("why data", "why pod/web", "volumes", "holders data", "release data --node node-1 --yes",
            "allow-format data --yes")  # fmt: skip


@pytest.mark.parametrize("command", [*(f"{each} -n default" for each in COMMANDS), "doctor"])
@pytest.mark.parametrize("reason", ["Unable to connect to the server: dial tcp: i/o timeout", ""])
def test_a_cluster_that_does_not_answer_is_said_and_nothing_else(
    world: World, capsys: pytest.CaptureFixture[str], command: str, reason: str
) -> None:
    (world.directory / "kubectl.py").write_text(f"import sys\nprint({reason!r}, file=sys.stderr)\nsys.exit(1)\n")
    assert world.run(*command.split()) == 2
    told = capsys.readouterr()
    assert (reason or "kubectl ended with 1") in told.out + told.err
    assert "PROBLEM" not in told.out


def test_a_user_of_one_namespace_hears_what_may_not_be_read(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    here = world.directory / "kubectl.py"
    denied = """
if "-n" not in words and words[0] == "get":
    print(f'Error from server (Forbidden): {words[1].split(",")[0]} is forbidden at the cluster scope', file=sys.stderr)
    sys.exit(1)
"""
    here.write_text(KUBECTL.replace("world = json", f"{denied}world = json", 1))
    assert world.run("why", "data", "-n", "default") == 2
    told = capsys.readouterr().out
    assert "PROBLEM" not in told
    assert "pods is forbidden" in told
    assert world.run("volumes", "-n", "default") == 2
    assert "pods is forbidden" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["why data -n default", "volumes -o wide", "snapshots", "holders data -n default"])
def test_names_of_others_do_not_control_the_terminal(
    world: World, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    evil = "\x1b]0;evil\x07\r\u202e"
    world.document["kinds"]["persistentvolumes"][0]["spec"]["csi"]["volumeHandle"] += evil
    held = {**SHOWN, "name": evil, "csiName": evil, "faults": [{"fault": "x", "reason": evil, "message": evil}]}
    users = {**USERS, "processes": [{"pid": 7, "command": evil, "file": evil}], "mounts": [evil]}
    world.document["answers"] |= {
        "volume show": held, "volume holders": users, "volume list": {**LISTING, "volumes": [held]},
    }  # fmt: skip
    world.run(*command.split())
    told = capsys.readouterr()
    assert all(line.isprintable() for line in (told.out + told.err).split("\n"))
    assert "evil" in told.out


def test_a_format_of_a_volume_of_another_namespace_is_not_allowed_while_pods_use_it(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.run("allow-format", "pvc-1", "-n", "elsewhere", "--yes") == 2
    assert "pods use the volume: web" in capsys.readouterr().err
    assert world.changes() == []


def test_no_format_is_allowed_if_the_pods_cannot_be_read(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    here = world.directory / "kubectl.py"
    denied = """
    if "pods" in kinds and "-n" in words:
        kinds.remove("pods"), kinds.append("no-pods")
"""
    here.write_text(KUBECTL.replace("    known = [", f"{denied}    known = [", 1))
    assert world.run("allow-format", "data", "-n", "default", "--yes") == 2
    assert "it is unknown whether pods use" in capsys.readouterr().err
    assert world.changes() == []


def test_no_format_is_allowed_without_an_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.document["kinds"]["pods"] = world.document["kinds"]["pods"][1:]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert world.run("allow-format", "data", "-n", "default") == 1
    assert world.changes() == []


def test_a_bundle_of_a_large_cluster_has_some_lines_of_each_log(world: World) -> None:
    def tail() -> int:
        world.run("doctor", "--nodes", "1", "--bundle", str(world.directory / f"b{len(world.calls())}"))
        options = next(call for call in reversed(world.calls()) if call[0] == "logs")
        return next(int(word.removeprefix("--tail=")) for word in options if word.startswith("--tail="))

    world.run("version")
    (world.directory / "calls").touch()
    assert tail() == 2000
    world.document["kinds"]["pods"] += [made.driver_pod("node", node_name=f"node-{n}") for n in range(100)]
    assert tail() == 60_000 // 103
