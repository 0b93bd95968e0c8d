"""Commands of one machine: storage, local, demo, doctor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from csi_driver.config.parser import Command, Values, build
from csi_driver.embedded.settings import ClientSettings, StorageSettings
from csi_driver.flags import flag, host_name, read_directory, read_host_port_or_fd, section
from csi_driver.local.doctor import Target
from csi_driver.local.settings import DemoSettings, LocalSettings
from csi_driver.settings import DEVICE_DIRECTORY, HTTP_LISTEN, NODE_NAME, HttpSettings
from csi_driver.telemetry.log import LogSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageCommand(Command):
    """`nvmesh-csi storage`."""

    storage: StorageSettings = section(StorageSettings)
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
    http: HttpSettings | None = HTTP_LISTEN.field()
    log: LogSettings = section(LogSettings)

    def resolved(self) -> Self:
        own = ClientSettings(self.node_name or host_name(), self.device_directory, self.status_directory)
        host, port = ("", 0) if isinstance(self.listen, int) else self.listen
        storage = replace(
            self.storage,
            clients=self.storage.clients or (own,),
            listen_host=host,
            listen_port=port,
            listen_fd=self.listen if isinstance(self.listen, int) else None,
        )
        return replace(self, storage=storage)

    def problems(self, values: Values) -> Iterator[str]:
        clients = self.storage.clients
        if len({client.name for client in clients}) != len(clients):
            yield "--client names a client twice"
        if len({client.device_directory for client in clients}) != len(clients):
            yield "--client gives two clients one directory, expected one of its own for each"
        if (self.storage.tls_certificate is None) != (self.storage.tls_key is None):
            yield "--tls-certificate and --tls-key must be given together"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCommand(Command):
    """`nvmesh-csi local`."""

    settings: LocalSettings = section(LocalSettings)
    log: LogSettings = section(LogSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoCommand(Command):
    """`nvmesh-csi demo`."""

    settings: DemoSettings = section(DemoSettings)
    log: LogSettings = section(LogSettings)

    def problems(self, values: Values) -> Iterator[str]:
        least, given = self.settings.volume_bytes, self.settings.expanded_bytes
        if given < least:
            yield f"--expanded-size: expected at least the {least} bytes of --volume-size, got {given}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorCommand(Command):
    """`nvmesh-csi doctor`."""

    target: Target = section(Target)
    log: LogSettings = field(default_factory=lambda: LogSettings("error"))

    @classmethod
    def read(cls, values: Values) -> Self:
        if values.running is not None:
            values.file["--role"] = ("running role", values.running.role)
        return cls(target=replace(build(Target, values), running=values.running))

    def problems(self, values: Values) -> Iterator[str]:
        if self.target.management.servers:
            yield from self.target.management.problems()


COMMANDS: Mapping[str, type[Command]] = {
    "storage": StorageCommand,
    "local": LocalCommand,
    "demo": DemoCommand,
    "doctor": DoctorCommand,
}
