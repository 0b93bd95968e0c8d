# SPDX-License-Identifier: Apache-2.0
"""Settings of the embedded storage manager with their flags, and its ports to this machine.

The adapters of the ports are in csi_driver.host.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, Self

from csi_driver.flags import (
    choice,
    flag,
    host_name,
    read_count,
    read_directory,
    read_file,
    read_host_port_or_fd,
    read_named_directory,
    read_positive_count,
    read_positive_duration,
    read_positive_size,
    read_size,
    read_text,
    reader,
    repeatable,
    required,
)
from csi_driver.host_model import Extent, LoopDevice
from csi_driver.node_settings import DEVICE_DIRECTORY
from csi_driver.nvme_model import Connection, HostKeys, TargetExport
from csi_driver.settings import EXPORT_PORTS, NODE_NAME, OVERCOMMIT, PREALLOCATE

MIB = 1 << 20
_MOST_TIMES = 100
_MOST_PORTALS = 8
"""Limit of `csi_driver.host.nvme_target`."""
LOOP, NVME_TCP, AUTO = "loop", "nvme-tcp", "auto"


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """A storage client (a node) that this manager serves on this machine."""

    name: str
    device_directory: Path
    """Holds a device node for each attached volume, named after the volume; a real client's is /dev/nvmesh."""
    status_directory: Path
    """Holds the files that a real client shows under /proc/nvmeibc."""

    @classmethod
    def under(cls, name: str, directory: Path) -> ClientSettings:
        return cls(name, directory / "dev", directory / "proc")


@reader("NAME=DIR")
def read_client(value: str) -> ClientSettings:
    return ClientSettings.under(*read_named_directory(value))


@reader("FACTOR", "multiples of that space")
def read_factor(value: str) -> float:
    if not (re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,6})?", value) and float(value) <= _MOST_TIMES):
        raise ValueError(f"a number from 0 to {_MOST_TIMES}")
    return float(value)


@reader("ADDRESS")
def read_portal(value: str) -> str:
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        raise ValueError("an IP address") from None
    if address.is_unspecified or address.is_multicast or getattr(address, "scope_id", None):
        raise ValueError("an IP address of this machine, which nodes can reach")
    return str(address)


