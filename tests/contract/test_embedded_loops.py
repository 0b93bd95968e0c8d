# SPDX-License-Identifier: Apache-2.0
"""The embedded manager on this machine's loop devices: its answers agree with the kernel."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from csi_driver.deadline import Deadline
from csi_driver.embedded.local_engine import label_of
from csi_driver.embedded.model import FACTS, Fact
from csi_driver.embedded.settings import StorageSettings
from csi_driver.embedded.store import Store
from csi_driver.host.connectors.loop import LoopDevices
from tests.unit.embedded.manager import Json, Manager, running, settings_in

pytestmark = pytest.mark.root


@pytest.fixture
def loops(tmp_path: Path) -> Iterator[LoopDevices]:
    devices = LoopDevices()
    yield devices
    for device in devices.bound_to(tmp_path):
        devices.detach(device)


@pytest.fixture
def manager(tmp_path: Path, loops: LoopDevices) -> Iterator[Manager]:
    with running(settings_in(tmp_path), loops) as running_manager:
        yield running_manager


def node(directory: Path, volume: str, client: str = "node-1") -> Path:
    return directory / client / "dev" / volume


def size_bytes(device: Path) -> int:
    descriptor = os.open(device, os.O_RDONLY)
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def test_the_device_holds_what_is_written(manager: Manager, tmp_path: Path) -> None:
    manager.save("data")
    manager.attach("data")
    with node(tmp_path, "data").open("r+b") as device:
        device.write(b"precious")
        os.fsync(device.fileno())
    manager.detach("data")
    manager.attach("data", "node-2")
    with node(tmp_path, "data", "node-2").open("rb") as device:
        assert device.read(8) == b"precious"


def test_the_kernel_knows_whose_device_it_is(manager: Manager, tmp_path: Path, loops: LoopDevices) -> None:
    manager.save("data")
    manager.attach("data")
    assert [device.label for device in loops.bound_to(tmp_path)] == [label_of(manager.uuid("data"), "node-1")]


def test_an_open_device_grows(manager: Manager, tmp_path: Path) -> None:
    manager.save("data", 1)
    manager.attach("data")
    with node(tmp_path, "data").open("rb"):
        manager.extend("data", 2)
        assert size_bytes(node(tmp_path, "data")) == manager.volume("data")["blocks"] * 4096


def test_a_read_only_device_refuses_what_is_written(manager: Manager, tmp_path: Path) -> None:
    manager.save("data")
    manager.attach("data", mode="SHARED_READ_ONLY")
    with pytest.raises(PermissionError), node(tmp_path, "data").open("r+b", buffering=0) as device:
        device.write(b"x" * 4096)


def test_an_open_device_is_not_taken_away(manager: Manager, tmp_path: Path) -> None:
    manager.save("data")
    manager.attach("data")
    with node(tmp_path, "data").open("r+b") as device:
        manager.detach("data", force=True)
        assert manager.attachment("data")["action"] == "detaching"
        device.write(b"x")
        os.fsync(device.fileno())
    manager.retry("node-1")
    assert manager.attachment("data") is None
    assert not node(tmp_path, "data").exists()


def test_devices_are_found_again_and_their_nodes_made_anew(tmp_path: Path, loops: LoopDevices) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        manager.save("data")
        manager.attach("data")
        before = loops.bound_to(tmp_path)
    node(tmp_path, "data").unlink()
    with running(settings, loops) as manager:
        assert [device.number for device in loops.bound_to(tmp_path)] == [device.number for device in before]
        assert size_bytes(node(tmp_path, "data")) == manager.volume("data")["blocks"] * 4096
        assert manager.detach("data")["success"]
    assert not loops.bound_to(tmp_path)
    assert not node(tmp_path, "data").exists()


def test_nodes_left_over_from_before_a_reboot_are_removed(tmp_path: Path, loops: LoopDevices) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        manager.save("stale")
    stale, others = (
        node(tmp_path, "stale"),
        (node(tmp_path, "README"), node(tmp_path, "loop250"), node(tmp_path, "sda")),
    )
    os.mknod(stale, stat.S_IFBLK | 0o600, os.makedev(7, 250))
    others[0].write_text("not ours")
    os.mknod(others[1], stat.S_IFBLK | 0o600, os.makedev(7, 250))
    os.mknod(others[2], stat.S_IFBLK | 0o600, os.makedev(8, 0))
    with running(settings, loops):
        assert not stale.exists()
        assert all(other.exists() for other in others)


def test_files_that_are_not_ours_below_the_status_directory_stay(tmp_path: Path, loops: LoopDevices) -> None:
    settings = settings_in(tmp_path)
    foreign = settings.clients[0].status_directory / "volumes" / "thesis"
    foreign.mkdir(parents=True)
    for name in ("chapter-1", "status.json"):
        (foreign / name).write_text("years of work")
    with running(settings, loops):
        assert (foreign / "chapter-1").read_text() == "years of work"


def test_a_device_lost_in_a_reboot_is_attached_again(tmp_path: Path, loops: LoopDevices) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        manager.save("data")
        manager.attach("data")
    for device in loops.bound_to(tmp_path):
        assert loops.detach(device)
    with running(settings, loops) as manager:
        assert manager.report("data")["vol_status"] == 4
        assert len(loops.bound_to(tmp_path)) == 1
        manager.detach("data")


def test_a_device_whose_file_was_removed_stays_until_its_data_is_copied_back(
    manager: Manager, tmp_path: Path, loops: LoopDevices
) -> None:
    manager.save("data")
    manager.attach("data")
    file = manager.server.pool.file(manager.uuid("data"))
    with node(tmp_path, "data").open("r+b") as device:
        device.write(b"precious")
        os.fsync(device.fileno())
    file.unlink()
    file.touch()
    manager.detach("data")
    assert len(loops.bound_to(tmp_path)) == 1
    subprocess.run(["cp", "--sparse=always", node(tmp_path, "data"), file], check=True)
    manager.retry("node-1")
    assert not loops.bound_to(tmp_path)
    with file.open("rb") as copy:
        assert copy.read(8) == b"precious"


def test_a_device_whose_file_was_cut_short_is_detached(manager: Manager, tmp_path: Path, loops: LoopDevices) -> None:
    manager.save("data")
    manager.attach("data")
    os.truncate(manager.server.pool.file(manager.uuid("data")), 4096)
    manager.detach("data")
    assert not loops.bound_to(tmp_path)


def test_the_same_directory_by_another_mount_keeps_its_nodes(tmp_path: Path, loops: LoopDevices) -> None:
    """A device node must not be missing even for a moment: another program may open it then."""
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        manager.save("data")
        manager.attach("data")
    before = node(tmp_path, "data").stat().st_ctime_ns
    (tmp_path / "mounted").mkdir()
    subprocess.run(["mount", "--bind", node(tmp_path, "data").parent, tmp_path / "mounted"], check=True)
    try:
        with running(with_devices_in(settings, tmp_path / "mounted"), loops):
            assert (tmp_path / "mounted" / "data").stat().st_ctime_ns == before
    finally:
        subprocess.run(["umount", tmp_path / "mounted"], check=True)


def test_a_node_that_somebody_removed_is_made_again(manager: Manager, tmp_path: Path, loops: LoopDevices) -> None:
    manager.save("data")
    manager.attach("data")
    (device,) = loops.bound_to(tmp_path)
    node(tmp_path, "data").unlink()
    manager.server.attacher.check()
    assert node(tmp_path, "data").stat().st_rdev == os.makedev(*device.device)


def test_a_node_that_stands_for_another_device_is_put_right(
    manager: Manager, tmp_path: Path, loops: LoopDevices
) -> None:
    manager.save("data")
    manager.attach("data")
    (device,) = loops.bound_to(tmp_path)
    node(tmp_path, "data").unlink()
    os.mknod(node(tmp_path, "data"), stat.S_IFBLK | 0o600, os.makedev(7, 250))
    manager.server.attacher.check()
    assert node(tmp_path, "data").stat().st_rdev == os.makedev(*device.device)


def test_what_is_being_detached_gets_no_node_again(manager: Manager, tmp_path: Path) -> None:
    manager.save("data")
    manager.attach("data")
    with node(tmp_path, "data").open("rb"):
        manager.detach("data")
        node(tmp_path, "data").unlink()
        manager.server.attacher.check()
        assert not node(tmp_path, "data").exists()


def with_devices_in(settings: StorageSettings, directory: Path) -> StorageSettings:
    """Return the settings with the devices of node-1 in another directory."""
    first, *others = settings.clients
    return replace(settings, clients=(replace(first, device_directory=directory), *others))


def test_nodes_in_an_earlier_device_directory_are_removed(tmp_path: Path, loops: LoopDevices) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        for name in ("data", "gone"):
            manager.save(name)
            manager.attach(name)
        identity = manager.uuid("gone")
    assert all(loops.detach(device) for device in loops.bound_to(tmp_path) if device.uuid == identity)
    earlier = node(tmp_path, "data").parent
    foreign = [earlier / "loop250", earlier / "notes"]
    os.mknod(foreign[0], stat.S_IFBLK | 0o600, os.makedev(7, 250))
    foreign[1].write_text("not ours")
    with running(with_devices_in(settings, tmp_path / "new"), loops) as manager:
        assert sorted(earlier.iterdir()) == foreign
        numbers = {os.makedev(*device.device) for device in loops.bound_to(tmp_path)}
        assert {(tmp_path / "new" / name).stat().st_rdev for name in ("data", "gone")} == numbers
    # The directory is forgotten: later nodes there are left alone.
    os.mknod(earlier / "data", stat.S_IFBLK | 0o600, os.makedev(7, 250))
    with running(with_devices_in(settings, tmp_path / "new"), loops):
        assert (earlier / "data").exists()


def test_a_node_of_no_loop_device_stays_in_an_earlier_directory(tmp_path: Path, loops: LoopDevices) -> None:
    """The directory may be anybody's, and a volume of another kind may have the name of one of ours."""
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        manager.save("data")
    foreign = node(tmp_path, "data")
    os.mknod(foreign, stat.S_IFBLK | 0o600, os.makedev(250, 1))
    with running(with_devices_in(settings, tmp_path / "new"), loops):
        assert foreign.stat().st_rdev == os.makedev(250, 1)


