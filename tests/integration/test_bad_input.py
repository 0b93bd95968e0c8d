# SPDX-License-Identifier: Apache-2.0
"""Any request: never INTERNAL, never a crash, never a path outside the one given."""

from __future__ import annotations

import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from csi_driver.model import AccessMode
from csi_driver.rpc.client import CallFailed
from csi_driver.rpc.pb import csi_pb2 as pb
from tests.client import CsiClient
from tests.integration.rig import Rig, Volume, filesystem, in_parallel, running
from tests.reflink_pool import mounted

pytestmark = pytest.mark.root

RANDOM_REQUESTS = int(os.environ.get("NVMESH_CSI_RANDOM_REQUESTS", "2000"))
"""`NVMESH_CSI_RANDOM_REQUESTS=100000` runs the long form."""

CALL_TIMEOUT_S = 2.0
"""A random detach of a device that is in use waits until its time is up."""

WRONG = ("INTERNAL", "UNKNOWN", "UNIMPLEMENTED", "DATA_LOSS")


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A rig that takes only paths below a directory of its own, with snapshots."""
    with mounted(tmp_path_factory.mktemp("bad"), size_mib=40 << 10) as place:
        (place / "d.paths").mkdir()
        with running(place / "d", "--path-root", str(place / "d.paths")) as rig:
            yield rig


@pytest.fixture
def staged(bounded: Rig) -> Iterator[Volume]:
    volume = bounded.volume(filesystem())
    volume.attach()
    volume.stage()
    yield volume
    volume.unstage()
    volume.detach()
    volume.delete()


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except CallFailed as failure:
        return failure.code
    return "OK"


def everything_around(rig: Rig) -> tuple[list[str], list[str]]:
    """Return the files next to the directory for paths, and the machine's mounts but for those of other tests."""
    directory = rig.directory.parent
    paths = rig.directory.with_name(f"{rig.directory.name}.paths")
    beside = sorted(str(each) for each in directory.iterdir())
    targets = [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    others = Path(tempfile.gettempdir())
    return beside, sorted(
        str(each)
        for each in targets
        if not each.is_relative_to(paths) and (each.is_relative_to(directory) or not each.is_relative_to(others))
    )


@pytest.mark.parametrize(
    "spelling",
    [
        "{}/../escaped",
        "{}/a/../../escaped",
        "relative/x",
        "x",
        "{}/..",
        "{}",
        "/",
        "/etc/x",
        "{}/\0x",
    ],
)
def test_a_path_that_leaves_its_root_or_is_not_plain_is_refused(bounded: Rig, staged: Volume, spelling: str) -> None:
    before = everything_around(bounded)
    path = spelling.format(staged.paths)
    codes = {
        "publish": outcome(lambda: staged.publish(Path(path)) if "//" not in path else raw_publish(staged, path)),
        "stage": outcome(lambda: raw_stage(staged, path)),
        "raw publish": outcome(lambda: raw_publish(staged, path)),
    }
    assert codes["raw publish"] in ("INVALID_ARGUMENT", "FAILED_PRECONDITION"), codes
    assert codes["stage"] in ("INVALID_ARGUMENT", "FAILED_PRECONDITION"), codes
    assert everything_around(bounded) == before


def raw_publish(volume: Volume, path: str) -> None:
    """Publish at a path spelt exactly so."""
    request = pb.NodePublishVolumeRequest(
        volume_id=volume.id,
        staging_target_path=str(volume.staging),
        target_path=path,
        publish_context=volume.publish_context,
    )
    request.volume_capability.mount.fs_type = "ext4"
    request.volume_capability.access_mode.mode = pb.VolumeCapability.AccessMode.SINGLE_NODE_WRITER
    volume.rig.node.call(volume.rig.node.node.NodePublishVolume, request)


def raw_stage(volume: Volume, path: str) -> None:
    """Stage at a path spelt exactly so."""
    request = pb.NodeStageVolumeRequest(
        volume_id=volume.id, staging_target_path=path, publish_context=volume.publish_context
    )
    request.volume_capability.mount.fs_type = "ext4"
    request.volume_capability.access_mode.mode = pb.VolumeCapability.AccessMode.SINGLE_NODE_WRITER
    volume.rig.node.call(volume.rig.node.node.NodeStageVolume, request)


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        "with\nnewline",
        "with\ttab",
        "ünïcödé-日本",
        "-flag",
        "back\\slash",
        "o'quote\"",
        "./dot",
        "/slash",
    ],
)
def test_an_odd_but_legal_path_works(staged: Volume, name: str) -> None:
    spelling = f"{staged.paths}/{name}"
    target = Path(spelling)
    raw_publish(staged, spelling)
    assert target.is_mount()
    assert staged.rig.node.stats(staged.id, target)["BYTES"].total > 0
    staged.unpublish(target)
    assert not target.exists()


