"""Health, from the driver's nouns to messages of CSI."""

from __future__ import annotations

from collections.abc import Iterable

from csi_driver.health import StorageEntry, VolumeHealth
from csi_driver.rpc.pb import csi_pb2
from csi_driver.rpc.wire import cut


def volume_to(health: VolumeHealth) -> csi_pb2.VolumeHealth:
    """Write what is wrong with a volume, under the id that was asked for."""
    return csi_pb2.VolumeHealth(
        volume_id=health.volume_id,
        health_statuses=[
            csi_pb2.VolumeHealth.VolumeHealthEntry(
                status=entry.status.value,
                reason=entry.reason,
                message=cut(entry.message),
            )
            for entry in health.entries
        ],
    )


def storage_to(entries: Iterable[StorageEntry]) -> csi_pb2.NodeGetStorageHealthResponse:
    """Write what is wrong with a node's way to the storage."""
    return csi_pb2.NodeGetStorageHealthResponse(
        backend_health=[
            csi_pb2.NodeGetStorageHealthResponse.StorageBackendHealth(
                status=entry.status.value,
                reason=entry.reason,
                message=cut(entry.message),
            )
            for entry in entries
        ]
    )
