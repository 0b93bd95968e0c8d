"""What an NVMesh client shows of itself and of each attached volume: files under its status directory, and the SCSI
serial number of the device.

The files change between versions of the client and may be read half written: only what is needed is taken, and what
cannot be read is "not known", never a guess. The embedded manager writes the same files.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from csi_driver.host_model import StorageClient, VolumeStatus
from csi_driver.model import is_uuid, is_volume_name
from csi_driver.storage_model import ReservationMode

_STATUS_LIMIT_BYTES = 4 << 20
"""The client answers EFBIG to a status that is longer. A volume of many pieces lists each of them."""
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,19}")
_OPENS = re.compile(r"^Num Processes=[0-9]{1,10}, opens=([0-9]{1,10})\n", re.MULTILINE)
_SIZE_LIMIT_BYTES = 1 << 63
_REFERENCE_LIMIT = 1 << 16
_LIVE, _DEGRADED_READ_ONLY = 0x200, 0x293
"""Values of `dbg` while the client carries I/O, in the second state reads alone."""
_PREEMPTED = 0x1000
"""Bit of `dbg`."""
CLIENT_VOLUME_LIMIT = 1024
"""Volumes that one NVMesh client can have attached, hidden ones included (NVMesh User Guide 3.5, limits)."""
_MODES = {mode.name: mode for mode in ReservationMode}

UPDATER_MARK = Path("/var/run/nvmesh/nvmeshclient/upgrade")
"""Made by the updater of the client, and removed by its success or by a reboot alone, not where it fails."""
UPGRADE_MARKS = (UPDATER_MARK, Path("/proc/nvmeiba"))
"""What is there, without the status files, while a client is replaced under running volumes: the updater's mark, and
the client's lower layer, which stays loaded."""
CLIENT_SIGNS = (Path("/etc/nvmesh/nvmesh.conf"),)
"""What is there where a client is installed, whether or not it runs."""


def parse_volume_status(text: str) -> VolumeStatus | None:
    """Read a volume's `status.json`; None when it is torn, or names no volume that is attached for use.

    Name and uuid are demanded, all else is a hint: left out where its form is not known here. A hidden attachment is
    the client's own (recovery, encryption) and has no device.
    """
    document = _object(text)
    name, uuid = document.get("name"), document.get("uuid")
    if not isinstance(name, str) or not is_volume_name(name) or not isinstance(uuid, str) or not is_uuid(uuid):
        return None
    if document.get("type") == "hidden":
        return None
    io_enabled, refuses_writes = _io_enabled(document), _refuses_writes(document)
    return VolumeStatus(
        name=name,
        uuid=uuid.lower(),
        size_bytes=_size_bytes(document),
        refusal=_refusal(document.get("debug_di")),
        io_enabled=io_enabled,
        refuses_writes=refuses_writes,
        preempted=io_enabled is False and _is_preempted(document),
        words="" if io_enabled and not refuses_writes else _words(document),
    )


def _size_bytes(document: Mapping[str, object]) -> int | None:
    blocks, block_bytes = document.get("size[blks]"), document.get("block[b]")
    if type(blocks) is not int or type(block_bytes) is not int or blocks < 0 or block_bytes < 0:
        return None
    size = blocks * block_bytes
    return size if size < _SIZE_LIMIT_BYTES else None


def _refusal(debug_di: object) -> str:
    # Whoever cannot tell that data is written must not hand the device out: only what is clearly off is taken for off.
    if debug_di is None or _number(debug_di) == 0:
        return ""
    return "its client runs in a debug mode that does not write data (debug_di)"


def _io_enabled(document: Mapping[str, object]) -> bool | None:
    """Tell whether the client carries I/O: True where everything it shows says so, False where nothing does, else None.

    `dbg` says it exactly: the attachment's status in its second byte, its errors in the first. Newer clients show
    `io_enabled` beside it, some seconds late. ATTACHED stays set, in `dbg` and in `attach_status`, after I/O was lost.
    A volume that is suspended or detaching has no `dbg`. Source: NVIDIA/nvmesh-kernel, nvmeibc_topology.c.
    """
    signs: set[bool | None] = set()
    if "io_enabled" in document:
        enabled = _number(document["io_enabled"])
        signs.add(None if enabled is None else enabled == 1)
    if "dbg" in document:
        state = _number(document["dbg"])
        signs.add(None if state is None else state in (_LIVE, _DEGRADED_READ_ONLY))
    attached = document.get("attach_status")
    if attached is not None and (attached != "Attached" or not signs):
        signs.add(False)
    return signs.pop() if len(signs) == 1 else None


def _is_preempted(document: Mapping[str, object]) -> bool:
    """Tell whether another client's reservation has cut off this attachment's I/O; it stays so until it is detached."""
    state = _number(document.get("dbg"))
    return document.get("attach_status") == "Preempted" or (state is not None and bool(state & _PREEMPTED))


