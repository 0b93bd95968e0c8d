"""What an NVMesh client shows of itself and of each attached volume: files under its status directory, and the SCSI
serial number of the device.

The files change between versions of the client and may be read half written: only what is needed is taken, and what
cannot be read is "not known yet", never a guess. The embedded manager writes the same files.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from csi_driver.model import is_uuid

_STATUS_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class VolumeStatus:
    """The part of a volume's `status.json` that the driver relies on.

    `refusal` says why the device may not be used although it is there; empty = it may.
    """

    name: str
    uuid: str
    size_bytes: int | None
    refusal: str = ""


def parse_volume_status(text: str) -> VolumeStatus | None:
    """Read a volume's `status.json`; None when it is torn, or names no volume."""
    document = _object(text)
    name, uuid = document.get("name"), document.get("uuid")
    if not isinstance(name, str) or not isinstance(uuid, str) or not is_uuid(uuid):
        return None
    blocks, block_bytes = document.get("size[blks]"), document.get("block[b]")
    size = blocks * block_bytes if isinstance(blocks, int) and isinstance(block_bytes, int) else None
    refusal = ""
    if document.get("type") == "hidden":
        refusal = "it is a hidden attachment of the storage client itself"
    elif document.get("debug_di") not in (None, 0, False):
        refusal = "its client runs in a debug mode that does not write data (debug_di)"
    return VolumeStatus(name, uuid.lower(), size, refusal)


def parse_reference_ids(text: str) -> tuple[str, ...] | None:
    """Read the reference ids of a volume's `blob.txt`; None when it is torn or of an unknown encoding."""
    lines = text.splitlines()
    heads = [line.partition("=") for line in lines[:4]]
    values = {key.strip(): value.strip() for key, _, value in heads}
    count = values.get("n_strings", "")
    if values.get("encoding_version") != "1" or not count.isascii() or not count.isdigit():
        return None
    ids = tuple(line.strip() for line in lines[4 : 4 + int(count)])
    return ids if len(ids) == int(count) else None


def parse_client_uuid(text: str) -> str | None:
    """Read the client's own uuid from the client's `status.json`; None when it is not there."""
    main = _object(text).get("main")
    uuid = main.get("uuid") if isinstance(main, dict) else None
    return uuid.lower() if isinstance(uuid, str) and is_uuid(uuid) else None


def _object(text: str) -> Mapping[str, object]:
    try:
        document = json.loads(text)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


class StatusFiles:
    """The status directory of the client, e.g. `/proc/nvmeibc`. Every answer is read afresh."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def volume(self, name: str) -> VolumeStatus | None:
        """Return what the client says of a volume; None while it says nothing that can be read."""
        text = _read(self._root / "volumes" / name / "status.json")
        return parse_volume_status(text) if text is not None else None

    def reference_ids(self, name: str) -> tuple[str, ...] | None:
        """Return the reference ids under which this node holds the volume; None when that cannot be told."""
        text = _read(self._root / "volumes" / name / "blob.txt")
        return parse_reference_ids(text) if text is not None else None

    def client_uuid(self) -> str | None:
        """Return the uuid of this machine's client; None where there is no client."""
        text = _read(self._root / "status.json")
        return parse_client_uuid(text) if text is not None else None


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(_STATUS_LIMIT_BYTES).decode(errors="replace")
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
    if standard is None or standard[8:16].strip() != b"Excelero" or standard[16:32].strip() != b"NVMesh":
        return None
    page = _inquire(fd, page=0x80)
    return parse_serial_page(page) if page is not None else None


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