def test_an_earlier_directory_that_is_away_for_a_start_is_left_at_a_later_one(
    tmp_path: Path, loops: LoopDevices
) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        manager.save("data")
        manager.attach("data")
    earlier = node(tmp_path, "data").parent
    away = earlier.rename(tmp_path / "away")
    with running(with_devices_in(settings, tmp_path / "new"), loops):
        away.rename(earlier)
    with running(with_devices_in(settings, tmp_path / "new"), loops):
        assert not node(tmp_path, "data").exists()
        assert (tmp_path / "new" / "data").is_block_device()


def test_a_device_that_is_mounted_from_an_earlier_directory_goes_on(tmp_path: Path, loops: LoopDevices) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        manager.save("data")
        manager.attach("data")
    device = os.open(node(tmp_path, "data"), os.O_RDWR)
    with running(with_devices_in(settings, tmp_path / "new"), loops):
        assert not node(tmp_path, "data").exists()
        os.write(device, b"precious" * 512)
        os.fsync(device)
        os.close(device)
        with (tmp_path / "new" / "data").open("rb") as same:
            assert same.read(8) == b"precious"


def test_the_same_directory_by_another_name_keeps_its_nodes(tmp_path: Path, loops: LoopDevices) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        manager.save("data")
        manager.attach("data")
    before = node(tmp_path, "data").stat().st_ctime_ns
    (tmp_path / "link").symlink_to(node(tmp_path, "data").parent)
    with running(with_devices_in(settings, tmp_path / "link"), loops):
        assert (tmp_path / "link" / "data").stat().st_ctime_ns == before


