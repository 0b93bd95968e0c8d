# SPDX-License-Identifier: Apache-2.0
"""Two storage managements of one contract: the model that the controller's tests run on, and the management client on
the embedded storage manager, over a real socket. The loop devices of the latter are a model, so nothing needs root.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from csi_driver.controller.ports import Management
from csi_driver.deadline import Deadline
from csi_driver.embedded.server import StorageServer
from csi_driver.embedded.settings import ClientSettings, StorageSettings
from csi_driver.management.client import ManagementClient
from csi_driver.management.settings import ManagementSettings
from csi_driver.storage_model import Client, ClientStatus, Layout, RaidLevel, ReservationMode, Volume, VolumeSpec, Vpg
from tests.fakes.management import FakeManagement
from tests.storage_switches import Switches
from tests.unit.embedded.fake_freezes import FakeFreezes
from tests.unit.embedded.fake_loops import FakeLoopDevices
from tests.unit.embedded.fake_luks import FakeLuksHeaders
from tests.unit.embedded.fake_reflinks import FakeReflinks

EXCLUSIVE = ReservationMode.EXCLUSIVE_READ_WRITE
READ_ONLY = ReservationMode.SHARED_READ_ONLY
SHARED = ReservationMode.SHARED_READ_WRITE
OTHER_UUID = "00000000-0000-1000-8000-000000000000"
POOL_BYTES = 1_000_000_000_000
CLIENTS = ("node-1", "node-2")


class Work(Enum):
    """Slow work of a management, named as the embedded manager's switches are."""

    MAKING = "initialize"
    DETACHING = "slow:node-1"
    DELETING = "delete"
    ENCRYPTING = "encrypt"


class Side(Protocol):
    """A management, with the interventions of a test."""

    @property
    def management(self) -> Management: ...

    def hold(self, work: Work) -> None:
        """Let no work of this kind be finished any more."""

    def lose(self, client: str) -> None:
        """Let a client be down from now on."""


class FakeSide:
    """`FakeManagement` behind `Side`, with the groups of a new cluster."""

    def __init__(self) -> None:
        self._fake = FakeManagement(CLIENTS, raw_bytes=POOL_BYTES)
        self.management: Management = self._fake
        mirrored = Layout(RaidLevel.MIRRORED, number_of_mirrors=1)
        striped = Layout(RaidLevel.STRIPED_MIRRORED, stripe_width=2, stripe_size_blocks=32, number_of_mirrors=1)
        for level, layout in (("CONCATENATED", Layout()), ("RAID_1", mirrored), ("RAID_10", striped)):
            self._fake.add_vpg(Vpg(f"DEFAULT_{level}_VPG", layout, 0, allow_overflow=True))

    def lose(self, client: str) -> None:
        self._fake.set_status(client, ClientStatus.DOWN)

    def hold(self, work: Work) -> None:
        match work:
            case Work.MAKING:
                self._fake.make_s = float("inf")
            case Work.DETACHING:
                self._fake.detach_s = float("inf")
            case Work.DELETING:
                self._fake.delete_s = float("inf")
            case Work.ENCRYPTING:
                self._fake.encrypt_s = float("inf")


@dataclass
class Storage:
    """An embedded manager that can be stopped and started again on the same pool and port."""

    settings: StorageSettings
    loops: FakeLoopDevices
    server: StorageServer
    reflinks: FakeReflinks

    def __post_init__(self) -> None:
        self._switches = Switches(self.server)

    def hold(self, kind: str) -> None:
        """Block a kind of work of the server that was started first."""
        self._switches.hold(kind)

    def release(self, kind: str) -> None:
        self._switches.release(kind)

    @classmethod
    def start(
        cls,
        directory: Path,
        *,
        certificate: Path | None = None,
        key: Path | None = None,
        has_reflinks: bool = True,
    ) -> Storage:
        pool = directory / "pool"
        pool.mkdir(parents=True)
        settings = StorageSettings(
            pool,
            clients=tuple(ClientSettings.under(name, directory / name) for name in CLIENTS),
            size_bytes=POOL_BYTES,
            overcommit=True,
            listen=("127.0.0.1", 0),
            pretend_targets=3,
            retry_first_s=0.01,
            tls_certificate=certificate,
            tls_key=key,
        )
        loops = FakeLoopDevices()
        reflinks = FakeReflinks()
        offered = reflinks if has_reflinks else None
        server = StorageServer(settings, loops, FakeLuksHeaders(), offered, FakeFreezes())
        server.start()
        return cls(settings, loops, server, reflinks)

    def connect(self, password_file: Path | None = None) -> ManagementClient:
        return ManagementClient(
            ManagementSettings(
                servers=(self.server.url,),
                username=self.settings.user,
                password_file=password_file or self.server.password.path,
            )
        )


class EmbeddedSide:
    """The client on the embedded manager, behind `Side`."""

    def __init__(self, storage: Storage, management: Management) -> None:
        self._storage = storage
        self.management = management

    def lose(self, client: str) -> None:
        self._storage.hold(f"client:{client}")

    def hold(self, work: Work) -> None:
        self._storage.hold(work.value)


@contextlib.contextmanager
def embedded_storage(directory: Path, *, has_reflinks: bool = True) -> Iterator[Storage]:
    storage = Storage.start(directory, has_reflinks=has_reflinks)
    try:
        yield storage
    finally:
        storage.server.stop()


@contextlib.contextmanager
def embedded_side(directory: Path) -> Iterator[Side]:
    with embedded_storage(directory) as storage, contextlib.closing(storage.connect()) as client:
        yield EmbeddedSide(storage, client)


@dataclass(slots=True)
class Actor:
    """Does the steps that most tests begin with."""

    management: Management
    deadline: Deadline

    def created(self, name: str = "v1", capacity_gb: float = 2.0, **options: object) -> Volume:
        layout = None if "vpg" in options else Layout()
        spec = VolumeSpec(name, capacity_gb, {"csi_name": f"pvc-{name}"}, **{"layout": layout, **options})  # type: ignore[arg-type]
        assert self.management.create_volume(spec, deadline=self.deadline) is not None
        return self.usable(name)

    def usable(self, name: str) -> Volume:
        found: list[Volume] = []

        def ready() -> bool:
            volume = self.management.volume(name, deadline=self.deadline)
            assert volume is not None
            found[:] = [volume]
            return not volume.is_being_made

        assert self.deadline.wait_until(ready)
        return found[0]

    def node(self, number: int = 1) -> Client:
        client = self.management.client(f"node-{number}", deadline=self.deadline)
        assert client is not None
        return client

    def attach(
        self, volume: Volume, number: int = 1, mode: ReservationMode = EXCLUSIVE, reference: str | None = None
    ) -> None:
        self.management.attach(self.node(number), volume, mode=mode, reference_id=reference, deadline=self.deadline)

    def detach(self, volume: Volume, number: int = 1, reference: str | None = None) -> None:
        self.management.detach(self.node(number), volume, reference_id=reference, deadline=self.deadline)

    def holders(self, volume: Volume) -> list[str]:
        return [client.id for client in self.management.clients_holding(volume.uuid, deadline=self.deadline)]

    def names(self, after: str = "", limit: int = 0) -> list[str]:
        return [volume.name for volume in self.management.volumes(after=after, limit=limit, deadline=self.deadline)]
