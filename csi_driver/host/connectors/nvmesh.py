# SPDX-License-Identifier: Apache-2.0
"""The NVMesh client on this machine: its status files, its configuration, and the identity of its devices.

The status files change between client versions and may be read half written: only needed values are parsed, and an
unreadable value is unknown (None). The embedded storage manager writes the same files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from csi_driver.errors import HostFailure
from csi_driver.host import ioctls
from csi_driver.host.syscalls import read_file
from csi_driver.host_model import StorageClient, VolumeStatus
from csi_driver.model import is_uuid, is_volume_name
from csi_driver.storage_model import ReservationMode

_STATUS_LIMIT_BYTES = 4 << 20
"""The client answers EFBIG to a longer status, which a volume of many pieces has."""
_USUAL_STATUS_BYTES = 64 << 10
"""A larger buffer is mapped again for each read, which takes longer than the read."""
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,16}|0|[1-9][0-9]{0,18}")
_OPENER = re.compile(r"^ +[0-9]+\) ([0-9]+) \[(.*)\], mode=", re.MULTILINE)
_OPENS = re.compile(r"^Num Processes=[0-9]{1,10}, opens=([0-9]{1,10})\n", re.MULTILINE)
_SIZE_LIMIT_BYTES = 1 << 63
_REFERENCE_LIMIT = 1 << 16
# NVIDIA/nvmesh-kernel, nvmeibc_topology.c: `dbg` with I/O enabled, in the second state for reads only; a bit of `dbg`.
_LIVE, _DEGRADED_READ_ONLY, _PREEMPTED = 0x200, 0x293, 0x1000
_CLIENT_VOLUME_LIMIT = 1024
"""Attached volumes of one client, hidden ones included (NVMesh User Guide 3.5, limits)."""
_DEBUG_REFUSAL = "its client runs in a debug mode that does not write data (debug_di)"
_MODES = {mode.name: mode for mode in ReservationMode}

UPDATER_MARK = Path("/var/run/nvmesh/nvmeshclient/upgrade")
"""Made by the client's updater; removed when the update succeeds and by a reboot, not when it fails."""
UPGRADE_MARKS = (UPDATER_MARK, Path("/proc/nvmeiba"))
"""Present while the client is upgraded under attached volumes, without status files: the updater's mark, and the
client's lower module, which stays loaded."""
CLIENT_SIGNS = (Path("/etc/nvmesh/nvmesh.conf"),)
"""Present where a client is installed, running or not."""


def parse_volume_status(text: str) -> VolumeStatus | None:
    """Read a volume's `status.json`; None when it is torn or hidden: the client's own, without a device."""
    document = _object(text)
    name, uuid = document.get("name"), document.get("uuid")
    if not isinstance(name, str) or not is_volume_name(name) or not isinstance(uuid, str) or not is_uuid(uuid):
        return None
    if document.get("type") == "hidden":
        return None
    debug_di = document.get("debug_di")
    io_enabled, refuses_writes = _io_enabled(document), _refuses_writes(document)
    is_preempted = document.get("attach_status") == "Preempted" or (_number(document.get("dbg")) or 0) & _PREEMPTED
    return VolumeStatus(
        name=name,
        uuid=uuid.lower(),
        size_bytes=_size_bytes(document),
        # Only a clear "off" counts as off: with debug_di on, writes are acknowledged and lost.
        refusal="" if debug_di is None or _number(debug_di) == 0 else _DEBUG_REFUSAL,
        io_enabled=io_enabled,
        refuses_writes=refuses_writes,
        preempted=io_enabled is False and bool(is_preempted),
        details="" if io_enabled and not refuses_writes else _words(document),
    )


def _size_bytes(document: Mapping[str, object]) -> int | None:
    blocks, block_bytes = document.get("size[blks]"), document.get("block[b]")
    if type(blocks) is not int or type(block_bytes) is not int or blocks < 0 or block_bytes < 0:
        return None
    size = blocks * block_bytes
    return size if size < _SIZE_LIMIT_BYTES else None


