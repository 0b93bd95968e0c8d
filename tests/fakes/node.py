# SPDX-License-Identifier: Apache-2.0
"""A node in memory: the use-cases over `FakeHost`, and requests as kubelet would make them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csi_driver.deadline import Deadline
from csi_driver.errors import StorageUnavailable
from csi_driver.model import EMPTY, AccessMode, BlockAccess, Capability, CapacityRange, Claim, MountAccess, Usage
from csi_driver.node import NodeExpandRequest, NodePublishRequest, StageRequest
from csi_driver.node.concurrency import Watchdog
from csi_driver.node.service import NodeUseCases, assemble
from csi_driver.node.usage_records import UsageRecord, UsageRecords
from csi_driver.node_settings import NodeSettings
from csi_driver.nvme_model import NvmeExport
from csi_driver.publish_context import Encryption, History, PublishContext
from csi_driver.thread_pool import Job
from tests.fakes.clock import FakeClock
from tests.fakes.disks import MIB
from tests.fakes.host import FakeHost
from tests.fakes.reports import Reports

UUID = "0a6f1c1e-9d1b-4b7e-8f6b-3f1d2c5b7a90"
OTHER_UUID = "77777777-9d1b-4b7e-8f6b-3f1d2c5b7a90"
NAME = "csi-1"
VOLUME_ID = f"single-zone-cluster:{NAME}:{UUID}"
KUBELET = Path("/var/lib/kubelet")
STAGING = KUBELET / "plugins/staging/globalmount"
TARGET = KUBELET / "pods/1/mount"
OTHER_TARGET = KUBELET / "pods/2/mount"
EXT4 = MountAccess("ext4")
BLOCK = BlockAccess()
WRITER = AccessMode.SINGLE_NODE_WRITER
READER = AccessMode.MULTI_NODE_READER_ONLY


@dataclass
class FakeUsageRecords(UsageRecords):
    """Usage records in memory, with the same points at which the driver may die."""

    host: FakeHost
    kept: dict[str, UsageRecord] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @contextlib.contextmanager
    def changing(self, *volume_uuids: str) -> Iterator[None]:
        with self.lock:
            yield

    def recorded(self) -> list[str]:
        return list(self.kept)

    def read(self, volume_uuid: str) -> UsageRecord | None:
        return self.kept.get(volume_uuid)

    def write(self, record: UsageRecord) -> None:
        self.host.step("before record")
        self.kept[record.volume_uuid] = record
        self.host.step("after record")

    def remove(self, volume_uuid: str) -> None:
        if volume_uuid in self.kept:
            self.host.step("before record removal")
            del self.kept[volume_uuid]
            self.host.step("after record removal")


class FakeNode:
    """The use-cases with every argument defaulted to the plainest case: ext4, one writer, first attachment."""

    def __init__(self, *, heavy_operations: int = 4, settings: NodeSettings | None = None) -> None:
        self.host = FakeHost()
        self.clock = FakeClock()
        self.reports = Reports()
        self.records = FakeUsageRecords(self.host)
        self.settings = settings or NodeSettings(
            node_name="node-1", state_directory=Path("/nowhere"), heavy_operations=heavy_operations
        )
        self.use = self.restart()
        for path in (STAGING, TARGET.parent, OTHER_TARGET.parent):
            self.host.make_tree(path)

    def restart(self) -> NodeUseCases:
        """Restart the driver on the same machine."""
        self.host.die()
        self.use = assemble(
            devices=self.host.devices,
            encryption=self.host.encryption,
            read_only_devices=self.host.read_only_devices,
            mounts=self.host.mounts,
            filesystems=self.host.filesystems,
            paths=self.host.paths,
            probes=self.host.probes,
            tools=self.host.tools,
            settings=self.settings,
            records=self.records,
            reporter=self.reports,
        )
        return self.use

    def write_off(self, questions: Watchdog[Any], ask: Callable[[Deadline], object]) -> Job[Any]:
        """Ask about the volume, which hangs, until a thread was lost to it; return its job.

        On a busy machine a call may time out before a thread runs it: that one costs no thread.
        """
        while True:
            with contextlib.suppress(StorageUnavailable):
                ask(self.soon(self.settings.answer_margin_s + 0.02))
            call = questions._calls.get(NAME)
            if call is not None and call.job.is_lost:
                return call.job

    def soon(self, seconds: float = 60.0) -> Deadline:
        return Deadline.after(seconds, self.clock)

    def stage(
        self,
        *,
        volume_id: str = VOLUME_ID,
        staging: Path | str = STAGING,
        access: MountAccess | BlockAccess = EXT4,
        mode: AccessMode = WRITER,
        context: Mapping[str, str] | None = None,
        volume_context: Mapping[str, str] = EMPTY,
        secrets: Mapping[str, str] = EMPTY,
    ) -> None:
        given = publish_context() if context is None else context
        request = StageRequest(volume_id, str(staging), Capability(access, mode), given, volume_context, secrets)
        self.use.stage.stage(request, deadline=self.soon())

    def unstage(self, volume_id: str = VOLUME_ID, staging: Path | str = STAGING) -> None:
        self.use.stage.unstage(volume_id, str(staging), deadline=self.soon())

    def publish(
        self,
        target: Path | str = TARGET,
        *,
        volume_id: str = VOLUME_ID,
        staging: Path | str = STAGING,
        access: MountAccess | BlockAccess = EXT4,
        mode: AccessMode = WRITER,
        read_only: bool = False,
        context: Mapping[str, str] | None = None,
        volume_context: Mapping[str, str] = EMPTY,
    ) -> None:
        given = publish_context() if context is None else context
        capability = Capability(access, mode)
        request = NodePublishRequest(volume_id, str(staging), str(target), capability, read_only, given, volume_context)
        self.use.publish.publish(request, deadline=self.soon())

    def unpublish(self, target: Path | str = TARGET, volume_id: str = VOLUME_ID) -> None:
        self.use.publish.unpublish(volume_id, str(target), deadline=self.soon())

    def expand(
        self,
        path: Path | str = TARGET,
        *,
        required_bytes: int = 0,
        limit_bytes: int = 0,
        staging: Path | str = "",
        volume_id: str = VOLUME_ID,
        capability: Capability | None = None,
        secrets: Mapping[str, str] = EMPTY,
        seconds: float = 60.0,
    ) -> int:
        capacity = CapacityRange(required_bytes, limit_bytes)
        request = NodeExpandRequest(volume_id, str(path), capacity, str(staging), capability, secrets)
        return self.use.expand.expand(request, deadline=self.soon(seconds))

    def usage(self, path: Path | str = TARGET, volume_id: str = VOLUME_ID) -> Usage:
        return self.use.statistics.usage(volume_id, str(path), "", deadline=self.soon())


def publish_context(
    *,
    name: str = NAME,
    uuid: str = UUID,
    attachment: int = 1,
    history: History = History.FIRST,
    read_only: bool = False,
    size_bytes: int = 64 * MIB,
    format_allowed: bool = False,
    encryption: Encryption = Encryption.NONE,
    inherited: tuple[str, ...] | None = None,
    private_copy: bool = False,
    claim: Claim | None = None,
    nvme: NvmeExport | None = None,
) -> dict[str, str]:
    """Return the publish context; by default of a new volume in its first attachment.

    `inherited`: the volumes whose content it may have; None = it is no copy of one.
    """
    return PublishContext(
        name, uuid, attachment, history, read_only, size_bytes, encryption, format_allowed=format_allowed,
        populated=inherited is not None, inherited_uuids=inherited or (), private_copy=private_copy, claim=claim,
        nvme=nvme,
    ).as_map()  # fmt: skip