def test_a_directory_that_went_to_another_client_keeps_that_clients_nodes(tmp_path: Path, loops: LoopDevices) -> None:
    settings = settings_in(tmp_path)
    with running(settings, loops) as manager:
        manager.save("data")
        manager.attach("data")
        manager.save("shared")
        manager.attach("shared", mode="SHARED_READ_WRITE")
        manager.attach("shared", "node-2", mode="SHARED_READ_WRITE")
    first, second = settings.clients
    swapped = (
        replace(first, device_directory=second.device_directory),
        replace(second, device_directory=first.device_directory),
    )
    with running(replace(settings, clients=swapped), loops) as manager:
        numbers = {(each.label, os.makedev(*each.device)) for each in loops.bound_to(tmp_path)}
        for client, directory in (("node-1", "node-2"), ("node-2", "node-1")):
            label = label_of(manager.uuid("shared"), client)
            assert (label, node(tmp_path, "shared", directory).stat().st_rdev) in numbers
        assert not node(tmp_path, "data").exists()


SERVE = """
import sys
from dataclasses import replace
from pathlib import Path
from csi_driver.embedded.server import serve
from csi_driver.host.connectors.loop import LoopDevices
from tests.unit.embedded.manager import settings_in
sys.exit(serve(settings_in(Path(sys.argv[1])), LoopDevices()))
"""


