# SPDX-License-Identifier: Apache-2.0
"""A file that stops answering when its server is stopped: put a loop device over it, and I/O hangs as on a lost path.

Run as `python -m tests.integration.stalling_disk DIRECTORY FILE`: mounts a FUSE filesystem with one file, `disk`, at
DIRECTORY and serves its reads and writes from FILE, until it is killed. SIGSTOP makes all I/O wait, SIGCONT lets it go
on, SIGKILL makes it fail. Speaks the protocol of the kernel's include/uapi/linux/fuse.h, as much as a file needs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from csi_driver.host import syscalls
from tests.integration.rig import wait_for

REPOSITORY = Path(__file__).parents[2]
_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE = 1, 2, 3, 4, 14, 15, 16
_STATFS, _RELEASE, _FSYNC, _FLUSH, _INIT, _INTERRUPT, _BATCH_FORGET = 17, 18, 20, 25, 26, 36, 42
_ROOT, _DISK = 1, 2
LONGEST_STALL_S = 120.0
_LONG_S = 3600
_MOST_BYTES = 128 * 1024


_FIXED: dict[int, bytes] = {
    _INIT: struct.pack("=IIIIHHIIHHI28x", 7, 31, 65536, 0, 16, 12, _MOST_BYTES, 1, 32, 0, 0),
    _OPEN: struct.pack("=QII", 0, 0, 0),
    _STATFS: struct.pack("=QQQQQIIII24x", 1 << 20, 1 << 19, 1 << 19, 2, 0, 4096, 255, 4096, 0),
    _RELEASE: b"",
    _FSYNC: b"",
    _FLUSH: b"",
}


class Server:
    """Answers the kernel."""

    def __init__(self, fuse: int, file: Path) -> None:
        self._fuse = fuse
        self._file = os.open(file, os.O_RDWR)

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self._fuse, _MOST_BYTES + 4096)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                return
            _, opcode, unique, node = struct.unpack_from("=IIQQ", request)
            answer = self._answer(opcode, node, request[40:])
            if answer is not None:
                status, body = (0, answer) if isinstance(answer, bytes) else (-answer, b"")
                os.write(self._fuse, struct.pack("=IiQ", 16 + len(body), status, unique) + body)

    def _answer(self, opcode: int, node: int, body: bytes) -> bytes | int | None:
        """Return the answer's body, or an errno; None where the kernel expects nothing."""
        if opcode in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            return None
        if opcode == _LOOKUP:
            return self._found() if body.rstrip(b"\0") == b"disk" else errno.ENOENT
        if opcode in (_GETATTR, _SETATTR):
            return struct.pack("=QII", _LONG_S, 0, 0) + self._attributes(node)
        if opcode in (_READ, _WRITE):
            _, offset, size = struct.unpack_from("=QQI", body)
            if opcode == _READ:
                return os.pread(self._file, size, offset)
            return struct.pack("=II", os.pwrite(self._file, body[40 : 40 + size], offset), 0)
        return _FIXED.get(opcode, errno.ENOSYS)

    def _found(self) -> bytes:
        return struct.pack("=QQQQII", _DISK, 0, _LONG_S, _LONG_S, 0, 0) + self._attributes(_DISK)

    def _attributes(self, node: int) -> bytes:
        mode, size = (0o40755, 0) if node == _ROOT else (0o100600, os.fstat(self._file).st_size)
        return struct.pack("=QQQQQQIIIIIIIIII", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


class StallingDisk:
    """The served file, and what can be done to its server."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self._process = process
        self.path = path

    def stall(self) -> None:
        """Let all I/O wait; a minute at most, so that a test that fails ends."""
        self._process.send_signal(signal.SIGSTOP)
        self._watchdog = threading.Timer(LONGEST_STALL_S, self._process.send_signal, (signal.SIGCONT,))
        self._watchdog.start()

    def go_on(self) -> None:
        self._watchdog.cancel()
        self._process.send_signal(signal.SIGCONT)

    def die(self) -> None:
        """Let every I/O fail from now on."""
        self._process.kill()
        self._process.wait(120)


@contextlib.contextmanager
def stalling_disk(directory: Path, size_bytes: int) -> Iterator[StallingDisk]:
    """Serve a file of that size below a directory for the length of a with-block."""
    place, file = directory / "stalling", directory / "stalling.img"
    place.mkdir()
    with file.open("wb") as made:
        made.truncate(size_bytes)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.stalling_disk", str(place), str(file)], cwd=REPOSITORY
    )
    try:
        wait_for((place / "disk").exists, "the file to be served", 20)
        yield StallingDisk(process, place / "disk")
    finally:
        process.kill()  # what hangs fails now
        process.wait(120)
        subprocess.run(["umount", "--lazy", str(place)], check=False, capture_output=True)


def main() -> None:
    place, file = Path(sys.argv[1]), Path(sys.argv[2])
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={_MOST_BYTES}"
    syscalls.mount("stalling", place, "fuse", 0, options)
    Server(fuse, file).serve()


if __name__ == "__main__":
    main()