def test_a_link_on_the_way_to_a_target_is_not_followed(bounded: Rig, staged: Volume) -> None:
    outside = bounded.directory.with_name("outside")
    outside.mkdir(exist_ok=True)
    (staged.paths / "link").symlink_to(outside)
    assert outcome(lambda: staged.publish(staged.paths / "link" / "x")) not in ("OK", *WRONG)
    assert outcome(lambda: staged.publish(staged.paths / "link")) not in ("OK", *WRONG)
    assert list(outside.iterdir()) == []
    (staged.paths / "link").unlink()


@pytest.mark.parametrize(
    "flag",
    [
        "--bind",
        "-o",
        "loop",
        "offset=4096",
        "remount",
        "bind",
        "rbind",
        "move",
        "context=x",
        "journal_path=/etc/passwd",
        "usrquota=../x",
        "ro,remount",
        "=",
        ",",
        " ",
        "uid=0;reboot",
        "$(reboot)",
        "x" * 100,
        "no-such-option",
        "data=none",
        "",
    ],
)
def test_a_mount_option_that_is_none_is_refused_or_harmless(bounded: Rig, flag: str) -> None:
    volume = bounded.volume(filesystem())
    volume.attach()
    volume.capability = filesystem("ext4", AccessMode.SINGLE_NODE_WRITER, flag)
    before = everything_around(bounded)
    code = outcome(volume.stage)
    assert code in ("OK", "INVALID_ARGUMENT"), code
    assert everything_around(bounded) == before
    volume.unstage()
    volume.detach()
    volume.delete()


@pytest.mark.parametrize("fs_type", ["ntfs", "../ext4", "ext4 -F", "EXT4", "ext4\0", "tmpfs", "ü"])
def test_a_filesystem_type_that_is_not_served_is_refused(bounded: Rig, fs_type: str) -> None:
    assert outcome(lambda: bounded.volume(filesystem(fs_type))) == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    "volume_id", ["../../etc", "a/b", "zone:../x:y", "\n", "ü" * 40, "x" * 5000, "a:b:c:d:e:f", ":", "\0"]
)
def test_a_malformed_id_is_a_volume_that_does_not_exist(bounded: Rig, volume_id: str) -> None:
    path = bounded.directory.with_name("d.paths") / "nothing"
    assert outcome(lambda: bounded.controller.delete_volume(volume_id)) == "OK"
    assert outcome(lambda: bounded.controller.get_volume(volume_id)) == "NOT_FOUND"
    assert outcome(lambda: bounded.controller.attach(volume_id, bounded.node_id())) == "NOT_FOUND"
    assert outcome(lambda: bounded.node.stats(volume_id, path)) == "NOT_FOUND"
    assert outcome(lambda: bounded.node.unpublish(volume_id, path)) in ("OK", "NOT_FOUND")
    assert outcome(lambda: bounded.node.unstage(volume_id, path)) in ("OK", "NOT_FOUND")


@pytest.mark.parametrize("name", ["ünïcödé", "日本" * 20, "with space", "a/b", "../x", "x" * 128, "-flag", "it's"])
def test_every_name_that_the_specification_allows_makes_a_volume(bounded: Rig, name: str) -> None:
    volume = bounded.controller.create_volume(name, required_bytes=1 << 30)
    assert bounded.controller.create_volume(name, required_bytes=1 << 30).volume_id == volume.volume_id
    bounded.controller.delete_volume(volume.volume_id)


# --- random requests --------------------------------------------------------------------------------------------

