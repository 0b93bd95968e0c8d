# SPDX-License-Identifier: Apache-2.0
"""The port of `attacher` to an engine: the part that gives volumes to clients of one kind."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from csi_driver.embedded.clients import Pair
from csi_driver.embedded.model import Attachment, Volume
from csi_driver.nvme_model import NvmeExport


@dataclass(frozen=True, slots=True)
class Hold:
    """A client's device or export of a volume.

    `is_cut`: it can do no I/O any more. `is_private`: it is of the client's own copy of the volume. `export`: where the
    client connects; None: it has a device.
    """

    name: str
    place: str
    file: Path
    is_cut: bool
    is_private: bool
    export: NvmeExport | None = None


class Engine(Protocol):
    """Gives volumes to clients. The caller has the volume's lock; a client has at most one hold on a volume.

    `needs_client`: nothing can be done for a client that is down.
    """

    @property
    def needs_client(self) -> bool: ...

    def recover(self) -> set[str]:
        """Find the holds of an earlier run. Return the names of the pool's files that are in use."""

    def forget_others(self, wanted: Collection[tuple[str, str]]) -> None:
        """Remove remains of attachments other than these, by names of client and volume, e.g. after a crash."""

    def serves(self, client: str) -> bool: ...

    def is_down(self, client: str) -> bool: ...

    def is_connected(self, client: str) -> bool:
        """Return whether the client has a connection now that its key was checked for."""

    def pairs(self) -> Collection[Pair]:
        """Return the clients and volumes with a hold."""

    def holders(self, identity: str) -> Iterable[str]: ...

    def hold(self, client: str, identity: str) -> Hold | None: ...

    def awaits(self, leaving: Attachment) -> bool:
        """Return whether a client lost its hold in a restart of this machine, and may come back for it."""

    # The methods below need a hold, but `attach` and `hide`.

    def has_file(self, client: str, identity: str, file: Path) -> bool:
        """Return whether the file at this path is the one that the client uses."""

    def fits(self, wanted: Attachment, *, private: bool) -> bool:
        """Return whether the client's hold carries I/O and is of the kind of this attachment."""

    def attach(self, volume: Volume, wanted: Attachment, file: Path, *, private: bool) -> None:
        """Give the client a file, which was verified, and which is on disk."""

    def keep(self, wanted: Attachment) -> None:
        """Repair a hold that other programs may have damaged."""

    def show(self, volume: Volume, wanted: Attachment) -> None:
        """Show the client the state of an attachment."""

    def hide(self, client: str, volume_name: str) -> None:
        """Show the client that a volume is detached."""

    def grow(self, client: str, identity: str) -> None:
        """Give the client the present size of its file."""

    def release(self, client: str, identity: str, volume_name: str | None, *, row_stays: bool) -> bool:
        """Take the volume from the client, and hide it; False, with no change, while the client uses it.

        `row_stays`: it will be given to the client in another form, for which the record may be changed.
        """

    def cut_off(self, client: str, identity: str, volume_name: str, *, is_down: bool) -> bool:
        """End the client's I/O for ever, or release the volume; False, with no change, where both are impossible.

        Earlier writes are in the file when this returns; later ones never reach it.
        """
