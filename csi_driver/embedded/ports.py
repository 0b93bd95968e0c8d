"""What the manager needs of this machine: loop devices. The adapter lives in csi_driver.host."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from csi_driver.host_model import LoopDevice


class LuksHeaders(Protocol):
    """LUKS2 headers in files. Every method raises HostFailure where a tool refuses, Denied for a wrong passphrase.

    Slots count from 0. What is changed is on disk when a method returns.
    """

    def format(
        self, file: Path, passphrase: str, *, slot: int, key_size_bits: int, header_bytes: int, volume_uuid: str
    ) -> None:
        """Make a header whose data begins `header_bytes` in, over whatever is there."""
        ...

    def opens(self, file: Path, passphrase: str) -> bool:
        """Tell whether the passphrase opens it."""
        ...

    def add(self, file: Path, current: str, new: str, *, slot: int | None) -> None:
        """Let a new passphrase open it, in this slot or in any that is free."""
        ...

    def remove(self, file: Path, passphrase: str) -> None:
        """Let a passphrase open it no more; the last one is never removed (PreconditionFailed)."""
        ...


class LoopDevices(Protocol):
    """The loop devices of this machine. Every method raises HostFailure where the kernel refuses."""

    def attach(self, file: Path, node: Path, *, label: str, read_only: bool, block_size: int = 4096) -> LoopDevice:
        """Bind a free loop device to `file` with `label` (at most 63 bytes) and make `node` a device node of it."""
        ...

    def bound_to(self, directory: Path) -> tuple[LoopDevice, ...]:
        """Return every loop device whose backing file lies in `directory`."""
        ...

    def has_file(self, device: LoopDevice, file: Path) -> bool:
        """Tell whether what is at `file` now is what the device is bound to."""
        ...

    def grow(self, device: LoopDevice) -> None:
        """Make the device as large as its file is now."""
        ...

    def fence(self, device: LoopDevice) -> LoopDevice | None:
        """Cut a device that is in use off from its file, for good, and return it so; None where that cannot be.

        What was written before is in the file then; what is written afterwards never reaches it.
        """
        ...

    def detach(self, device: LoopDevice) -> bool:
        """Unbind the device and return True, or return False and leave it alone if it is mounted or open."""
        ...
