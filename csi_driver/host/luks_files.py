"""LUKS2 headers in plain files, for the embedded storage manager: what a storage target does for its volumes.

Nothing is opened here: all of it works on a file, without device-mapper. Passphrases reach cryptsetup as files in
memory (see `passphrases`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from csi_driver.errors import Denied, PreconditionFailed, SystemCallFailed
from csi_driver.host.command import Completed, find_tool, run
from csi_driver.host.passphrases import held, path_of

_LIMIT_S = 10 * 60.0
"""Deriving a key takes seconds on a busy machine; a program that takes longer hangs."""
_SECTOR_BYTES = 512
_MEMORY_KIB = 64 * 1024
_COST_MS = "500"
"""What deriving a key costs on this machine; every start of a pod costs it again."""

# cryptsetup(8), "RETURN CODES"
_REFUSED, _WRONG_PASSPHRASE = 1, 2


class LuksFiles:
    """Fits `csi_driver.embedded.ports.LuksHeaders`. `iterations` makes keys cheap to derive, for tests alone."""

    def __init__(self, *, iterations: int | None = None) -> None:
        # As much memory as nodes take by default: they derive the same key whenever they open the volume.
        self._cost: tuple[str, ...] = ("--pbkdf-memory", str(_MEMORY_KIB), "--iter-time", _COST_MS)
        if iterations is not None:
            self._cost = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", str(iterations))

    @staticmethod
    def are_possible() -> bool:
        """Tell whether the program that makes them is installed."""
        return find_tool("cryptsetup") is not None

    def format(
        self, file: Path, passphrase: str, *, slot: int, key_size_bits: int, header_bytes: int, volume_uuid: str
    ) -> None:
        """Make a header whose data begins `header_bytes` in, over whatever is there. The size of the file stays."""
        options = (
            "--type", "luks2", "--uuid", volume_uuid, "--cipher", "aes-xts-plain64", "--key-size", str(key_size_bits),
            "--key-slot", str(slot), "--offset", str(header_bytes // _SECTOR_BYTES), "--sector-size", "4096",
        )  # fmt: skip
        with claimed(file) as claim, held(passphrase) as key:
            size_bytes = os.fstat(claim).st_size
            self._run("luksFormat", (*options, *self._cost, "--key-file", path_of(key)), file, keys=(key, claim))
            if os.fstat(claim).st_size != size_bytes:
                os.ftruncate(claim, size_bytes)
                raise PreconditionFailed(f"the header of {header_bytes} bytes does not fit into {file}")
            os.fsync(claim)

    def opens(self, file: Path, passphrase: str) -> bool:
        """Tell whether the passphrase opens it."""
        with held(passphrase) as key:
            options = ("--test-passphrase", "--key-file", path_of(key))
            return self._run("open", options, file, keys=(key,), accept=(0, _WRONG_PASSPHRASE)).status == 0

    def add(self, file: Path, current: str, new: str, *, slot: int | None) -> None:
        """Let a new passphrase open it, in this slot or in any that is free. Raises `Denied`, `PreconditionFailed`."""
        where = () if slot is None else ("--key-slot", str(slot))
        with claimed(file) as claim, held(current) as key, held(new) as new_key:
            answer = self._run(
                "luksAddKey",
                (*where, *self._cost, "--key-file", path_of(key)),
                file,
                keys=(key, new_key, claim),
                operand=path_of(new_key),
                accept=(0, _REFUSED, _WRONG_PASSPHRASE),
            )
            os.fsync(claim)
        _require(answer, file)

    def remove(self, file: Path, passphrase: str) -> None:
        """Let a passphrase open it no more. Raises `Denied`, and `PreconditionFailed` for the last one."""
        with claimed(file) as claim, held(passphrase) as key:
            dump = self._run("luksDump", ("--dump-json-metadata",), file, keys=())
            if dump.stdout.count(b'"type":"luks2"') < 2 and self.opens(file, passphrase):
                raise PreconditionFailed(f"the passphrase given is the only one that opens {file.name}")
            answer = self._run(
                "luksRemoveKey",
                (),
                file,
                keys=(key, claim),
                operand=path_of(key),
                accept=(0, _REFUSED, _WRONG_PASSPHRASE),
            )
            os.fsync(claim)
        _require(answer, file)

    def _run(
        self,
        command: str,
        options: Sequence[str],
        file: Path,
        *,
        keys: Sequence[int],
        operand: str | None = None,
        accept: Sequence[int] = (0,),
    ) -> Completed:
        operands = (str(file),) if operand is None else (str(file), operand)
        argv = ("cryptsetup", command, "--batch-mode", *options, "--", *operands)
        return run(argv, timeout_s=_LIMIT_S, accept=accept, pass_fds=keys)


@contextlib.contextmanager
def claimed(file: Path) -> Iterator[int]:
    """Hold a file for a change of its header. Raises `PreconditionFailed` while anybody else does.

    The lock belongs to the descriptor, which cryptsetup inherits: one that outlives a killed manager keeps it, so that
    nobody makes another header, and has data written under it, before the first one has stopped writing. It is an
    OFD lock because cryptsetup takes flock(2) locks of its own on the file.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as problem:
        raise SystemCallFailed(f"open {file}", problem.errno or 0) from problem
    try:
        # struct flock of <fcntl.h>: the whole file, from its start; an OFD lock wants the process id 0.
        whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, whole)
        except (BlockingIOError, PermissionError) as problem:
            raise PreconditionFailed(f"another program still changes the header of {file.name}") from problem
        yield descriptor
    finally:
        os.close(descriptor)


def _require(answer: Completed, file: Path) -> None:
    if answer.status == _WRONG_PASSPHRASE:
        raise Denied(f"the passphrase given does not open {file.name}")
    if answer.status == _REFUSED:
        raise PreconditionFailed(
            f"cryptsetup refuses to change the keys of {file.name}: {answer.stderr.strip()[-200:]}"
        )
