# SPDX-License-Identifier: Apache-2.0
"""Two controllers over two faulty connections to one storage manager.

A model of each volume, kept by its own worker, holds the acknowledged state. The storage is read through its records,
without the faulty connections.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from csi_driver.controller.capacity import ExpandVolume
from csi_driver.controller.create_volume import CreateVolume
from csi_driver.controller.delete_volume import DeleteVolume
from csi_driver.controller.features import ZoneFeatures
from csi_driver.controller.fencing import UnpublishVolume
from csi_driver.controller.ports import CreateRequest, PublishRequest
from csi_driver.controller.publish import PublishVolume
from csi_driver.controller.snapshots import Snapshots
from csi_driver.deadline import Deadline
from csi_driver.embedded.model import ATTACHMENTS, CLIENTS, VOLUMES, Attachment, Volume
from csi_driver.embedded.server import StorageServer
from csi_driver.errors import DriverError, PreconditionFailed
from csi_driver.management.client import ManagementClient
from csi_driver.management.clusters import OneCluster
from csi_driver.management.settings import ManagementSettings
from csi_driver.model import (
    GIB,
    MIB,
    AccessMode,
    Capability,
    CapacityRange,
    MountAccess,
    VolumeHandle,
)
from csi_driver.publish_context import PublishContext
from csi_driver.settings import ControllerSettings
from tests.contract.two_managements import Storage
from tests.fakes.fault_proxy import Drawn, Fault, FaultProxy, Seen

RWO = Capability(MountAccess(), AccessMode.SINGLE_NODE_WRITER)
ZONE = "single-zone-cluster"
NODES = ("node-1", "node-2")
REQUEST_S = 1.5
CALL_S = 10.0
PARAMETERS = {"csi.storage.k8s.io/pvc/name": "claim", "csi.storage.k8s.io/pvc/namespace": "team-a"}
QUICK = dict.fromkeys([fault for fault in Fault if not fault.startswith("hang")], 1.0)
UUIDS = {Fault.OTHER_UUID_ASKED: 3.0, Fault.OTHER_UUID_ANSWERED: 3.0}
WEIGHTS = {**QUICK, **UUIDS, Fault.HANG_BEFORE: 0.05, Fault.HANG_AFTER: 0.05}
SETTINGS = ControllerSettings(usable_wait_s=4, attach_wait_s=3, detach_wait_s=1.5, answer_margin_s=0.1)

T = TypeVar("T")


class Controller:
    """The controller's use-cases on a client of its own."""

    def __init__(self, servers: tuple[str, ...], storage: Storage) -> None:
        self.client = ManagementClient(
            ManagementSettings(
                servers=servers,
                username=storage.settings.user,
                password_file=storage.server.password.path,
                request_timeout_s=REQUEST_S,
                max_requests_in_flight=8,
            )
        )
        clusters = OneCluster(ZONE, self.client)
        self.creation = CreateVolume(clusters, SETTINGS, Snapshots(clusters, ZoneFeatures(clusters)))
        self.deletion = DeleteVolume(clusters, SETTINGS)
        self.publication = PublishVolume(clusters, SETTINGS)
        self.unpublication = UnpublishVolume(clusters, SETTINGS)
        self.expand = ExpandVolume(clusters)


@dataclass
class Kept:
    """Acknowledged state of one volume, which a single worker uses."""

    name: str
    handle: str = ""
    size_bytes: int = 0
    node: str = ""

    @property
    def uuid(self) -> str:
        parsed = VolumeHandle.parse(self.handle)
        return (parsed.uuid if parsed is not None else None) or ""

    @property
    def storage_name(self) -> str:
        parsed = VolumeHandle.parse(self.handle)
        return parsed.name if parsed is not None else ""


@dataclass
class World:
    """See the module."""

    storage: Storage
    drawn: Drawn
    proxies: tuple[FaultProxy, FaultProxy]
    controllers: tuple[Controller, Controller]
    calls: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    restarts: int = 0
    attached: set[str] = field(default_factory=set)
    """Names in the storage of volumes with an acknowledged attachment and no requested detachment."""
    wrongly_deleted: list[str] = field(default_factory=list)
    """Volumes with a delete request of a controller while they were attached, with any answer."""

    def watch(self, request: Seen) -> None:
        """Look at a request on its way to the server."""
        if request.path == "/volumes/delete" and request.subject in self.attached:
            self.wrongly_deleted.append(request.subject)

    def restart(self) -> None:
        """Let the storage manager die while requests are under way, and start it on its pool again."""
        for proxy in self.proxies:
            proxy.upstream = None
            proxy.break_all()
        self.storage.server.stop()
        self.storage.server = StorageServer(self.storage.settings, self.storage.loops)
        self.storage.server.start()
        for proxy in self.proxies:
            proxy.upstream = self.storage.server.address
        self.restarts += 1

    # --- state of the storage ---------------------------------------------------------------------------

    def volumes(self) -> dict[str, Volume]:
        """Return the volumes by uuid."""
        return {volume.uuid: volume for volume in self.storage.server.store.all(VOLUMES)}

    def nodes_of(self, uuid: str) -> set[str]:
        """Return the nodes on which a volume is to be attached."""
        wishes: list[Attachment] = self.storage.server.store.everywhere(ATTACHMENTS)
        return {wish.client for wish in wishes if wish.uuid == uuid and wish.action == "attaching"}

    def client_uuid(self, node: str) -> str:
        return next(client.uuid for client in self.storage.server.store.all(CLIENTS) if client.name == node)