def _io_enabled(document: Mapping[str, object]) -> bool | None:
    """Tell if I/O is enabled: True or False when all fields agree, else None.

    `dbg` is exact: the status of the attachment in its second byte, its errors in the first. Newer clients show
    `io_enabled` too, some seconds late. ATTACHED stays set, in `dbg` and `attach_status`, after I/O was lost. A volume
    that is suspended or detaching has no `dbg`. Source: NVIDIA/nvmesh-kernel, nvmeibc_topology.c.
    """
    signs: set[bool | None] = set()
    for key, enabled in (("io_enabled", (1,)), ("dbg", (_LIVE, _DEGRADED_READ_ONLY))):
        if key in document:
            value = _number(document[key])
            signs.add(None if value is None else value in enabled)
    attached = document.get("attach_status")
    if attached is not None and (attached != "Attached" or not signs):
        signs.add(False)
    return signs.pop() if len(signs) == 1 else None


def _refuses_writes(document: Mapping[str, object]) -> bool | None:
    """Tell if writes fail: the attachment is read-only or the volume degraded (`enforce_read_only` is always set)."""
    if _number(document.get("dbg")) == _DEGRADED_READ_ONLY:
        return True
    reservation = document.get("reservation")
    mode = _MODES.get(reservation) if isinstance(reservation, str) else None
    return None if mode is None else mode is ReservationMode.SHARED_READ_ONLY


def _words(document: Mapping[str, object]) -> str:
    keys = ("status", "attach_status", "dbg", "io_enabled", "reservation")
    shown = (f"{key} is {ascii(document.get(key))[:48]}" for key in keys if key in document)
    return ", ".join(shown) or "its status has neither status, attach_status, dbg nor io_enabled"


def _number(value: object) -> int | None:
    if isinstance(value, int):
        return int(value)
    return int(value, 0) if isinstance(value, str) and _NUMBER.fullmatch(value) else None


def parse_reference_ids(text: str) -> tuple[str, ...] | None:
    """Read the reference ids of a volume's `blob.txt`; None when it is torn or of an unknown encoding."""
    lines = text.split("\n")[:-1]  # a line without a newline is torn
    values: dict[str, str] = {}
    while lines and "n_strings" not in values:
        key, _, value = lines.pop(0).partition("=")
        values[key.strip()] = value.strip()
    count = _number(values.get("n_strings"))
    if values.get("encoding_version") != "1" or count is None or count > min(_REFERENCE_LIMIT, len(lines)):
        return None
    ids = tuple(line.strip() for line in lines[:count])
    return ids if all(each and each.isprintable() for each in ids) else None


def parse_opens(text: str) -> int | None:
    """Read the open count of a device from the last line of `client_processes`; None when it is torn."""
    counts = _OPENS.findall(text)
    return int(counts[-1]) if counts else None


def parse_openers(text: str) -> tuple[str, ...]:
    """Read the programs in `client_processes`; one that has closed the device may still be listed."""
    return tuple(f"pid {pid} ({name})" for pid, name in _OPENER.findall(text))


def parse_client_uuid(text: str) -> str | None:
    main = _object(text).get("main")
    uuid = main.get("uuid") if isinstance(main, dict) else None
    return uuid.lower() if isinstance(uuid, str) and is_uuid(uuid) else None


def parse_volume_limit(text: str) -> int:
    """Read from the client's `version` how many volumes can be attached; 0 = no limit (embedded: loop devices)."""
    return 0 if _object(text).get("module") == "embedded" else _CLIENT_VOLUME_LIMIT


def parse_client_problem(text: str) -> str:
    """Return a problem when the client's `version` shows a wrongly built module; else an empty text."""
    version = _object(text).get("version")
    return "its module has an empty version: it was built wrongly and never registers" if version == "" else ""