class Process:
    """The manager as a process of its own."""

    def __init__(self, directory: Path) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(directory)], stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert self._popen.stdout is not None
        self.url = self._popen.stdout.readline().split()[-1]
        self.said = self._popen.stdout.readline()
        self._session = requests.Session()
        self._session.headers["Accept"] = "application/json"
        self.password = Path(self.said.split()[-1]).read_text().strip()
        self.call("/login", {"username": "admin", "password": self.password})

    def call(self, path: str, body: object = None) -> Json:
        method = "GET" if body is None else "POST"
        return self._session.request(method, self.url + path, json=body, timeout=120, allow_redirects=False).json()

    def end(self, number: int) -> int:
        self._popen.send_signal(number)
        status = self._popen.wait(20)
        if self._popen.stdout is not None:
            self._popen.stdout.close()
        return status


@contextmanager
def process(directory: Path) -> Iterator[Process]:
    manager = Process(directory)
    try:
        yield manager
    finally:
        manager.end(signal.SIGKILL)


def test_kill_9_loses_no_volume_and_no_attachment(tmp_path: Path, loops: LoopDevices) -> None:
    with process(tmp_path) as manager:
        item = {"name": "data", "capacity": 1, "RAIDLevel": "Concatenated"}
        identity = manager.call("/volumes/save", [item])[0]["uuid"]
        attachment = {"client": "node-1", "clientUUID": identity, "volumes": [{"name": "data", "uuid": identity}]}
        assert manager.call("/clients/attach", attachment)[0]["success"]
    with process(tmp_path) as manager:
        assert manager.call("/volumes/data")["uuid"] == identity
        assert manager.call("/clients/node-1")["block_devices"][0]["vol_status"] == 4
        assert len(loops.bound_to(tmp_path)) == 1
        assert manager.call("/clients/detach", attachment)[0]["success"]
        assert not loops.bound_to(tmp_path)


ATTACH_IN_A_CONTAINER = """
import sys
from pathlib import Path
from csi_driver.host.connectors.loop import LoopDevices
from tests.unit.embedded.manager import running, settings_in
with running(settings_in(Path(sys.argv[1])), LoopDevices()) as manager:
    manager.save("data")
    manager.attach("data")
"""


def in_a_container(directory: Path, inside: Path, program: str) -> subprocess.Popen[str]:
    """Run a program that sees `directory` as `inside`, in a mount namespace that ends when its input does."""
    script = 'mount --bind "$1" "$2" && "$3" -c "$4" "$2" && echo done && read -r end'
    return subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script, "sh", directory, inside, sys.executable, program],
        cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_what_a_container_attached_is_found_again_by_the_next_one(tmp_path: Path, loops: LoopDevices) -> None:
    pool, inside = tmp_path / "host", tmp_path / "inside"
    pool.mkdir()
    inside.mkdir()
    with in_a_container(pool, inside, ATTACH_IN_A_CONTAINER) as container:
        assert container.communicate(timeout=60)[0] == "done\n"
    (device,) = loops.bound_to(pool)
    assert not device.file.is_relative_to(pool), "the kernel tells the container's path: nothing is shown by this"
    # What uses the device, a mount of a pod, goes on: a second device over the same file would tear the file apart.
    with running(settings_in(pool), loops) as manager:
        assert [found.number for found in loops.bound_to(pool)] == [device.number]
        assert node(pool, "data").stat().st_rdev == os.makedev(*device.device)
        assert manager.detach("data")["success"]
    assert not loops.bound_to(pool)