@dataclass(frozen=True, slots=True)
class StorageSettings:
    pool_directory: Path = required(
        Path(), "--pool", read_directory, "Directory that holds the volumes and their records."
    )
    clients: tuple[ClientSettings, ...] = repeatable(
        "--client",
        read_client,
        "Storage client on this machine, with its devices in DIR/dev and its status files in DIR/proc; the first is"
        " this machine's own.",
        shown="one, described by --node-name, --device-directory and --status-directory",
    )
    drive: Path | None = flag(
        None,
        "--drive",
        read_file.named("DEVICE"),
        "Drive of the pool, by a stable name such as /dev/disk/by-id/NAME: mounted at --pool, after it got its"
        " filesystem (xfs) once, if it was blank.",
        shown="none, the pool is the directory",
    )
    size_bytes: int | None = flag(
        None,
        "--size",
        read_positive_size,
        "Total size of all volumes.",
        shown="free space at the first start, less the reserve",
    )
    overcommit: bool = OVERCOMMIT.field()
    preallocate: bool = PREALLOCATE.field()
    reserve_bytes: int = flag(
        128 * MIB,
        "--reserve",
        read_size,
        "Free space that must remain in the pool's filesystem; below it new volumes are refused.",
    )
    snapshot_overcommit: float = flag(
        1.0,
        "--snapshot-overcommit",
        read_factor,
        "Part of the space that a volume occupied when it was cut last, which the pool keeps free for writes to it;"
        " below 1 volumes may get I/O errors when their snapshots fill the pool.",
    )
    snapshot_extent_limit: int = flag(
        100_000,
        "--snapshot-extent-limit",
        read_positive_count.named("N", "extents"),
        "Extents of a volume's file above which snapshots and clones of it are refused: they block its writers too"
        " long.",
    )
    freeze_limit_s: float = flag(
        10.0,
        "--freeze-limit",
        read_positive_duration,
        "Longest time for which the mounted filesystems of a group are frozen while its snapshots are made; then they"
        " are thawed, and the request fails.",
    )
    export: str = flag(
        LOOP,
        "--export",
        choice(LOOP, NVME_TCP, AUTO),
        "How nodes get volumes: loop devices for the clients of this machine alone, or also NVMe/TCP for every other"
        " node; auto = NVMe/TCP if this machine can.",
    )
    export_addresses: tuple[str, ...] = repeatable(
        "--export-address",
        read_portal,
        "Address of this machine in the storage network, at which nodes reach their volumes; several give several"
        " paths.",
        shown="none",
    )
    export_ports: tuple[int, int] = EXPORT_PORTS.field()
    node_name: str = NODE_NAME.field()
    device_directory: Path = DEVICE_DIRECTORY.field()
    status_directory: Path = flag(
        Path("/run/nvmesh-csi/proc"),
        "--status-directory",
        read_directory,
        "Directory for the storage client's status files.",
    )
    listen: tuple[str, int] | int = flag(
        ("127.0.0.1", 4000),
        "--listen",
        read_host_port_or_fd,
        "Address of the REST API; port 0 = any free port, fd:N = an inherited, bound TCP socket.",
        shown="127.0.0.1:4000",
    )
    user: str = flag("admin@nvidia.com", "--user", read_text.named("USER"), "User for the login at the REST API.")
    password_file: Path | None = flag(
        None,
        "--password-file",
        read_file,
        "File with the user's password; read again when it changes.",
        shown="POOL/password, generated",
    )
    session_idle_s: float = flag(
        3600.0, "--session-idle", read_positive_duration, "Idle time after which a login expires."
    )
    pretend_targets: int = flag(
        0,
        "--pretend-targets",
        read_count.named("N", "targets"),
        "Number of simulated storage targets, to try layouts with redundancy; they do not protect data.",
        shown="0, the real number",
    )
    retry_first_s: float = 0.2
    """Pause before the first retry of work that failed; doubled up to `retry_most_s`."""
    retry_most_s: float = 5.0
    tls_certificate: Path | None = flag(
        None,
        "--tls-certificate",
        read_file,
        "PEM certificate chain; with --tls-key the API uses https.",
        shown="none, plain http",
    )
    tls_key: Path | None = flag(None, "--tls-key", read_file, "PEM private key of the certificate.", shown="none")
    authentication: Literal["off", "required"] = flag(
        "off",
        "--auth",
        choice("off", "required"),
        "Whether nodes that connect over NVMe/TCP must prove their key, and exports theirs (DH-HMAC-CHAP).",
    )
    join_token_file: Path | None = flag(
        None,
        "--join-token-file",
        read_file,
        "File with the token that a node needs to register its key; read again when it changes.",
        shown="none, no node registers",
    )

    def resolved(self) -> Self:
        """Fill in the client of this machine where none is given."""
        own = ClientSettings(self.node_name or host_name(), self.device_directory, self.status_directory)
        return replace(self, clients=self.clients or (own,))

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each problem between flags."""
        if len({client.name for client in self.clients}) != len(self.clients):
            yield "--client names a client twice"
        if len({client.device_directory for client in self.clients}) != len(self.clients):
            yield "--client gives two clients one directory, expected one of its own for each"
        if self.export_addresses and self.export == LOOP:
            yield f"--export-address: expected --export {NVME_TCP} or {AUTO}, as loop devices have no address"
        if len(set(self.export_addresses)) != len(self.export_addresses):
            yield "--export-address names an address twice"
        if len(self.export_addresses) > _MOST_PORTALS:
            yield f"--export-address: expected at most {_MOST_PORTALS}, got {len(self.export_addresses)}"
        if (self.tls_certificate is None) != (self.tls_key is None):
            yield "--tls-certificate and --tls-key must be given together"
        if self.authentication == "required" and self.join_token_file is None:
            yield "--auth required: expected --join-token-file, by which nodes register their keys"
        if self.join_token_file is not None and self.tls_certificate is None and not self._listens_here_alone:
            yield "--join-token-file: expected --tls-certificate and --tls-key, as keys cross the network in the clear"

    @property
    def _listens_here_alone(self) -> bool:
        return not isinstance(self.listen, int) and self.listen[0] in ("127.0.0.1", "::1", "localhost")

    def target_names(self) -> list[str]:
        """Return the names of the storage targets: the simulated ones, or this machine."""
        simulated = [f"target{number + 1}.sim" for number in range(self.pretend_targets)]
        return simulated or [self.host_name]

    @property
    def host_name(self) -> str:
        return self.clients[0].name if self.clients else "localhost"


class LoopDevices(Protocol):
    """Loop devices of this machine. Each method raises HostFailure where the kernel refuses."""

    def attach(self, file: Path, node: Path, *, label: str, read_only: bool, block_size: int = 4096) -> LoopDevice:
        """Bind a free loop device to `file`, with `label` (at most 63 bytes), and make its device node at `node`."""

    def ensure_node(self, device: LoopDevice, node: Path) -> LoopDevice:
        """Make `node` the device node of the device, atomically; return the device with it."""

    def bound_to(self, *directories: Path) -> tuple[LoopDevice, ...]:
        """Return the loop devices that are bound to files in these directories."""

    def has_file(self, device: LoopDevice, file: Path) -> bool:
        """Return whether the file at this path is the backing file of the device."""

    def grow(self, device: LoopDevice) -> None:
        """Set the device's size to the present size of its file."""

    def fence(self, device: LoopDevice) -> LoopDevice | None:
        """Cut a device in use off from its file for ever; None where that is impossible.

        Earlier writes are in the file when this returns; later ones never reach it.
        """

    def detach(self, device: LoopDevice) -> bool:
        """Unbind the device; False, with no change, if it is mounted or open."""