class Worker:
    """Does operations on volumes of its own, as an orchestrator: each again and again until it is acknowledged."""

    def __init__(self, world: World, seed: int, number: int, volumes: int = 3) -> None:
        self.world = world
        self.random = random.Random(f"{seed} worker {number}")
        self.kept = [Kept(self._new_name(number, index)) for index in range(volumes)]
        self.operations = 0

    def _new_name(self, number: int, index: int) -> str:
        return f"pvc-{self.random.getrandbits(32):08x}-{number:04x}-{index:04x}-0000-000000000000"

    def run(self, operations: int) -> None:
        for _ in range(operations):
            volume = self.random.choice(self.kept)
            self._operation(volume)(volume)
            self.operations += 1

    def _operation(self, volume: Kept) -> Callable[[Kept], None]:
        if not volume.handle:
            return self.create
        if not volume.node:
            return self.random.choice([self.create, self.extend, self.attach, self.attach, self.attach, self.delete])
        return self.random.choice(
            [self.extend, self.attach, self.detach, self.detach, self.delete_attached, self.attach_elsewhere]
        )

    # --- operations: do it until it is acknowledged, then see that it is so ---

    def create(self, volume: Kept) -> None:
        request = CreateRequest(volume.name, CapacityRange(GIB), (RWO,), PARAMETERS)
        made = self._until_done(
            "create", lambda controller: controller.creation.create(request, deadline=Deadline.after(CALL_S))
        )
        if volume.handle:
            assert made.volume_id == volume.handle, f"{volume.name} was made twice"
        volume.handle = made.volume_id
        volume.size_bytes = max(volume.size_bytes, made.capacity_bytes)
        stored = [row for row in self.world.volumes().values() if _csi_name(row) == volume.name]
        assert [row.uuid for row in stored] == [volume.uuid]

    def extend(self, volume: Kept) -> None:
        wanted = volume.size_bytes + self.random.randint(1, 64) * MIB
        size_bytes, _ = self._until_done(
            "extend",
            lambda controller: controller.expand.expand(
                volume.handle, CapacityRange(wanted), RWO, deadline=Deadline.after(CALL_S)
            ),
        )
        assert size_bytes >= wanted
        volume.size_bytes = size_bytes
        assert self.world.volumes()[volume.uuid].bytes == size_bytes

    def attach(self, volume: Kept) -> None:
        node = volume.node or self.random.choice(NODES)
        context = self._until_done("attach", lambda controller: self._publish(controller, volume, node))
        volume.node = node
        self.world.attached.add(volume.storage_name)
        assert context.uuid == volume.uuid
        assert self.world.nodes_of(volume.uuid) == {node}

    def detach(self, volume: Kept) -> None:
        node = self.world.client_uuid(volume.node)
        self.world.attached.discard(volume.storage_name)
        self._until_done(
            "detach",
            lambda controller: controller.unpublication.unpublish(volume.handle, node, deadline=Deadline.after(CALL_S)),
        )
        volume.node = ""
        assert self.world.nodes_of(volume.uuid) == set()

    def delete(self, volume: Kept) -> None:
        self._until_done("delete", lambda controller: self._delete(controller, volume))
        assert volume.uuid not in self.world.volumes()
        volume.handle, volume.size_bytes = "", 0

    def delete_attached(self, volume: Kept) -> None:
        """No fault leads to the deletion of an attached volume."""
        self._until_refused("delete attached", lambda controller: self._delete(controller, volume))
        assert volume.uuid in self.world.volumes()

    def attach_elsewhere(self, volume: Kept) -> None:
        """A volume of one node is given to no other."""
        (other,) = set(NODES) - {volume.node}
        self._until_refused("attach elsewhere", lambda controller: self._publish(controller, volume, other))
        assert self.world.nodes_of(volume.uuid) == {volume.node}

    def _publish(self, controller: Controller, volume: Kept, node: str) -> PublishContext:
        request = PublishRequest(volume.handle, self.world.client_uuid(node), RWO, read_only=False)
        return controller.publication.publish(request, deadline=Deadline.after(CALL_S))

    def _delete(self, controller: Controller, volume: Kept) -> None:
        controller.deletion.delete(volume.handle, deadline=Deadline.after(CALL_S))

    # --- calls --------------------------------------------------------------------------------------------

    def _until_done(self, verb: str, call: Callable[[Controller], T]) -> T:
        results: list[T | DriverError] = []
        for attempt in range(200):
            both = self.random.random() < 0.05
            controllers = self.world.controllers if both else (self.random.choice(self.world.controllers),)
            results = self._at_once(verb, call, controllers)
            done = [result for result in results if not isinstance(result, DriverError)]
            if done:
                assert all(other == done[0] for other in done), f"two answers to one {verb}: {done}"
                return done[0]
            self._pause(attempt)
        raise AssertionError(f"{verb} was never done: {results}")

    def _until_refused(self, verb: str, call: Callable[[Controller], object]) -> None:
        result: object = None
        for attempt in range(200):
            (result,) = self._at_once(verb, call, (self.random.choice(self.world.controllers),))
            assert isinstance(result, DriverError), f"{verb} was done"
            if isinstance(result, PreconditionFailed):
                return
            self._pause(attempt)
        raise AssertionError(f"{verb} never got a final error: {result}")

    def _at_once(
        self, verb: str, call: Callable[[Controller], T], controllers: tuple[Controller, ...]
    ) -> list[T | DriverError]:
        """Make a call of one controller, or of both at the same time."""
        if len(controllers) == 1:
            return [self._one(verb, call, controllers[0])]
        with ThreadPoolExecutor(len(controllers)) as pool:
            return list(pool.map(lambda controller: self._one(verb, call, controller), controllers))

    def _one(self, verb: str, call: Callable[[Controller], T], controller: Controller) -> T | DriverError:
        with self.world.lock:
            self.world.calls[verb] += 1
        try:
            return call(controller)
        except DriverError as error:
            with self.world.lock:
                self.world.failures[f"{verb}: {type(error).__name__}"] += 1
            return error

    def _pause(self, attempt: int) -> None:
        """Wait as an orchestrator does, in small: longer where it goes on failing."""
        time.sleep(min(0.01 * 2 ** min(attempt, 5), 0.3) * self.random.random())


