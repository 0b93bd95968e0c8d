# SPDX-License-Identifier: Apache-2.0
"""System calls that Python lacks. Errors are `SystemCallFailed`.

Numbers from include/uapi/asm-generic/unistd.h (the same for all architectures from 424 on); structures and flags from
include/uapi/linux/mount.h, stat.h and openat2.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import signal
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from csi_driver.errors import HostFailure, SystemCallFailed

_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_AT_SYMLINK_NOFOLLOW, _AT_NO_AUTOMOUNT, _AT_STATX_DONT_SYNC = 0x100, 0x800, 0x4000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_SYNCHRONOUS = 0x10
MS_REMOUNT = 0x20
MS_DIRSYNC = 0x80
MS_NOATIME = 0x400
MS_NODIRATIME = 0x800
MS_BIND = 0x1000
MS_SHARED = 1 << 20
MS_LAZYTIME = 1 << 25

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_ATIME_MASK = 0x70
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_NOSYMFOLLOW = 0x200000

RESOLVE_NO_SYMLINKS = 0x04

_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 428, 429, 430, 431, 432
_CLOSE_RANGE, _OPENAT2, _MOUNT_SETATTR, _STATMOUNT = 436, 437, 442, 457
_OPEN_TREE_CLONE = 1
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_CLOSE_RANGE_CLOEXEC = 4


@functools.cache
def libc() -> ctypes.CDLL:
    """Load libc at the first call; its functions run without the interpreter's lock."""
    return ctypes.CDLL(None, use_errno=True)


@functools.cache
def libc_in_memory() -> ctypes.PyDLL:
    """Load libc for what never waits: its functions keep the lock, which another thread would take meanwhile."""
    return ctypes.PyDLL(None, use_errno=True)


class system_call:
    """Raises OSError as `SystemCallFailed` that names the call. A generator would take three times as long."""

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, OSError):
            raise SystemCallFailed(self._what, error.errno or 0) from error


def open_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """Open a file (with O_CLOEXEC). Raises `SystemCallFailed`."""
    with system_call(f"open {path}"):
        return os.open(path, flags | os.O_CLOEXEC, mode)


