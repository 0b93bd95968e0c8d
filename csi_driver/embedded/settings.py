"""Every option of the embedded storage manager, with its unit and default; the composition root parses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

GIB = 1 << 30
MIB = 1 << 20


def no_fault(point: str) -> None:
    """Do nothing at a fault point: what every real run uses."""


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """One storage client (a node) that this manager serves on this machine."""

    name: str
    device_directory: Path
    """Where its device nodes appear, one per attached volume, under the volume's name; a real client's: /dev/nvmesh."""
    status_directory: Path
    """Where it keeps what a real client shows under /proc/nvmeibc: status.json, version, volumes/<volume>/..."""

    @classmethod
    def under(cls, name: str, directory: Path) -> ClientSettings:
        """Return the client of `--client NAME=DIR`: devices in DIR/dev, status files in DIR/proc."""
        return cls(name, directory / "dev", directory / "proc")


@dataclass(frozen=True, slots=True)
class TestSwitches:
    """Behaviour that only tests ask for. Every default is the behaviour of a real run."""

    __test__ = False  # the name makes pytest look for tests in it

    enabled: bool = False
    """Serve the /embedded/test routes, which hold back work and make clients DOWN."""
    must_change_password: bool = False
    """Answer every call 1268 until the password is changed, as a freshly installed management does."""
    down_clients: tuple[str, ...] = ()
    """Clients that are DOWN from the start: their wishes are recorded and not carried out."""
    attach_delay_s: float = 0.0
    """Seconds that a client takes before it carries out an attach; the request does not wait for it."""
    detach_delay_s: float = 0.0
    """Seconds that a client takes before it carries out a detach; the request does not wait for it."""
    fault: Callable[[str], None] = no_fault
    """Called with the name of each step that a crash may fall between."""


@dataclass(frozen=True, slots=True)
class StorageSettings:
    """How the embedded storage manager is run."""

    pool_directory: Path
    """Holds volumes/<uuid>.img, manager.sqlite, password and lock. Made if missing."""
    clients: tuple[ClientSettings, ...] = ()
    """At least one is needed to attach anything; the first is this machine's own."""
    size_bytes: int | None = None
    """Bytes that may be promised to volumes. None: what is free in the pool at its first start, less the reserve."""
    overcommit: bool = False
    """Allow `size_bytes` above what is free. Guests may then meet I/O errors; for benchmarks and tests."""
    preallocate: bool = False
    """Reserve every block of a volume in the file system when it is made; else others may fill the disk before it."""
    reserve_bytes: int = 128 * MIB
    """New volumes and extensions leave this much free in the file system."""
    listen_host: str = "127.0.0.1"
    listen_port: int = 4000
    """0 takes any free port; the one taken is printed."""
    listen_fd: int | None = None
    """Descriptor of a bound socket that this process has inherited; it takes the place of host and port."""
    user: str = "admin@nvidia.com"
    password_file: Path | None = None
    """File holding the password, read again when it changes. None: DIR/password, generated, for root alone."""
    session_idle_s: float = 3600.0
    """Seconds without a request after which a session ends."""
    pretend_targets: int = 0
    """Number of storage targets to pretend, so that RAID levels with redundancy can be allocated. 0: the truth."""
    retry_first_s: float = 0.2
    """Seconds before the first new try of work that could not be done (a busy device); doubled each time."""
    retry_most_s: float = 5.0
    tls_certificate: Path | None = None
    """PEM chain; with `tls_key` the API is served over https."""
    tls_key: Path | None = None
    test_switches: TestSwitches = field(default_factory=TestSwitches)
