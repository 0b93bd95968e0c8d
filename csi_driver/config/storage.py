"""`nvmesh-csi storage`: its flags and settings."""

from __future__ import annotations

from pathlib import Path

from csi_driver.config import shared
from csi_driver.config import values as read
from csi_driver.config.flags import Flag, Values
from csi_driver.config.made import StorageCommand
from csi_driver.config.shared import DEVICES, HTTP_LISTEN, LOG_FLAGS, NO_PATH, NODE_NAME, table
from csi_driver.embedded.settings import ClientSettings, StorageSettings, TestSwitches

_STORAGE = StorageSettings(pool_directory=Path())
_NO_SIZE: int | None = None
_LISTEN_DEFAULT: tuple[str, int] | int = (_STORAGE.listen_host, _STORAGE.listen_port)

_POOL = Flag("--pool", read.path, Path(), "", "Directory that holds the volumes and their records.", metavar="DIR")
_SIZE = Flag(
    "--size",
    read.positive_size,
    _NO_SIZE,
    "free space at the first start, less the reserve",
    "Total size of all volumes.",
    unit="bytes, or with a unit as in 10GiB",
    metavar="SIZE",
)
OVERCOMMIT = Flag(
    "--overcommit", read.boolean, False, "false", "Allow --size above the free space; pods may get I/O errors."
)
PREALLOCATE = Flag(
    "--preallocate",
    read.boolean,
    False,
    "false",
    "Allocate every block of a volume when it is created; without it pods get I/O errors when other programs fill the"
    " disk later.",
)
_RESERVE = Flag(
    "--reserve",
    read.size,
    _STORAGE.reserve_bytes,
    "128MiB",
    "Free space that must remain in the pool's filesystem; below it new volumes are refused.",
    unit="bytes, or with a unit as in 1GiB",
    metavar="SIZE",
)
_CLIENTS = Flag(
    "--client",
    read.named_directory,
    ("", Path()),
    "one, described by --node-name, --device-directory and --status-directory",
    "Storage client on this machine, with its devices in DIR/dev and its status files in DIR/proc; the first is"
    " this machine's own.",
    metavar="NAME=DIR",
    repeatable=True,
)
_STORAGE_STATUS = Flag(
    "--status-directory",
    read.path,
    Path("/run/nvmesh-csi/proc"),
    "/run/nvmesh-csi/proc",
    "Directory for the storage client's status files.",
    metavar="DIR",
)
_LISTEN = Flag(
    "--listen",
    read.host_port_or_fd,
    _LISTEN_DEFAULT,
    f"{_STORAGE.listen_host}:{_STORAGE.listen_port}",
    "Address of the REST API; port 0 = any free port, fd:N = an inherited, bound TCP socket.",
    metavar="HOST:PORT",
)
_API_USER = Flag(
    "--user", read.text, _STORAGE.user, _STORAGE.user, "User for the login at the REST API.", metavar="USER"
)
_API_PASSWORD = Flag(
    "--password-file",
    read.path,
    NO_PATH,
    "POOL/password, generated",
    "File with the user's password; read again when it changes.",
    metavar="FILE",
)
_SESSION_IDLE = Flag(
    "--session-idle",
    read.seconds,
    _STORAGE.session_idle_s,
    f"{_STORAGE.session_idle_s:g}",
    "Idle time after which a login expires.",
    unit="seconds",
    metavar="TIME",
)
_PRETEND = Flag(
    "--pretend-targets",
    read.count,
    0,
    "0, the real number",
    "Number of simulated storage targets, to try layouts with redundancy; they do not protect data.",
    unit="targets",
    metavar="N",
)
_TLS_CERTIFICATE = Flag(
    "--tls-certificate",
    read.path,
    NO_PATH,
    "none, plain http",
    "PEM certificate chain; with --tls-key the API uses https.",
    metavar="FILE",
)
_TLS_KEY = Flag("--tls-key", read.path, NO_PATH, "none", "PEM private key of the certificate.", metavar="FILE")
_TEST_SWITCHES = Flag(
    "--test-switches", read.boolean, False, "false", "Test API that blocks work and sets clients DOWN."
)

STORAGE_FLAGS = table(
    _POOL, _SIZE, OVERCOMMIT, PREALLOCATE, _RESERVE, _CLIENTS, NODE_NAME, DEVICES, _STORAGE_STATUS, _LISTEN,
    _API_USER, _API_PASSWORD, _SESSION_IDLE, _PRETEND, _TLS_CERTIFICATE, _TLS_KEY, _TEST_SWITCHES, HTTP_LISTEN,
    *LOG_FLAGS,
)  # fmt: skip


def storage(values: Values) -> StorageCommand:
    """Make the settings of the embedded storage manager."""
    listen = values.one(_LISTEN)
    listen_host, listen_port = ("", 0) if isinstance(listen, int) else listen
    settings = StorageSettings(
        pool_directory=values.one(_POOL),
        clients=_clients(values),
        size_bytes=values.one(_SIZE),
        overcommit=values.one(OVERCOMMIT),
        preallocate=values.one(PREALLOCATE),
        reserve_bytes=values.one(_RESERVE),
        listen_host=listen_host,
        listen_port=listen_port,
        listen_fd=listen if isinstance(listen, int) else None,
        user=values.one(_API_USER),
        password_file=values.one(_API_PASSWORD),
        session_idle_s=values.one(_SESSION_IDLE),
        pretend_targets=values.one(_PRETEND),
        tls_certificate=values.one(_TLS_CERTIFICATE),
        tls_key=values.one(_TLS_KEY),
        test_switches=TestSwitches(enabled=values.one(_TEST_SWITCHES)),
    )
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        values.problems.append("--tls-certificate and --tls-key must be given together")
    return StorageCommand(shared.log(values), settings, shared.http(values))


def _clients(values: Values) -> tuple[ClientSettings, ...]:
    given = values.all(_CLIENTS)
    names = [name for name, _ in given]
    if len(set(names)) != len(names):
        values.problems.append("--client names a client twice")
    if len({directory for _, directory in given}) != len(given):
        values.problems.append("--client gives two clients one directory, expected one of its own for each")
    own = ClientSettings(values.one(NODE_NAME) or shared.host_name(), values.one(DEVICES), values.one(_STORAGE_STATUS))
    return tuple(ClientSettings.under(name, directory) for name, directory in given) or (own,)