def read_file(path: str, most_bytes: int) -> bytes:
    """Return what one read of a file gives, as the kernel's own files are meant to be read. Raises OSError."""
    with closing(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        return os.read(fd, most_bytes)


def fd_path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


class closing:
    """Gives a descriptor and closes it."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def syscall(what: str, number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    registers = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result = int(libc().syscall(ctypes.c_long(number), *registers))
    if result < 0:
        raise SystemCallFailed(what, ctypes.get_errno())
    return result


def mount(source: str, target: Path, fs_type: str, flags: int, data: str) -> None:
    options = data.encode() or None
    if libc().mount(source.encode(), os.fsencode(target), fs_type.encode(), ctypes.c_ulong(flags), options) != 0:
        raise SystemCallFailed(f"mount {source} at {target}", ctypes.get_errno())


def unmount(target: Path, flags: int = UMOUNT_NOFOLLOW) -> None:
    if libc().umount2(os.fsencode(target), ctypes.c_int(flags)) != 0:
        raise SystemCallFailed(f"unmount {target}", ctypes.get_errno())


def fsopen(fs_type: str) -> int:
    return syscall(f"fsopen {fs_type}", _FSOPEN, fs_type.encode(), _FSOPEN_CLOEXEC)


def fsconfig(context: int, key: str, value: str | None = None) -> None:
    """Set an option of a context: a flag, or a string when there is a value."""
    command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
    text = None if value is None else value.encode()
    syscall(f"fsconfig {key}", _FSCONFIG, context, command, key.encode(), text, 0)


def fsconfig_create(context: int) -> None:
    """Create the superblock of a context, or find that of the same device."""
    syscall("fsconfig create", _FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)


def fs_messages(context: int) -> list[str]:
    """Read the messages in the log of a context, e.g. "ext4: Unknown parameter 'x'"."""
    messages = []
    with contextlib.suppress(OSError):  # ENODATA ends the log
        while message := os.read(context, 4096):
            messages.append(message.decode(errors="replace").strip()[2:])
    return messages


def fsmount(context: int, attributes: int) -> int:
    return syscall("fsmount", _FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)


_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give back a part of a file, which reads as zeros then."""
    mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    if libc().fallocate(fd, ctypes.c_int(mode), ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        raise SystemCallFailed(f"punch a hole of {length} bytes at byte {offset}", ctypes.get_errno())


def open_tree_clone(source_fd: int, what: str) -> int:
    """Create a detached bind mount of an open file or directory."""
    return syscall(what, _OPEN_TREE, source_fd, b"", _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH)


def mount_setattr(mount_fd: int, attributes: int) -> None:
    """Add attributes to an open mount (Linux 5.12)."""
    wanted = struct.pack("=QQQQ", attributes, 0, 0, 0)
    syscall("mount_setattr", _MOUNT_SETATTR, mount_fd, b"", _AT_EMPTY_PATH, wanted, len(wanted))


def move_mount(mount_fd: int, target_fd: int, what: str) -> None:
    syscall(what, _MOVE_MOUNT, mount_fd, b"", target_fd, b"", _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH)


def openat2(path: Path, flags: int, resolve: int) -> int:
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    return syscall(f"open {path}", _OPENAT2, _AT_FDCWD, os.fsencode(path), how, len(how))


_POSIX_SPAWN_SETSIGDEF, _POSIX_SPAWN_SETSID = 0x04, 0x80  # <spawn.h> of glibc and musl
_SPAWN_BYTES = 512  # more than the C library's structures have


def spawn(
    program: str,
    argv: Sequence[str],
    environment: Mapping[str, str],
    descriptors: Mapping[int, int],
    keep: Sequence[int],
) -> int:
    """Start a program in a session of its own, in /, and return its process id. Its input is empty unless given.

    `descriptors`: its descriptors by those of this process; those in `keep` have the same number there. The functions
    of `subprocess` and `os` hold the interpreter's lock until the new process has executed the program, which takes as
    long as that process waits for a processor.
    """
    actions, attributes, signals = (ctypes.create_string_buffer(_SPAWN_BYTES) for _ in range(3))
    arguments, variables = map(os.fsencode, argv), (os.fsencode(f"{key}={text}") for key, text in environment.items())
    pid, c = ctypes.c_int(), libc_in_memory()
    with contextlib.suppress(SystemCallFailed):  # before Linux 5.11; the files of this process have O_CLOEXEC anyway
        syscall("close_range", _CLOSE_RANGE, 3, 0x7FFFFFFF, _CLOSE_RANGE_CLOEXEC)
    for signal_number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, which a program would inherit
        c.sigaddset(signals, signal_number)
    c.posix_spawn_file_actions_init(actions)
    c.posix_spawnattr_init(attributes)
    try:
        c.posix_spawn_file_actions_addopen(actions, 0, b"/dev/null", os.O_RDONLY, 0)
        for fd, number in (*descriptors.items(), *((fd, fd) for fd in keep)):
            c.posix_spawn_file_actions_adddup2(actions, fd, number)
        c.posix_spawn_file_actions_addchdir_np(actions, b"/")
        c.posix_spawnattr_setflags(attributes, ctypes.c_short(_POSIX_SPAWN_SETSIGDEF | _POSIX_SPAWN_SETSID))
        c.posix_spawnattr_setsigdefault(attributes, signals)
        number = libc().posix_spawn(
            ctypes.byref(pid), os.fsencode(program), actions, attributes, _strings(arguments), _strings(variables)
        )
    finally:
        c.posix_spawn_file_actions_destroy(actions)
        c.posix_spawnattr_destroy(attributes)
    if number:
        raise SystemCallFailed(f"start {argv[0]}", number)
    return pid.value


def _strings(texts: Iterable[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    found = [*texts, None]
    if any(b"\0" in text for text in found if text is not None):
        raise ValueError("expected arguments and variables without a null byte")  # which C takes for their end
    return (ctypes.c_char_p * len(found))(*found)


@functools.cache
def has_mount_setattr() -> bool:
    """Tell if the kernel has mount_setattr (5.12)."""
    # Invalid arguments: EINVAL or EFAULT when the call exists.
    try:
        syscall("probe", _MOUNT_SETATTR, None, 0xFFFF0000, None, None, 1)
    except SystemCallFailed as failure:
        return failure.errno not in (errno.ENOSYS, errno.EPERM)
    return True


_STATX_TYPE, _STATX_MODE, _STATX_MNT_ID, _STATX_MNT_ID_UNIQUE = 0x1, 0x2, 0x1000, 0x4000
_STATX_ATTR_MOUNT_ROOT = 0x2000
_STATX = struct.Struct("=IIQIIIHHQQQQ64sIIIIQ")


@dataclass(frozen=True, slots=True)
class PathStatus:
    """The result of statx. `unique_mount_id` (Linux 6.8), for `statmount`, is never reused, unlike `mount_id`."""

    mode: int
    node: tuple[int, int]
    is_mount_root: bool
    mount_id: int | None
    unique_mount_id: int | None


def statx(path: Path, *, follow: bool = False) -> PathStatus:
    """Return the status of a path, of a link itself unless told; nothing is mounted or waited for. Raises OSError."""
    flags = (0 if follow else _AT_SYMLINK_NOFOLLOW) | _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC
    wanted = _STATX_TYPE | _STATX_MODE | _STATX_MNT_ID | _STATX_MNT_ID_UNIQUE
    buffer = ctypes.create_string_buffer(256)
    if libc().statx(_AT_FDCWD, os.fsencode(path), ctypes.c_int(flags), ctypes.c_uint(wanted), buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    fields = _STATX.unpack_from(buffer.raw)
    mask, attributes, mode, known, mount_id = fields[0], fields[2], fields[6], fields[11], fields[17]
    if not known & _STATX_ATTR_MOUNT_ROOT:
        raise HostFailure("statx does not tell mounts from directories: expected Linux 5.8 or newer")
    return PathStatus(
        mode=mode,
        node=(fields[13], fields[14]),
        is_mount_root=bool(attributes & _STATX_ATTR_MOUNT_ROOT),
        mount_id=mount_id if mask & _STATX_MNT_ID and not mask & _STATX_MNT_ID_UNIQUE else None,
        unique_mount_id=mount_id if mask & _STATX_MNT_ID_UNIQUE else None,
    )


_STATMOUNT_NEEDED = 0x1 | 0x2 | 0x8 | 0x20 | 0x200  # SB_BASIC, MNT_BASIC, MNT_ROOT, FS_TYPE, SB_SOURCE
_STATMOUNT_OPTIONS = 0x80
_STATMOUNT_STRINGS = 512


@dataclass(frozen=True, slots=True)
class MountStatus:
    """The result of statmount; `options` are the filesystem's own."""

    device: tuple[int, int]
    superblock_flags: int
    attributes: int
    propagation: int
    fs_type: str
    root: str
    source: str
    options: str


def statmount(unique_mount_id: int) -> MountStatus | None:
    """Return the status of a mount; None before Linux 6.13."""
    request = struct.pack("=IIQQ", 24, 0, unique_mount_id, _STATMOUNT_NEEDED | _STATMOUNT_OPTIONS)
    size = 4096
    while True:
        buffer = ctypes.create_string_buffer(size)
        try:
            syscall("statmount", _STATMOUNT, request, buffer, size, 0)
        except SystemCallFailed as failure:
            if failure.errno == errno.EOVERFLOW and size < 1 << 20:
                size *= 4
                continue
            return None
        return _decode_statmount(buffer.raw)


def _decode_statmount(raw: bytes) -> MountStatus | None:
    (options_at, mask) = struct.unpack_from("=IQ", raw, 4)
    if mask & _STATMOUNT_NEEDED != _STATMOUNT_NEEDED:
        return None
    major, minor = struct.unpack_from("=II", raw, 16)
    superblock_flags, fs_type_at = struct.unpack_from("=II", raw, 32)
    attributes, propagation = struct.unpack_from("=QQ", raw, 64)
    (root_at,) = struct.unpack_from("=I", raw, 104)
    (source_at,) = struct.unpack_from("=I", raw, 124)

    def text(at: int) -> str:
        start = _STATMOUNT_STRINGS + at
        return raw[start : raw.index(b"\0", start)].decode(errors="surrogateescape")

    options = text(options_at) if mask & _STATMOUNT_OPTIONS else ""  # no bit without options
    texts = (text(fs_type_at), text(root_at), text(source_at), options)
    return MountStatus((major, minor), superblock_flags, attributes, propagation, *texts)