REQUESTS: dict[str, type[Message]] = {
    name: getattr(pb, f"{name}Request")
    for name in (
        "GetPluginInfo", "GetPluginCapabilities", "Probe", "CreateVolume", "DeleteVolume", "ControllerPublishVolume",
        "ControllerUnpublishVolume", "ValidateVolumeCapabilities", "ListVolumes", "GetCapacity", "ControllerGetVolume",
        "ControllerExpandVolume", "ControllerGetCapabilities", "CreateSnapshot", "DeleteSnapshot", "ListSnapshots",
        "GetSnapshot", "CreateVolumeGroupSnapshot", "DeleteVolumeGroupSnapshot", "GetVolumeGroupSnapshot",
        "GroupControllerGetCapabilities", "NodeStageVolume", "NodeUnstageVolume",
        "NodePublishVolume", "NodeUnpublishVolume", "NodeGetVolumeStats", "NodeExpandVolume", "NodeGetCapabilities",
        "NodeGetInfo",
    )
}  # fmt: skip


class Generator:
    """Random requests: of any shape, with values that are often right and often wrong."""

    def __init__(self, seed: int, rig: Rig, volume_ids: list[str]) -> None:
        self.random = random.Random(seed)
        root = rig.directory.with_name("d.paths")
        self.texts = [
            "", "x", "ext4", "xfs", "\n", "\0", "ü", "../..", "a:b", "ro", "-o", "%s", "x" * 129, "x" * 5000,
            "raidLevel", "single-zone-cluster", "csi.storage.k8s.io/pvc/namespace", "vpg", "9" * 40, "-1", "true",
        ]  # fmt: skip
        self.paths = [
            str(root / "random"), str(root / "random2"), str(root / "a b"), f"{root}/../x", "relative", "/", "",
            "/proc/x", f"{root}/{'x' * 300}", f"{root}/" + "d/" * 400, f"{root}/none/none",
        ]  # fmt: skip
        self.ids = [*volume_ids, "fake", "a:b:c", "single-zone-cluster:none", "", "x" * 300, "ü", "\n"]
        self.nodes = [rig.node_id(), "", "none", "x" * 300]
        self.names = ["random-a", "random-b", "", "x" * 200, "ü"]

    def request(self) -> tuple[str, Message]:
        """Make a request of nothing but random fields, or a good one with up to two fields spoilt."""
        name = self.random.choice(list(REQUESTS))
        message = REQUESTS[name]()
        if self.random.random() < 0.3:
            self._fill(message, 0)
        else:
            self._fill_well(message)
            for _ in range(self.random.choice([0, 0, 1, 2])):
                self._spoil(message)
        return name, message

    def _fill_well(self, message: Message) -> None:
        """Set every field that the message has and this test knows a good value for."""
        read_only = self.random.random() < 0.3
        volume_id = self.ids[self.random.randrange(3)]
        good: dict[str, object] = {
            "volume_id": volume_id,
            "source_volume_id": volume_id,
            "node_id": self.nodes[0],
            "name": self.names[self.random.randrange(2)],
            "staging_target_path": self.paths[0],
            "target_path": self.paths[self.random.randrange(1, 3)],
            "volume_path": self.paths[self.random.randrange(3)],
            "readonly": read_only,
        }
        for field in message.DESCRIPTOR.fields:
            if field.name in good:
                setattr(message, field.name, good[field.name])
        held = {field.name for field in message.DESCRIPTOR.fields}
        if "capacity_range" in held:
            getattr(message, "capacity_range").required_bytes = self.random.choice([1, 2]) << 30  # noqa: B009
        if "publish_context" in held:
            _, short, uuid = volume_id.split(":")[:3]
            getattr(message, "publish_context").update(name=short, uuid=uuid)  # noqa: B009
        if "volume_capabilities" in held:
            getattr(message, "volume_capabilities").append(self._capability())  # noqa: B009
        if "volume_capability" in held:
            getattr(message, "volume_capability").CopyFrom(self._capability())  # noqa: B009

    def _capability(self) -> pb.VolumeCapability:
        mode = pb.VolumeCapability.AccessMode(mode=self.random.choice(list(AccessMode)).value)
        capability = pb.VolumeCapability(access_mode=mode)
        if self.random.random() < 0.3:
            capability.block.SetInParent()
        else:
            capability.mount.fs_type = self.random.choice(["", "ext4", "xfs"])
            capability.mount.mount_flags.extend(self.random.choices(["noatime", "ro", "nodev", "bogus"], k=1))
        return capability

    def _spoil(self, message: Message) -> None:
        """Give one field of the message, or of one inside it, a random value."""
        fields = [field for field in message.DESCRIPTOR.fields if not field.is_repeated]
        if not fields:
            return
        field = self.random.choice(fields)
        if field.message_type is not None:
            self._spoil(getattr(message, field.name))
        else:
            setattr(message, field.name, self._value(field.cpp_type, field.name))

    def _fill(self, message: Message, depth: int) -> None:
        for field in message.DESCRIPTOR.fields:
            if self.random.random() < 0.3 or depth > 5:
                continue
            held = getattr(message, field.name)
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                for _ in range(self.random.randrange(3)):
                    held[self._text("key")] = self._text("value")
            elif field.is_repeated and field.message_type is not None:
                for _ in range(self.random.randrange(3)):
                    self._fill(held.add(), depth + 1)
            elif field.is_repeated:
                held.extend(self._text(field.name) for _ in range(self.random.randrange(3)))
            elif field.message_type is not None:
                held.SetInParent()
                self._fill(held, depth + 1)
            else:
                setattr(message, field.name, self._value(field.cpp_type, field.name))

    def _value(self, kind: int, name: str) -> object:
        match kind:
            case FieldDescriptor.CPPTYPE_STRING:
                return self._text(name)
            case FieldDescriptor.CPPTYPE_BOOL:
                return self.random.random() < 0.3
            case FieldDescriptor.CPPTYPE_ENUM:
                return self.random.randrange(9)
            case FieldDescriptor.CPPTYPE_INT32:
                return self.random.choice([0, 1, 2, 100, -1, 2**31 - 1])
            case _:
                return self.random.choice([0, 1, -1, 4096, 1 << 30, 2 << 30, (1 << 30) + 1, 1 << 62, 2**63 - 1])

    def _text(self, name: str) -> str:
        kinds = ("volume_id", "source_volume_id", "source_volume_ids", "snapshot_id")
        pools = dict.fromkeys(kinds, self.ids) | {"node_id": self.nodes, "name": self.names}
        pool = self.paths if name.endswith("path") else pools.get(name, self.texts)
        return self.random.choice(pool if self.random.random() < 0.9 else self.texts)