def _object(text: str) -> Mapping[str, object]:
    try:
        document = json.loads(text, object_pairs_hook=_without_contradictions)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _without_contradictions(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    taken: dict[str, object] = {}
    doubtful = set()
    for key, value in pairs:
        if taken.setdefault(key, value) != value:
            doubtful.add(key)
    return {key: value for key, value in taken.items() if key not in doubtful}


@dataclass(frozen=True, slots=True)
class StatusFiles:
    """The client's status directory, e.g. `/proc/nvmeibc`. Every method reads the files again; None = unknown.

    `is_sign`: the bare directory says that a client is installed.
    """

    root: Path
    upgrade_marks: Sequence[Path] = UPGRADE_MARKS
    client_signs: Sequence[Path] = CLIENT_SIGNS
    is_sign: bool = True

    def volume(self, name: str) -> VolumeStatus | None:
        return parse_volume_status(_read(f"{self.root}/volumes/{name}/status.json"))

    def reference_ids(self, name: str) -> tuple[str, ...] | None:
        return parse_reference_ids(_read(f"{self.root}/volumes/{name}/blob.txt"))

    def opens(self, name: str) -> int | None:
        return parse_opens(_read(f"{self.root}/volumes/{name}/client_processes"))

    def openers(self, name: str) -> tuple[str, ...]:
        return parse_openers(_read(f"{self.root}/volumes/{name}/client_processes"))

    def client(self) -> StorageClient:
        uuid = parse_client_uuid(_read(f"{self.root}/status.json"))
        upgrading = any(mark.exists() for mark in self.upgrade_marks)
        signs = (*self.client_signs, *((self.root,) if self.is_sign else ()), *self.upgrade_marks)
        version = _read(f"{self.root}/version")
        return StorageClient(
            uuid=uuid,
            is_expected=uuid is not None or any(sign.exists() for sign in signs),
            is_upgrading=upgrading and uuid is None,
            problem=parse_client_problem(version),
            volume_limit=parse_volume_limit(version) if uuid is not None else 0,
        )

    def shown(self) -> frozenset[str]:
        """Return the names of all attachments, hidden ones included."""
        try:
            return frozenset(entry.name for entry in (self.root / "volumes").iterdir())
        except OSError:
            return frozenset()


def _read(path: str) -> str:
    """Read a status file in one call: each read at offset 0 makes the client write it again, for all its readers."""
    try:
        read = read_file(path, _USUAL_STATUS_BYTES)
        if len(read) == _USUAL_STATUS_BYTES:
            read = read_file(path, _STATUS_LIMIT_BYTES)
    except OSError:
        return ""
    return read.decode(errors="replace")


def serial_of(uuid: str) -> str:
    """Return the serial number of the volume's device: 20 of the uuid's 32 digits."""
    return uuid[0:8] + uuid[9:13] + uuid[24:28] + uuid[32:36]


def read_serial(fd: int) -> str | None:
    """Return the serial number of an open device; None when it is no NVMesh device or does not answer."""
    standard = ioctls.scsi_inquiry(fd)
    if standard is None or not is_nvmesh(standard):
        return None
    page = ioctls.scsi_inquiry(fd, page=0x80)
    return parse_serial_page(page) if page is not None else None


def is_nvmesh(standard: bytes) -> bool:
    """Tell if the standard INQUIRY data is of an NVMesh device; the vendor differs between versions."""
    return standard[8:16].strip(b" \0") in (b"Excelero", b"NVMesh") and standard[16:32].startswith(b"NVMesh")


def parse_serial_page(page: bytes) -> str | None:
    """Read the vital product data page 0x80, unit serial number (SCSI Primary Commands)."""
    if len(page) < 4 or page[1] != 0x80:
        return None
    length = int.from_bytes(page[2:4], "big")
    serial = page[4 : 4 + length].decode("ascii", errors="replace").strip(" \0")
    return serial.lower() or None


@dataclass(frozen=True, slots=True)
class DeviceEvidence:
    """The evidence of which volume a device is; None = no evidence.

    `label_uuid`: identity of the device itself, if its kind has one (`is_labelled`): the label of a loop device, the
    uuid of an NVMe namespace. `serial`: the SCSI serial number.
    """

    status: VolumeStatus | None
    label_uuid: str | None = None
    serial: str | None = None
    is_labelled: bool = False

    def uuid(self) -> str | None:
        if self.is_labelled:
            return self.label_uuid
        return self.status.uuid if self.status is not None else None

    def uuid_for(self, expected: str | None) -> str | None:
        """Return the proven uuid, or the expected one when only the serial number is known and matches it.

        A serial number is only a part of a uuid: one that does not match is returned as text that equals no uuid.
        """
        claimed = self.uuid()
        if claimed is not None or self.serial is None or expected is None:
            return claimed
        return expected if self.serial == serial_of(expected) else f"serial number {self.serial}"

    def unusable(self, name: str) -> str | None:
        """Return why I/O may hang. A volume that the client does not show is allowed, as during an upgrade."""
        if self.status is None or self.status.io_enabled is True:
            return None
        if self.status.holders is not None:
            return f"the connection of volume {name} carries no I/O: {self.status.details}"
        return f"the client has not enabled I/O for {name}: {self.status.details}"

    def write_refusal(self) -> str:
        """Return the client's status when writes fail, else an empty text."""
        return self.status.details if self.status is not None and self.status.refuses_writes else ""

    def refusal(self, name: str) -> str | None:
        reason = self.status.refusal if self.status is not None else ""
        return f"{name} may not be used: {reason}" if reason else None

    def disagreement(self, name: str) -> str | None:
        """Return how the evidence contradicts itself or the name."""
        if self.status is None:
            return None
        if self.status.name != name:
            return f"the client's status of {name} claims the name {self.status.name}, expected {name}"
        if self.label_uuid is not None and self.label_uuid != self.status.uuid:
            return f"{name}: the device claims {self.label_uuid}, expected {self.status.uuid} as the client says"
        expected = serial_of(self.status.uuid)
        if self.serial is not None and self.serial != expected:
            return f"{name}: the device claims the serial number {self.serial}, expected {expected} as the client says"
        return None

    def mismatch(self, name: str, uuid: str | None) -> str | None:
        """Return how the evidence contradicts that the volume is `uuid`."""
        if uuid is None:
            return None
        claimed = self.uuid()
        if claimed is not None and claimed != uuid:
            return f"{name}: the device claims {claimed}, expected {uuid}"
        if self.serial is not None and self.serial != serial_of(uuid):
            return f"{name}: the device claims the serial number of another volume ({self.serial}), expected {uuid}"
        return None

    def against(self, name: str, uuid: str | None) -> str | None:
        return self.refusal(name) or self.disagreement(name) or self.mismatch(name, uuid)

    def proves(self) -> bool:
        """Tell if the client's status, or the device's own label, proves the identity; a serial number does not."""
        return (self.label_uuid if self.is_labelled else self.status) is not None


_ASSIGNMENT = re.compile(r"\s*(?:export\s+)?MANAGEMENT_SERVERS\s*=\s*(.*?)\s*")
_VALUE = re.compile(r"\"([^\"]*)\"|'([^']*)'|([^\s#]*)")
_ADDRESS = re.compile(r"(?:\[([^\]]+)\]|([^\s:]+)|([^\s]*:[^\s]*:[^\s]*))(?::([0-9]+))?")
_WEBSOCKET_PORT = 4001
"""The management's port where the configuration names none."""


def management_hosts(path: Path) -> Sequence[str]:
    return tuple(host for host, _ in management_servers(path))


def management_servers(path: Path) -> Sequence[tuple[str, int]]:
    """Return host and websocket port of the management servers in the client's configuration file, if there is one."""
    try:
        return parse_management_servers(path.read_text(errors="replace"))
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise HostFailure(f"{path} cannot be read: {error.strerror}") from error


def parse_management_servers(text: str) -> Sequence[tuple[str, int]]:
    """Read MANAGEMENT_SERVERS="host:port,host:port" from a shell file: the last assignment counts."""
    value = ""
    for line in text.splitlines():
        found = _ASSIGNMENT.fullmatch(line)
        quoted = _VALUE.match(found[1]) if found is not None else None
        if quoted is not None:
            value = quoted[1] or quoted[2] or quoted[3] or ""
    return tuple(server for word in re.split(r"[,\s]+", value) if (server := _server(word)) is not None)


def _server(word: str) -> tuple[str, int] | None:
    found = _ADDRESS.fullmatch(word.rpartition("://")[2].rstrip("/"))
    host = found and (found[1] or found[2] or found[3])
    return (host, int(found[4] or _WEBSOCKET_PORT)) if found and host else None
