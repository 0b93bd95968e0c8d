# SPDX-License-Identifier: Apache-2.0
"""The doctor on a node that connects volumes over NVMe/TCP: faults of kernels, lost paths and refused volumes."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from csi_driver.config import parse
from csi_driver.config.local_commands import DoctorCommand
from csi_driver.host.connectors.nvme_records import Connection, Records
from csi_driver.host.nvme_host import Fabrics, Sysfs
from csi_driver.host.nvme_target import NvmeTarget
from csi_driver.local import doctor_node, doctor_nvme
from csi_driver.local.doctor import Finding, Severity, Target
from csi_driver.nvme_model import ConnectOptions, NvmeExport, TargetExport, host_nqn, host_uuid, subsystem_nqn
from tests.fakes.nvme_kernel import NvmeKernel

POOL, VOLUME = "01234567-89ab-4567-89ab-0123456789ab", "11234567-89ab-4567-89ab-0123456789ab"


def target(*flags: str) -> Target:
    command = parse(["doctor", "--node-name", "node-1", *flags], {}, lambda _: None)
    assert isinstance(command, DoctorCommand)
    return command.target


def record(directory: Path, *paths: str, name: str = "csi-1", is_refused: bool = False) -> None:
    export = NvmeExport(subsystem_nqn(POOL, VOLUME, "1"), paths)
    made = Connection(name, VOLUME, export, 0, ConnectOptions(), frozenset(("/staging",)), is_refused=is_refused)
    Records(directory).put(made, None)


def problems(found: list[Finding]) -> list[tuple[Severity, str]]:
    return [(each.severity, each.found) for each in found if each.severity is not Severity.OK]


@pytest.mark.parametrize(
    ("release", "known", "number"),
    [
        ("6.12.95+deb12-amd64", doctor_nvme.HOST_FAULTS, 0),
        ("7.3.4-1-default", doctor_nvme.HOST_FAULTS, 0),
        ("6.1.0-56-amd64", doctor_nvme.HOST_FAULTS, 1),
        ("6.7.0", doctor_nvme.HOST_FAULTS, 1),
        ("5.14.0-503.el9.x86_64", doctor_nvme.HOST_FAULTS, 1),
        ("6.12.95", doctor_nvme.TARGET_FAULTS, 0),
        ("6.13-rc1", doctor_nvme.TARGET_FAULTS, 1),
        ("6.13.4-200.fc41.x86_64", doctor_nvme.TARGET_FAULTS, 1),
        ("6.13.5", doctor_nvme.TARGET_FAULTS, 0),
    ],
)
def test_a_kernel_with_a_known_fault_is_found_by_its_version(
    release: str, known: doctor_nvme.Faults, number: int
) -> None:
    assert len(doctor_nvme.faults_of(release, known)) == number


@contextmanager
def answering_target() -> Iterator[str]:
    """Answer the first unit of an NVMe/TCP connection, as a target does; yield the path."""

    def answer(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            with connection:
                connection.recv(128, socket.MSG_WAITALL)
                connection.sendall(struct.pack("<BBBBI", 1, 0, 128, 0, 128).ljust(128, b"\0"))
                connection.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_lost_path_is_named_with_the_answer_of_its_address(tmp_path: Path) -> None:
    with answering_target() as open_path, socket.create_server(("127.0.0.1", 0)) as silent:
        silent_path = f"127.0.0.1:{silent.getsockname()[1]}"
        record(tmp_path, open_path, silent_path)
        found = list(doctor_nvme.paths(target("--nvme-directory", str(tmp_path))))
    assert problems(found) == [
        (Severity.ERROR, f"volume csi-1: path {open_path} is missing; a target answers there"),
        (Severity.ERROR, f"volume csi-1: path {silent_path} is missing; no target answers there"),
    ]
    assert found[-1].found == "volumes connected over NVMe/TCP: 1"


def test_all_lost_paths_are_asked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one that is silent takes the whole time, and on a bad night all of them are."""
    asked: list[Collection[str]] = []

    def probe(_: Fabrics, paths: Collection[str], *__: float) -> frozenset[str]:
        asked.append(paths)
        return frozenset()

    monkeypatch.setattr(Fabrics, "probe", probe)
    for number in (1, 2, 3):
        record(tmp_path, f"10.0.0.1:{number}", name=f"csi-{number}")
    found = list(doctor_nvme.paths(target("--nvme-directory", str(tmp_path))))
    assert (asked, len(problems(found))) == ([["10.0.0.1:1", "10.0.0.1:2", "10.0.0.1:3"]], 3)