class NvmeTarget(Protocol):
    """The kernel's NVMe target over TCP. Methods raise HostFailure where the kernel refuses, and are repeatable."""

    def addresses(self) -> Sequence[str]:
        """Return the addresses of this machine by which others may reach it."""

    def why_not(self) -> str:
        """Return why this machine cannot export; "" when it can. Loads the modules and mounts configfs."""

    def exported(self, pool_uuid: str) -> tuple[TargetExport, ...]:
        """Return the exports of a pool, also those that a crash left half made or half removed."""

    def apply(self, export: TargetExport, keys: Mapping[str, HostKeys] = ...) -> TargetExport:
        """Make it so, the link last; nothing that matches is touched. `keys` are by the NQN of the host.

        Return what it is then: without an address that this machine does not have now, if it has another one.
        When it returns, only `export.hosts` can do I/O, and no I/O of another host is running.
        """

    def is_open(self, export: TargetExport) -> bool:
        """Return whether hosts can connect to it at each address."""

    def withdraw(self, export: TargetExport) -> None:
        """Remove it, also what a crash left; when it returns no I/O is running."""

    def grow(self, export: TargetExport) -> None:
        """Set the namespace's size to the present size of its file."""

    def elsewhere(self, exports: Collection[TargetExport]) -> Collection[TargetExport]:
        """Return the exports with ports in another network namespace: their connections are not seen here."""

    def connections(self, ports: Collection[int]) -> Mapping[int, tuple[Connection, ...]]:
        """Return the connections to each of these ports in this network namespace."""


class LuksHeaders(Protocol):
    """LUKS2 headers in files. Raises HostFailure if the tool fails."""

    def format(
        self, file: Path, passphrase: str, *, slot: int, key_size_bits: int, header_bytes: int, volume_uuid: str
    ) -> None:
        """Write and sync a header over the head of the file. The data begins at `header_bytes`.

        Slots count from 0.
        """


class Reflinks(Protocol):
    """Files that share their blocks. Raises SystemCallFailed where the filesystem refuses."""

    def clone(self, source_fd: int, target_fd: int) -> None:
        """Make the target share all blocks of the source: the source's content at one moment (FICLONE)."""

    def count_extents(self, fd: int) -> int:
        """Return the number of extents of a file (FIEMAP), after its writes have got their blocks."""

    def extents(self, fd: int, offset: int, most: int) -> Sequence[Extent]:
        """Return up to `most` extents of a file in ascending order, from the one at or behind `offset`."""

    def why_not_comparable(self, fd: int) -> str:
        """Return why equal addresses of two files' extents do not prove equal content there; "" when they do."""


class SparseFiles(Protocol):
    """Files whose zeros take no space. Raises HostFailure where the kernel refuses."""

    def why_not(self, directory: Path) -> str:
        """Return why files in this directory cannot give back a part of their space; "" when they can."""

    def give_back_zeros(self, file: Path, offset: int, most_bytes: int) -> int | None:
        """Give back the blocks of zeros from `offset`, reading at most about `most_bytes`, and return where to go on.

        None at the end. The file's content stays the same. Raises PreconditionFailed while another program has it open;
        ends early when one is about to open it.
        """


class Freezes(Protocol):
    """Holds the writes to files of the pool."""

    def held(
        self, files: Sequence[Path], exports: Sequence[str] = ..., *, limit_s: float
    ) -> AbstractContextManager[Callable[[], None]]:
        """Hold the writes to the files for `limit_s` at most; give the function that ends this and verifies it.

        `exports`: NQNs of the subsystems by which hosts write to the files.
        Copies made until it is called are of one moment, unless it raises NotFreezable. Raises NotFreezable at once
        where a file's device is in use and cannot be frozen.
        """

    def recover(self) -> bool:
        """Thaw what is left frozen; False: retry later."""
