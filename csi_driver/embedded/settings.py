"""Every option of the embedded storage manager, with its unit and default; the composition root parses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from csi_driver.flags import (
    flag,
    read_boolean,
    read_count,
    read_directory,
    read_file,
    read_named_directory,
    read_positive_duration,
    read_positive_size,
    read_size,
    read_text,
    reader,
    repeatable,
    required,
    section,
)
from csi_driver.settings import OVERCOMMIT, PREALLOCATE

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

    enabled: bool = flag(False, "--test-switches", read_boolean, "Test API that blocks work and sets clients DOWN.")
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


@reader("NAME=DIR")
def read_client(value: str) -> ClientSettings:
    """Read NAME=DIR."""
    return ClientSettings.under(*read_named_directory(value))


@dataclass(frozen=True, slots=True)
class StorageSettings:
    """How the embedded storage manager is run."""

    pool_directory: Path = required(
        Path(), "--pool", read_directory, "Directory that holds the volumes and their records."
    )
    clients: tuple[ClientSettings, ...] = repeatable(
        (),
        "--client",
        read_client,
        "Storage client on this machine, with its devices in DIR/dev and its status files in DIR/proc; the first is"
        " this machine's own.",
        shown="one, described by --node-name, --device-directory and --status-directory",
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
    listen_host: str = "127.0.0.1"
    listen_port: int = 4000
    """0: any free port."""
    listen_fd: int | None = None
    """Descriptor of an inherited, bound socket; replaces host and port."""
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
    test_switches: TestSwitches = section(TestSwitches)