def send(client: CsiClient, name: str, request: Message) -> str:
    for stub in (client.identity, client.groups, client.node if name.startswith("Node") else client.controller):
        method = getattr(stub, name, None)
        if method is not None:
            return outcome(partial(client.call, method, request, timeout_s=CALL_TIMEOUT_S))
    raise AssertionError(name)


def told_of(rig: Rig, code: str) -> str:
    """Return the lines of the roles' logs about answers with this code."""
    logs = sorted(rig.directory.glob("*.log"))
    return "".join(f"{line}\n" for log in logs for line in log.read_text().splitlines() if f"answers {code}" in line)


def test_random_requests_meet_no_crash_and_no_internal_error(bounded: Rig) -> None:
    ids = [bounded.volume(filesystem(), label=f"random{number}").id for number in range(3)]
    before = everything_around(bounded)
    pids = [bounded.pid(role) for role in ("storage", "controller", "node")]

    def run(seed: int) -> Counter[str]:
        generator, seen = Generator(seed, bounded, ids), Counter[str]()
        for _ in range(RANDOM_REQUESTS // 8):
            name, request = generator.request()
            client = bounded.node if name.startswith("Node") else bounded.controller
            code = send(client, name, request)
            assert code not in WRONG, f"{code}: {name} {request}{told_of(bounded, code)}"
            seen[code] += 1
        return seen

    results = in_parallel([lambda seed=seed: run(seed) for seed in range(8)])
    total = sum((each for each in results if isinstance(each, Counter)), Counter[str]())
    print(dict(total))
    assert total["OK"] > 0
    assert everything_around(bounded) == before
    assert [bounded.pid(role) for role in ("storage", "controller", "node")] == pids