def _csi_name(row: Volume) -> str:
    metadata = row.given.get("metadata")
    return str(metadata.get("csi_name", "")) if isinstance(metadata, dict) else ""


class Weather:
    """What happens to the servers as wholes, by how many requests went through: death, silence, restarts."""

    def __init__(self, world: World, seed: int, every: int) -> None:
        self._world = world
        self._random = random.Random(f"{seed} weather")
        self._every = every
        self._due = threading.Semaphore(0)
        self._requests = 0
        self._ending = False
        self._thread = threading.Thread(target=self._blow, name="weather")
        self.seen: Counter[str] = Counter()

    def start(self) -> None:
        for proxy in self._world.proxies:
            proxy.on_forward = self._count
        self._thread.start()

    def stop(self) -> None:
        self._ending = True
        self._due.release()
        self._thread.join()

    def _count(self, request: Seen) -> None:
        self._world.watch(request)
        with self._world.lock:
            self._requests += 1
            if self._requests % self._every == 0:
                self._due.release()

    def _blow(self) -> None:
        while self._due.acquire() and not self._ending:
            what = self._random.choice(["restart", "one dead", "one dead", "one silent", "both dead"])
            self.seen[what] += 1
            proxy = self._random.choice(self._world.proxies)
            if what == "restart":
                self._world.restart()
            elif what == "one silent":
                proxy.hang()
                time.sleep(0.5)
                proxy.go_on()
            else:
                dead = [proxy] if what == "one dead" else list(self._world.proxies)
                for one in dead:
                    one.die()
                time.sleep(0.3 if len(dead) == 2 else 1.0)
                for one in dead:
                    one.revive()


@contextmanager
def faulty_world(directory: Path, seed: int, share: float) -> Iterator[World]:
    storage = Storage.start(directory)
    storage.settings = replace(storage.settings, listen=("127.0.0.1", storage.server.address[1]))
    drawn = Drawn(seed, share, WEIGHTS)
    proxies = (
        FaultProxy(drawn, hang_s=REQUEST_S + 0.5),
        FaultProxy(drawn, hang_s=REQUEST_S + 0.5),
    )
    for proxy in proxies:
        proxy.upstream = storage.server.address
    one, other = (proxy.url for proxy in proxies)
    controllers = Controller((one, other), storage), Controller((other, one), storage)
    world = World(storage, drawn, proxies, controllers)
    try:
        yield world
    finally:
        for controller in controllers:
            controller.client.close()
        for proxy in proxies:
            proxy.stop()
        storage.server.stop()