BIND_IN_A_CONTAINER = """
import sys
from pathlib import Path
from csi_driver.host.connectors.loop import LoopDevices
file = Path(sys.argv[1], "x.img")
file.write_bytes(bytes(4096))
LoopDevices().attach(file, None, label="b3a7e1e2-7a0a-4b4b-9d4d-000000000001", read_only=False)
"""


def test_a_device_of_another_container_is_not_ours_by_its_path(tmp_path: Path, loops: LoopDevices) -> None:
    pool, other = tmp_path / "pool", tmp_path / "other"
    pool.mkdir()
    other.mkdir()
    with in_a_container(other, pool, BIND_IN_A_CONTAINER) as container:
        assert container.stdout is not None
        assert container.stdout.readline() == "done\n"
        (device,) = loops.bound_to(other)
        assert device.file == pool / "x.img", "both have their files in the same place: nothing is shown else"
        (pool / "x.img").write_bytes(bytes(4096))
        assert not loops.bound_to(pool)
        container.communicate(timeout=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_leaves_devices_attached(tmp_path: Path, loops: LoopDevices, number: int) -> None:
    manager = Process(tmp_path)
    item = {"name": "data", "capacity": 1, "RAIDLevel": "Concatenated"}
    identity = manager.call("/volumes/save", [item])[0]["uuid"]
    attachment = {"client": "node-1", "clientUUID": identity, "volumes": [{"name": "data", "uuid": identity}]}
    manager.call("/clients/attach", attachment)
    assert manager.end(number) == 0
    assert len(loops.bound_to(tmp_path)) == 1


def test_the_password_is_never_printed(tmp_path: Path) -> None:
    manager = Process(tmp_path)
    manager.end(signal.SIGTERM)
    assert manager.password not in manager.said
    assert "admin@nvidia.com" in manager.said


def test_a_device_directory_on_a_nodev_mount_is_refused(tmp_path: Path, loops: LoopDevices) -> None:
    directory = tmp_path / "node-1" / "dev"
    directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nodev,size=64k", "tmpfs", str(directory)], check=True)
    try:
        with pytest.raises(Exception, match="nodev"), running(settings_in(tmp_path), loops):
            pass
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_waiting_for_a_busy_device_ends_by_itself(tmp_path: Path, loops: LoopDevices) -> None:
    with process(tmp_path) as manager:
        item = {"name": "data", "capacity": 1, "RAIDLevel": "Concatenated"}
        identity = manager.call("/volumes/save", [item])[0]["uuid"]
        attachment = {"client": "node-1", "clientUUID": identity, "volumes": [{"name": "data", "uuid": identity}]}
        manager.call("/clients/attach", attachment)
        with node(tmp_path, "data").open("rb"):
            manager.call("/clients/detach", attachment)
            assert identity in manager.call("/clients/node-1")["attachments"]
        gone = Deadline.after(120).wait_until(lambda: manager.call("/clients/node-1")["attachments"] == {})
        assert gone


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)  # a test that failed may hold it open


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as filler:
        while True:
            filler.write(b"x" * 4096)


def test_records_can_be_deleted_on_a_full_disk_and_space_is_reserved_again(small_disk: Path) -> None:
    store = Store(small_disk / "s.sqlite")
    for number in range(20):
        store.write(lambda view, number=number: view.put(FACTS, f"{number}", Fact("x" * 4096)))  # type: ignore[misc]
    with pytest.raises(OSError, match="No space"):
        fill(small_disk / "other-program")
    for number in range(20):
        store.write(lambda view, number=number: view.delete(FACTS, f"{number}"))  # type: ignore[misc]
    assert (store.all(FACTS), (small_disk / "s.sqlite.ballast").exists()) == ([], False)
    (small_disk / "other-program").unlink()
    store.write(lambda view: view.put(FACTS, "a", Fact("1")))
    assert (small_disk / "s.sqlite.ballast").stat().st_blocks * 512 == 1 << 20
    store.close()
