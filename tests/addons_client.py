# SPDX-License-Identifier: Apache-2.0
"""A client that calls as the sidecar of CSI-Addons does: the same order, deadline and fields.

Source: github.com/csi-addons/kubernetes-csi-addons v0.14.0, sidecar/main.go, sidecar/internal/client/client.go,
internal/sidecar/service/reclaimspace.go and encryptionkeyrotation.go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import grpc

from csi_driver.rpc.client import CallFailed
from csi_driver.rpc.pb import csi_pb2, encryptionkeyrotation_pb2_grpc, identity_pb2_grpc, reclaimspace_pb2_grpc
from csi_driver.rpc.pb import encryptionkeyrotation_pb2 as key_pb
from csi_driver.rpc.pb import identity_pb2 as id_pb
from csi_driver.rpc.pb import reclaimspace_pb2 as space_pb

TIMEOUT_S = 180.0

Request = TypeVar("Request")
Response = TypeVar("Response")


class Sidecar:
    """`kubelet`: the directory with its plugins. `mode`: the access mode that the PersistentVolume's have together."""

    def __init__(self, channel: grpc.Channel, kubelet: Path, mode: int) -> None:
        self._kubelet = kubelet
        self._mode = csi_pb2.VolumeCapability.AccessMode(mode=csi_pb2.VolumeCapability.AccessMode.Mode.Name(mode))
        self._identity = identity_pb2_grpc.IdentityStub(channel)
        self._controller = reclaimspace_pb2_grpc.ReclaimSpaceControllerStub(channel)
        self._node = reclaimspace_pb2_grpc.ReclaimSpaceNodeStub(channel)
        self._keys = encryptionkeyrotation_pb2_grpc.EncryptionKeyRotationControllerStub(channel)

    def _call(self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request) -> Response:
        try:
            return method(request, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            name = type(request).__name__.removesuffix("Request")
            raise CallFailed(name, error.code().name, error.details() or "") from error

    def start(self) -> tuple[str, set[str]]:
        """Probe, ask for the name and the capabilities; return these two."""
        probed = self._call(self._identity.Probe, id_pb.ProbeRequest())
        assert probed.ready.value or not probed.HasField("ready")
        name = self._call(self._identity.GetIdentity, id_pb.GetIdentityRequest()).name
        answer = self._call(self._identity.GetCapabilities, id_pb.GetCapabilitiesRequest())
        return name, {_word(each) for each in answer.capabilities}

    def trim(self, driver: str, volume_id: str, secrets: Mapping[str, str] | None = None) -> None:
        """NodeReclaimSpace for a filesystem: with the path where kubelet stages it, and no volume path."""
        unique = hashlib.sha256(volume_id.encode()).hexdigest()
        path = self._kubelet / "plugins/kubernetes.io/csi" / driver / unique / "globalmount"
        self._trim(volume_id, path, csi_pb2.VolumeCapability(mount=csi_pb2.VolumeCapability.MountVolume()), secrets)

    def trim_block(self, volume_id: str, volume: str) -> None:
        """The same for a raw block volume, by the name of its PersistentVolume."""
        path = self._kubelet / "plugins/kubernetes.io/csi/volumeDevices/staging" / volume
        self._trim(volume_id, path, csi_pb2.VolumeCapability(block=csi_pb2.VolumeCapability.BlockVolume()), None)

    def _trim(
        self, volume_id: str, path: Path, access: csi_pb2.VolumeCapability, secrets: Mapping[str, str] | None
    ) -> None:
        access.access_mode.CopyFrom(self._mode)
        request = space_pb.NodeReclaimSpaceRequest(
            volume_id=volume_id,
            volume_path="",
            staging_target_path=str(path),
            volume_capability=access,
            secrets=secrets,
        )
        answer = self._call(self._node.NodeReclaimSpace, request)
        assert not answer.HasField("pre_usage")
        assert not answer.HasField("post_usage")

    def sparsify(self, volume_id: str, context: Mapping[str, str]) -> tuple[int, int]:
        """ControllerReclaimSpace; return the usage before and after."""
        request = space_pb.ControllerReclaimSpaceRequest(volume_id=volume_id, parameters=context)
        answer = self._call(self._controller.ControllerReclaimSpace, request)
        return answer.pre_usage.usage_bytes, answer.post_usage.usage_bytes

    def rotate(self, volume_id: str, context: Mapping[str, str], secrets: Mapping[str, str]) -> None:
        """EncryptionKeyRotate: with an access mode, but without an access type."""
        request = key_pb.EncryptionKeyRotateRequest(
            volume_id=volume_id,
            parameters=context,
            secrets=secrets,
            volume_capability=csi_pb2.VolumeCapability(access_mode=self._mode),
        )
        self._call(self._keys.EncryptionKeyRotate, request)


def _word(capability: id_pb.Capability) -> str:
    kind = capability.WhichOneof("type")
    assert kind is not None
    chosen = getattr(capability, kind)
    return str(type(chosen).Type.Name(chosen.type))


@contextmanager
def sidecar(
    socket: Path, *, kubelet: Path = Path("/var/lib/kubelet"),
    mode: int = csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_MULTI_WRITER,
) -> Iterator[Sidecar]:  # fmt: skip
    """Connect to an endpoint of CSI-Addons."""
    options = [("grpc.default_authority", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
        yield Sidecar(channel, kubelet, mode)