def test_a_volume_that_another_node_has_is_a_warning_and_its_addresses_are_not_tried(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        record(tmp_path, f"127.0.0.1:{server.getsockname()[1]}", is_refused=True)
        found = list(doctor_nvme.paths(target("--nvme-directory", str(tmp_path))))
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert problems(found) == [
        (Severity.WARNING, "volume csi-1 was given to another node: the storage refuses its I/O")
    ]


def test_a_node_that_connects_its_volumes_needs_no_client(tmp_path: Path) -> None:
    """What it lacks is said by the check of its kernel alone."""
    flags = "--nvme-directory", str(tmp_path / "nvme"), "--status-directory", str(tmp_path), "--device-directory"
    (found,) = doctor_node.client(target(*flags, str(tmp_path / "dev"), "--kubernetes-host", "10.0.0.1"))
    assert found.severity is Severity.OK
    assert "as node-1" in found.found


def test_the_machine_of_the_embedded_manager_has_no_paths(tmp_path: Path) -> None:
    record(tmp_path, "127.0.0.1:1")
    own = target("--nvme-directory", str(tmp_path), "--storage-node", "node-1")
    assert list(doctor_nvme.paths(own)) == []
    assert next(each.found for each in doctor_nvme.kernel(own)) == "this node connects no volumes over NVMe/TCP"


@pytest.fixture
def kernel() -> NvmeKernel:
    return NvmeKernel()


def exported(kernel: NvmeKernel, directory: Path, port: int = 23001) -> NvmeTarget:
    file = directory / VOLUME
    file.write_bytes(bytes(4096))
    adapter = NvmeTarget(kernel.configfs, kernel.connections)
    nqn, hosts = subsystem_nqn(POOL, VOLUME, "1"), frozenset((host_nqn("node-2"),))
    adapter.apply(TargetExport(nqn, VOLUME, file, port, ("127.0.0.1",), hosts))
    return adapter


def test_exports_are_counted(kernel: NvmeKernel, tmp_path: Path) -> None:
    (found,) = doctor_nvme.exports(target(), exported(kernel, tmp_path))
    assert (found.severity, found.found) == (Severity.OK, "volumes exported over NVMe/TCP here: 1")


def test_exports_of_several_pools_are_named(kernel: NvmeKernel, tmp_path: Path) -> None:
    """A pool that is gone has no manager that would end its exports."""
    adapter, other = exported(kernel, tmp_path), "0" * 8 + POOL[8:]
    (export,) = adapter.exported()
    adapter.apply(replace(export, nqn=subsystem_nqn(other, VOLUME, "1"), port=23002))
    assert [each.found for each in doctor_nvme.exports(target(), adapter)] == [
        "volumes exported over NVMe/TCP here: 2",
        f"their pools: {other} (1), {POOL} (1)",
    ]


def test_a_held_and_an_incomplete_export_are_found(kernel: NvmeKernel, tmp_path: Path) -> None:
    adapter, (nqn,) = exported(kernel, tmp_path), kernel.subsystems
    kernel.configfs.write(f"subsystems/{nqn}/namespaces/1/ana_grpid", "127")
    ((severity, found),) = problems(list(doctor_nvme.exports(target(), adapter)))
    assert (severity, "is held" in found) == (Severity.WARNING, True)
    kernel.configfs.write(f"subsystems/{nqn}/namespaces/1/ana_grpid", "1")
    kernel.configfs.unlink(f"ports/23001/subsystems/{nqn}")
    ((severity, found),) = problems(list(doctor_nvme.exports(target(), adapter)))
    assert (severity, "is not complete" in found) == (Severity.ERROR, True)


@pytest.mark.parametrize(
    ("reserved", "number"), [("", 1), ("20000-23000", 1), ("23001", 1), ("4420,23000-27999", 0), ("23001,23002", 0)]
)
def test_a_port_that_the_kernel_gives_to_others_is_found(
    kernel: NvmeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserved: str, number: int
) -> None:
    settings = tmp_path / "sys/net/ipv4"
    settings.mkdir(parents=True)
    (settings / "ip_local_port_range").write_text("1024\t60999\n")
    (settings / "ip_local_reserved_ports").write_text(f"{reserved}\n")
    monkeypatch.setattr("csi_driver.host.machine_checks._PROC", tmp_path)
    found = problems(list(doctor_nvme.exports(target("--export-ports", "23001-23002"), exported(kernel, tmp_path))))
    assert [severity for severity, _ in found] == [Severity.WARNING] * number


def test_before_the_first_export_the_ports_of_the_storage_machine_are_checked(
    kernel: NvmeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "sys/net/ipv4"
    settings.mkdir(parents=True)
    (settings / "ip_local_port_range").write_text("32768\t60999\n")
    monkeypatch.setattr("csi_driver.host.machine_checks._PROC", tmp_path)
    adapter = NvmeTarget(kernel.configfs, kernel.connections)
    kernel.configfs.prepare()
    storage = target("--role", "storage", "--export-ports", "32766-32771")
    ((severity, found),) = problems(list(doctor_nvme.exports(storage, adapter)))
    assert (severity, found.rpartition(": ")[2]) == (Severity.WARNING, "32768, 32769, 32770 and 1 more")
    assert problems(list(doctor_nvme.exports(target("--role", "storage"), adapter))) == []


def test_a_port_of_the_exports_at_which_another_program_listens_is_found(
    kernel: NvmeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = exported(kernel, tmp_path)
    monkeypatch.setattr(kernel.configfs, "listening", lambda ports: frozenset({23001, 23005}))
    ((severity, found),) = problems(list(doctor_nvme.exports(target(), adapter)))
    assert severity is Severity.WARNING
    assert found == "another program listens at ports of --export-ports: 23005"


@pytest.mark.parametrize(("host_id", "number"), [(host_uuid("node-1"), 0), (str(uuid.UUID(int=7)), 1), ("", 0)])
def test_another_host_id_under_the_host_nqn_of_this_node_is_found(tmp_path: Path, host_id: str, number: int) -> None:
    controller = tmp_path / "class/nvme/nvme3"
    controller.mkdir(parents=True)
    (controller / "hostnqn").write_text(f"{host_nqn('node-1')}\n")
    (controller / "hostid").write_text(f"{host_id}\n")
    found = list(doctor_nvme.foreign_hosts("node-1", Sysfs(tmp_path)))
    assert [severity for severity, _ in problems(found)] == [Severity.ERROR] * number
    assert list(doctor_nvme.foreign_hosts("node-2", Sysfs(tmp_path))) == []
