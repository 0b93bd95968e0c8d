# SPDX-License-Identifier: Apache-2.0
"""Kubelet's plugin manager: watches a directory, calls GetInfo, dials the endpoint, and notifies the plugin.

Implements the protocol from its published description, byte by byte, and shares no code with the driver
(k8s.io/kubelet, pkg/apis/pluginregistration/v1; pkg/kubelet/pluginmanager of Kubernetes for the order of calls).
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from csi_driver.rpc.pb import csi_pb2, csi_pb2_grpc

_SERVICE = "/pluginregistration.Registration"
_OPTIONS = [("grpc.default_authority", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
_TIMEOUT_S = 120.0

Identity = tuple[int, int]


@dataclass(frozen=True)
class Plugin:
    """Answer of GetInfo."""

    type: str
    name: str
    endpoint: str
    versions: tuple[str, ...]


@dataclass
class Kubelet:
    """One kubelet. `visit` does what its watcher would have done by now; nothing happens by itself.

    `objection`: returns why it refuses a plugin; empty = it does not. `nodes`: driver name to node id, as it writes
    them to the CSINode. `told`: every verdict, in order.
    """

    directory: Path
    objection: Callable[[Plugin], str] = lambda plugin: ""
    nodes: dict[str, str] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    _seen: dict[Path, Identity] = field(default_factory=dict)
    _names: dict[Path, str] = field(default_factory=dict)

    def visit(self) -> Mapping[str, str]:
        """Scan the directory: forget removed plugins, register new ones. Returns the nodes by driver."""
        present = dict(self._sockets())
        for path, identity in list(self._seen.items()):
            if present.get(path) != identity:
                self._forget(path)
        for path, identity in present.items():
            if path not in self._seen:
                self._seen[path] = identity
                self._register(path)
        return self.nodes

    def retry(self) -> None:
        """Ask those again that it refused, as its reconciler does."""
        for path in self._seen:
            if path not in self._names:
                self._register(path)

    def restart(self) -> None:
        """Restart without memory, and scan the directory."""
        self._seen.clear()
        self._names.clear()
        self.nodes.clear()
        self.visit()

    def _sockets(self) -> Iterator[tuple[Path, Identity]]:
        for path in sorted(self.directory.iterdir()) if self.directory.is_dir() else ():
            if path.name.startswith("."):
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if stat.S_ISSOCK(status.st_mode):
                yield path, (status.st_dev, status.st_ino)

    def _forget(self, path: Path) -> None:
        del self._seen[path]
        name = self._names.pop(path, None)
        if name is not None:
            del self.nodes[name]

    def _register(self, path: Path) -> None:
        with grpc.insecure_channel(f"unix:{path}", options=_OPTIONS) as channel:
            plugin = _plugin(_call(channel, "GetInfo", b""))
            problem = self._problem_with(path, plugin)
            if problem:
                _call(channel, "NotifyRegistrationStatus", b"\x12" + _text(problem))
            else:
                _call(channel, "NotifyRegistrationStatus", b"\x08\x01")
                self._names[path] = plugin.name
        self.told.append(problem or "registered")

    def _problem_with(self, path: Path, plugin: Plugin) -> str:
        if plugin.type != "CSIPlugin":
            return f"there is no handler for plugins of type {plugin.type}"
        if not any(version.startswith("1.") for version in plugin.versions):
            return f"none of the versions {plugin.versions} is known"
        if any(name == plugin.name and other != path for other, name in self._names.items()):
            return f"{plugin.name} is already registered"
        if objection := self.objection(plugin):
            return objection
        try:
            with grpc.insecure_channel(f"unix:{plugin.endpoint}", options=_OPTIONS) as channel:
                info = csi_pb2_grpc.NodeStub(channel).NodeGetInfo(csi_pb2.NodeGetInfoRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            return f"error during CSI NodeGetInfo() call: {error}"
        self.nodes[plugin.name] = info.node_id
        return ""


def _call(channel: grpc.Channel, method: str, request: bytes) -> bytes:
    call = channel.unary_unary(f"{_SERVICE}/{method}", request_serializer=bytes, response_deserializer=bytes)
    return bytes(call(request, timeout=_TIMEOUT_S))


def _plugin(data: bytes) -> Plugin:
    found: dict[int, list[str]] = {}
    for number, text in _texts(data):
        found.setdefault(number, []).append(text)
    return Plugin(found[1][-1], found[2][-1], found[3][-1], tuple(found.get(4, ())))


def _texts(data: bytes) -> Iterator[tuple[int, str]]:
    """Read a message that has nothing but texts of less than 16 KiB: field number and value."""
    at = 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        assert tag & 7 == 2, f"field {tag >> 3} is no text"
        if length & 0x80:
            length, at = (length & 0x7F) | data[at] << 7, at + 1
        yield tag >> 3, data[at : at + length].decode()
        at += length


def _text(value: str) -> bytes:
    data = value.encode()
    length = bytes([len(data)]) if len(data) < 0x80 else bytes([len(data) & 0x7F | 0x80, len(data) >> 7])
    return length + data