def _refuses_writes(document: Mapping[str, object]) -> bool | None:
    """Tell whether writes fail: to an attachment that is read-only, and to a volume that is degraded.

    `enforce_read_only` is no sign of it: the client sets it for every volume.
    """
    if _number(document.get("dbg")) == _DEGRADED_READ_ONLY:
        return True
    reservation = document.get("reservation")
    mode = _MODES.get(reservation) if isinstance(reservation, str) else None
    return None if mode is None else mode is ReservationMode.SHARED_READ_ONLY


def _words(document: Mapping[str, object]) -> str:
    keys = ("status", "attach_status", "dbg", "io_enabled", "reservation")
    shown = (f"{key} is {ascii(document.get(key))[:48]}" for key in keys if key in document)
    return ", ".join(shown) or "its status names neither status, attach_status, dbg nor io_enabled"


def _number(value: object) -> int | None:
    if isinstance(value, int):
        return int(value)
    return int(value, 0) if isinstance(value, str) and _NUMBER.fullmatch(value) and not _is_octal(value) else None


def _is_octal(text: str) -> bool:
    return len(text) > 1 and text[0] == "0" and text[1] not in "xX"


def parse_reference_ids(text: str) -> tuple[str, ...] | None:
    """Read the reference ids of a volume's `blob.txt`; None when it is torn or of an unknown encoding."""
    lines = text.split("\n")[:-1]  # what no newline ends is torn
    values: dict[str, str] = {}
    for number, line in enumerate(lines):
        key, _, value = line.partition("=")
        values[key.strip()] = value.strip()
        if key.strip() == "n_strings":
            return _reference_ids(values, lines[number + 1 :])
    return None


def _reference_ids(values: Mapping[str, str], lines: Sequence[str]) -> tuple[str, ...] | None:
    count = _number(values["n_strings"])
    if values.get("encoding_version") != "1" or count is None or count > _REFERENCE_LIMIT or count > len(lines):
        return None
    ids = tuple(line.strip() for line in lines[:count])
    return ids if all(each and each.isprintable() for each in ids) else None


def parse_opens(text: str) -> int | None:
    """Read how often a device is open from the last line of a volume's `client_processes`; None when it is torn.

    The processes listed above that line are no answer: they are thread groups, and stay listed after they closed it.
    The client's other files go on with a version and the time.
    """
    counts = _OPENS.findall(text)
    return int(counts[-1]) if counts else None


def parse_client_uuid(text: str) -> str | None:
    """Read the client's own uuid from the client's `status.json`; None when it is not there."""
    main = _object(text).get("main")
    uuid = main.get("uuid") if isinstance(main, dict) else None
    return uuid.lower() if isinstance(uuid, str) and is_uuid(uuid) else None


def parse_volume_limit(text: str) -> int:
    """Read from the client's `version` how many volumes it can have attached; 0 = no limit.

    The embedded manager's are loop devices, of which the kernel makes as many as there is memory for.
    """
    return 0 if _object(text).get("module") == "embedded" else CLIENT_VOLUME_LIMIT


def parse_client_problem(text: str) -> str:
    """Read from the client's `version` whether its module was built wrongly and never registers; empty = no."""
    version = _object(text).get("version")
    return "its module says no version of itself: it was built wrongly and never registers" if version == "" else ""


def _object(text: str) -> Mapping[str, object]:
    try:
        document = json.loads(text, object_pairs_hook=_without_contradictions)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _without_contradictions(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Make an object of its pairs. A key that says two different things says nothing."""
    taken: dict[str, object] = {}
    doubtful = set()
    for key, value in pairs:
        if taken.setdefault(key, value) != value:
            doubtful.add(key)
    return {key: value for key, value in taken.items() if key not in doubtful}


class StatusFiles:
    """The status directory of the client, e.g. `/proc/nvmeibc`. Every answer is read afresh.

    `upgrade_marks` exist while the client is replaced under running volumes; `client_signs` exist where a client
    belongs, also while its status directory is gone.
    """

    def __init__(
        self, root: Path, *, upgrade_marks: Sequence[Path] = UPGRADE_MARKS, client_signs: Sequence[Path] = CLIENT_SIGNS
    ) -> None:
        self._root = root
        self._upgrade_marks = tuple(upgrade_marks)
        self._client_signs = (*client_signs, root, *upgrade_marks)

    def volume(self, name: str) -> VolumeStatus | None:
        """Return what the client says of a volume; None while it says nothing that can be read."""
        text = _read(self._root / "volumes" / name / "status.json")
        return parse_volume_status(text) if text is not None else None

    def reference_ids(self, name: str) -> tuple[str, ...] | None:
        """Return the reference ids under which this node holds the volume; None when that cannot be told."""
        text = _read(self._root / "volumes" / name / "blob.txt")
        return parse_reference_ids(text) if text is not None else None

    def opens(self, name: str) -> int | None:
        """Return how often the volume's device is open now; None when the client does not tell it."""
        text = _read(self._root / "volumes" / name / "client_processes")
        return parse_opens(text) if text is not None else None

    def client(self) -> StorageClient:
        """Return what is known of this machine's client."""
        text = _read(self._root / "status.json")
        uuid = parse_client_uuid(text) if text is not None else None
        upgrading = any(mark.exists() for mark in self._upgrade_marks)
        version = _read(self._root / "version") or ""
        return StorageClient(
            uuid=uuid,
            is_expected=uuid is not None or any(sign.exists() for sign in self._client_signs),
            is_upgrading=upgrading and uuid is None,
            problem=parse_client_problem(version),
            volume_limit=parse_volume_limit(version) if uuid is not None else 0,
        )

    def shown(self) -> frozenset[str]:
        """Return the names of the attachments that the client shows, hidden ones too."""
        try:
            return frozenset(entry.name for entry in (self._root / "volumes").iterdir())
        except OSError:
            return frozenset()


def _read(path: Path) -> str | None:
    """Read a file of the client's by one call: any that begins at its start makes it anew, for all its readers."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, _STATUS_LIMIT_BYTES).decode(errors="replace")
        finally:
            os.close(fd)
    except OSError:
        return None


# --- SCSI serial number --------------------------------------------------------------------------------------

_SG_IO = 0x2285
_SG_DXFER_FROM_DEV = -3
_INQUIRY_LENGTH = 96
_TIMEOUT_MS = 5000


class _SgIoHeader(ctypes.Structure):
    """struct sg_io_hdr of the kernel's include/scsi/sg.h."""

    _fields_ = (
        ("interface_id", ctypes.c_int),
        ("dxfer_direction", ctypes.c_int),
        ("cmd_len", ctypes.c_ubyte),
        ("mx_sb_len", ctypes.c_ubyte),
        ("iovec_count", ctypes.c_ushort),
        ("dxfer_len", ctypes.c_uint),
        ("dxferp", ctypes.c_void_p),
        ("cmdp", ctypes.c_void_p),
        ("sbp", ctypes.c_void_p),
        ("timeout", ctypes.c_uint),
        ("flags", ctypes.c_uint),
        ("pack_id", ctypes.c_int),
        ("usr_ptr", ctypes.c_void_p),
        ("status", ctypes.c_ubyte),
        ("masked_status", ctypes.c_ubyte),
        ("msg_status", ctypes.c_ubyte),
        ("sb_len_wr", ctypes.c_ubyte),
        ("host_status", ctypes.c_ushort),
        ("driver_status", ctypes.c_ushort),
        ("resid", ctypes.c_int),
        ("duration", ctypes.c_uint),
        ("info", ctypes.c_uint),
    )


def serial_of(uuid: str) -> str:
    """Return the serial number that the device of this volume shows: 20 of the uuid's 32 digits."""
    return uuid[0:8] + uuid[9:13] + uuid[24:28] + uuid[32:36]


def read_serial(fd: int) -> str | None:
    """Ask an open device for its serial number; None when it is not a device of NVMesh or cannot be asked."""
    standard = _inquire(fd, page=None)
    if standard is None or not is_nvmesh(standard):
        return None
    page = _inquire(fd, page=0x80)
    return parse_serial_page(page) if page is not None else None


def is_nvmesh(standard: bytes) -> bool:
    """Tell whether the standard answer to INQUIRY is of a device of NVMesh, of any version.

    The product `NVMesh` is followed by the release and NULs; the vendor differs between versions.
    """
    return standard[8:16].strip(b" \0") in (b"Excelero", b"NVMesh") and standard[16:32].startswith(b"NVMesh")


def parse_serial_page(page: bytes) -> str | None:
    """Read the vital product data page 0x80, unit serial number (SCSI Primary Commands)."""
    if len(page) < 4 or page[1] != 0x80:
        return None
    length = int.from_bytes(page[2:4], "big")
    serial = page[4 : 4 + length].decode("ascii", errors="replace").strip(" \0")
    return serial.lower() or None


def _inquire(fd: int, page: int | None) -> bytes | None:
    command = ctypes.create_string_buffer(bytes((0x12, page is not None, page or 0, 0, _INQUIRY_LENGTH, 0)), 6)
    data = ctypes.create_string_buffer(_INQUIRY_LENGTH)
    sense = ctypes.create_string_buffer(32)
    header = _SgIoHeader(
        interface_id=ord("S"),
        dxfer_direction=_SG_DXFER_FROM_DEV,
        cmd_len=6,
        mx_sb_len=len(sense),
        dxfer_len=_INQUIRY_LENGTH,
        dxferp=ctypes.addressof(data),
        cmdp=ctypes.addressof(command),
        sbp=ctypes.addressof(sense),
        timeout=_TIMEOUT_MS,
    )
    try:
        fcntl.ioctl(fd, _SG_IO, header)
    except OSError:
        return None
    answered = header.status == 0 and header.host_status == 0 and header.driver_status == 0
    return data.raw if answered else None
