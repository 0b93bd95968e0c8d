# SPDX-License-Identifier: Apache-2.0
"""The kernel's NVMe target over TCP: exports files by configfs (Documentation/nvme, drivers/nvme/target/configfs.c).

configfs holds all state and is read back. An export has TCP ports of its own: while it is not linked to them, a host
gets "connection refused", which it retries, while a port that serves other exports would refuse it for ever.

A host is cut off by its connections, because removing it from the allowed hosts stops only new ones. Without a link
no host can connect, and the kernel closes all connections; it releases a socket after the last request of its queue.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.errors import HostFailure, PreconditionFailed, SystemCallFailed
from csi_driver.host import sock_diag
from csi_driver.host.nvme_configfs import (
    Configfs,
    exports_of,
    hosts_of,
    load_module,
    namespace_of,
    port_of,
    subsystem_of,
)
from csi_driver.nvme_model import SUBSYSTEM_PREFIX, Connection, HostKeys, TargetExport, pool_prefix
from csi_driver.thread_pool import Job, Pool, SharedJobs

_DISABLED_AT_ONCE = 8
MOST_ADDRESSES = 8
PORT_STRIDE = 8192
"""The kernel's number of a port is its TCP port plus this for each preceding address: a range of ports is narrower."""
_PORTS = 1 << 16
_SERIAL_DIGITS = 20
_MODEL = "nvmesh-csi"
_ANY_HOST = "*"
_INLINE_BYTES = 65536
"""Writes up to this size reach the target with their command, without a further round trip. The kernel's default is
16 KiB."""
_PLACE = ("trtype", "adrfam", "traddr", "trsvcid")
_KEYS = ("dhchap_key", "dhchap_ctrl_key")


@dataclass(frozen=True, slots=True)
class _Place:
    """A port of the kernel's target."""

    number: str
    port: int
    address: str

    @property
    def is_ours(self) -> bool:
        return not self.port or (int(self.number) - self.port) % PORT_STRIDE == 0

    @property
    def position(self) -> int:
        """Place of its address among those of the export."""
        return (int(self.number) - self.port) % _PORTS // PORT_STRIDE


@dataclass(frozen=True, slots=True)
class NvmeTarget:
    """Methods as in `csi_driver.embedded.settings.NvmeTarget`."""

    files: Configfs = field(default_factory=Configfs)
    sockets: Callable[[Collection[int]], Mapping[int, tuple[Connection, ...]]] = sock_diag.connections
    drained_within_s: float = 30.0
    _shared: threading.Lock = field(default_factory=threading.Lock, init=False)
    """For hosts, which serve several exports, and for ports that are not linked yet or any more."""
    _pool: Pool = field(default_factory=lambda: Pool("nvme-disable", _DISABLED_AT_ONCE), init=False)
    _disabling: SharedJobs = field(default_factory=SharedJobs, init=False)

    def addresses(self) -> list[str]:
        return sock_diag.addresses()

    def why_not(self) -> str:
        module = "nvmet-tcp"
        try:
            self.files.prepare()
            if not self.files.is_writable():
                return f"{self.files.root} cannot be written: run as root, in a container as privileged"
            module = "tcp_diag"
            try:
                self.sockets((1,))
            except SystemCallFailed:
                load_module(module)
                self.sockets((1,))
        except HostFailure as problem:
            return f"the kernel's NVMe target cannot be used: {problem}; load its module on the host: modprobe {module}"
        return ""

    def exported(self, pool_uuid: str = "") -> tuple[TargetExport, ...]:
        prefix = pool_prefix(pool_uuid) if pool_uuid else SUBSYSTEM_PREFIX
        links = self._links()
        names = (name for name in self.files.names("subsystems") if name.startswith(prefix))
        found = (self._read(name, links.get(name, ())) for name in names)
        return tuple(export for export in found if export is not None)

    def elsewhere(self, exports: Collection[TargetExport]) -> Collection[TargetExport]:
        linked = {each.port: each for each in exports if each.is_linked}
        return [linked[port] for port in linked.keys() - self.files.listening(linked.keys())]

    def is_open(self, export: TargetExport) -> bool:
        return len(self._links_of(export)) == len(export.addresses)

    def connections(self, ports: Collection[int]) -> Mapping[int, tuple[Connection, ...]]:
        return self.sockets(ports)

    def grow(self, export: TargetExport) -> None:
        self.files.write(f"{namespace_of(export.nqn)}/revalidate_size", "1")

    def apply(self, export: TargetExport, keys: Mapping[str, HostKeys] = {}) -> TargetExport:
        self._await_disabled(export.nqn)
        found = self._read(export.nqn, self._links_of(export))
        if found == export and not any(self._lacks_keys(host, keys.get(host)) for host in export.hosts):
            return found
        self._refuse_other_content(found, export)
        if found is not None and not self._is_kept(found, export):
            self._cut(export, found)
        self._make_namespace(export)
        for host in sorted(export.hosts):
            self._allow(export.nqn, host, keys.get(host))
        if export.is_linked:
            self._open_ports(export)
        made = self._read(export.nqn, self._links_of(export))
        if made is None:
            raise HostFailure(f"export {export.nqn} was removed meanwhile by another program; retry")
        return made

    def withdraw(self, export: TargetExport) -> None:
        nqn, files = export.nqn, self.files
        self._await_disabled(nqn)
        self._close_ports(export)
        for number in _port_numbers(export.port) if export.port else self.files.names("ports"):
            self._remove_port(number)
        is_there = files.has(subsystem_of(nqn))
        for host in {*export.hosts, *(files.names(hosts_of(nqn)) if is_there else ())}:
            self._forbid(nqn, host)
        if not is_there:
            return
        if files.has(namespace_of(nqn)):
            self._disable(nqn)
            files.remove(namespace_of(nqn))
        files.remove(subsystem_of(nqn))

    def _read(self, nqn: str, linked: Iterable[str]) -> TargetExport | None:
        """Return an export as it is, half made or half removed too; None when there is no trace of it."""
        files = self.files
        if not files.has(subsystem_of(nqn)):
            return None
        places = sorted((self._place(number) for number in linked), key=lambda place: place.position)
        hosts = frozenset(files.names(hosts_of(nqn)))
        if files.read(f"{subsystem_of(nqn)}/attr_allow_any_host") == "1":
            hosts |= {_ANY_HOST}
        namespace, is_there = namespace_of(nqn), files.has(namespace_of(nqn))
        return TargetExport(
            nqn=nqn,
            uuid=files.read(f"{namespace}/device_uuid") if is_there else "",
            file=Path(files.read(f"{namespace}/device_path")) if is_there else Path(),
            port=places[0].port if places else 0,
            addresses=tuple(place.address for place in places),
            hosts=hosts,
            is_enabled=is_there and files.read(f"{namespace}/enable") == "1",
            is_linked=bool(places),
            group=int(files.read(f"{namespace}/ana_grpid")) if is_there else 1,
        )

    def _links_of(self, export: TargetExport) -> list[str]:
        """Return the kernel's numbers of the ports that the export is linked to, at any address."""
        return [number for number in _port_numbers(export.port) if self.files.has(f"{exports_of(number)}/{export.nqn}")]

    def _links(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for number in self.files.names("ports"):
            for nqn in self.files.names(exports_of(number)):
                found.setdefault(nqn, []).append(number)
        return found

    def _place(self, number: str) -> _Place:
        port = self.files.read(f"{port_of(number)}/addr_trsvcid")
        return _Place(number, int(port or 0), self.files.read(f"{port_of(number)}/addr_traddr"))

    @staticmethod
    def _refuse_other_content(found: TargetExport | None, export: TargetExport) -> None:
        """Never put another file under a device that hosts may have open."""
        if found is not None and found.is_enabled and (found.file, found.uuid) != (export.file, export.uuid):
            raise PreconditionFailed(
                f"{export.nqn}: expected an export of {export.file} as {export.uuid}, got {found.file} as {found.uuid};"
                " withdraw it first"
            )

    def _is_kept(self, found: TargetExport, export: TargetExport) -> bool:
        """Return whether no connection must be closed: it has the right links, and no other host."""
        return (
            found.is_linked
            and export.is_linked
            and found.is_enabled
            and export.is_enabled
            and found.hosts <= export.hosts
            and {(place.number, place.port, place.address) for place in map(self._place, self._links_of(export))}
            <= {(_port_number(export.port, at), export.port, each) for at, each in enumerate(export.addresses)}
        )

    def _cut(self, export: TargetExport, found: TargetExport) -> None:
        """Close all connections and wait until no I/O runs; then no host can connect."""
        self._close_ports(export)
        for host in found.hosts - export.hosts - {_ANY_HOST}:
            self._forbid(export.nqn, host)
        if not (export.is_enabled and found.hosts & export.hosts):
            self._disable(export.nqn)  # it waits for running I/O by itself; a host that stays would lose its device
        if export.is_enabled:
            self._await_closed(export)

    def _await_closed(self, export: TargetExport) -> None:
        """Wait until the connections are gone: they could go on in an enabled namespace."""
        running: list[str] = []

        def is_drained() -> bool:
            running[:] = [
                each.peer for found in self.sockets([export.port]).values() for each in found if each.is_owned
            ]
            return not running

        if not Deadline.after(self.drained_within_s).wait_until(is_drained):
            raise self._not_drained(export.nqn, f" of {', '.join(running)}")

    def _not_drained(self, nqn: str, of_hosts: str = "") -> HostFailure:
        about = f"export {nqn}: I/O{of_hosts} has not ended within {self.drained_within_s:g} s"
        return HostFailure(f"{about}; check the drive of the pool; retried")

    def _close_ports(self, export: TargetExport) -> None:
        for number in self._links_of(export):
            self.files.unlink(f"{exports_of(number)}/{export.nqn}")

    def _remove_port(self, number: str) -> None:
        """Remove a port that an export has left, unless another one uses it."""
        with self._shared:
            is_left = self.files.has(port_of(number)) and not self.files.names(exports_of(number))
            if is_left and self._place(number).is_ours:
                self.files.remove(port_of(number))

    def _forbid(self, nqn: str, host: str) -> None:
        link = f"{hosts_of(nqn)}/{host}"
        with self._shared:
            if self.files.has(link):
                self.files.unlink(link)
            if self.files.has(f"hosts/{host}"):
                with contextlib.suppress(SystemCallFailed):  # another export has it
                    self.files.remove(f"hosts/{host}")

    def _disable(self, nqn: str) -> None:
        if self.files.has(namespace_of(nqn)):
            work = partial(self._set, f"{namespace_of(nqn)}/enable", "0")
            self._await(nqn, self._disabling.start(self._pool, (nqn,), work))

    def _await_disabled(self, nqn: str) -> None:
        """Wait until the kernel has disabled a namespace: it shows it as disabled while I/O still runs."""
        for job in self._disabling.running(nqn):
            self._await(nqn, job)

    def _await(self, nqn: str, job: Job[None]) -> None:
        """A drive that does not answer must not delay other exports: only the first caller waits for it."""
        try:
            job.result(0 if job.is_lost else self.drained_within_s)
        except TimeoutError:
            self._pool.write_off(job)
            raise self._not_drained(nqn) from None

    def _set(self, path: str, text: str) -> None:
        if self.files.read(path) != text:
            self.files.write(path, text)

    def _make(self, path: str) -> None:
        if not self.files.has(path):
            self.files.make(path)

    def _make_namespace(self, export: TargetExport) -> None:
        subsystem, namespace = subsystem_of(export.nqn), namespace_of(export.nqn)
        self._make(subsystem)
        self._set(f"{subsystem}/attr_allow_any_host", "0")
        self._make(namespace)
        if self.files.read(f"{namespace}/enable") != "1":
            # The kernel refuses changes of serial number and model after the first connection.
            self._set(f"{subsystem}/attr_serial", export.uuid.replace("-", "")[:_SERIAL_DIGITS])
            self._set(f"{subsystem}/attr_model", _MODEL)
            self._set(f"{namespace}/device_path", str(export.file))
            self._set(f"{namespace}/device_uuid", export.uuid)
            self._set(f"{namespace}/device_nguid", export.uuid)
        self._set(f"{namespace}/ana_grpid", str(export.group))
        if export.is_enabled:
            self._set(f"{namespace}/enable", "1")

    def _allow(self, nqn: str, host: str, keys: HostKeys | None) -> None:
        with self._shared:
            self._make(f"hosts/{host}")
            if keys is not None and self._lacks_keys(host, keys):
                self._put_keys(host, keys)
            if not self.files.has(f"{hosts_of(nqn)}/{host}"):
                self.files.link(f"hosts/{host}", f"{hosts_of(nqn)}/{host}")

    def _lacks_keys(self, host: str, keys: HostKeys | None) -> bool:
        if keys is None:
            return False  # the kernel cannot forget a key, and a node that has one goes on to use it
        known = (f"hosts/{host}/{name}" for name in _KEYS)
        return [self.files.read(path) if self.files.has(path) else "" for path in known] != [keys.host, keys.controller]

    def _put_keys(self, host: str, keys: HostKeys) -> None:
        for name, key in zip(_KEYS, (keys.host, keys.controller), strict=True):
            path = f"hosts/{host}/{name}"
            if not self.files.has(path):
                raise HostFailure("the kernel's NVMe target has no authentication: use Linux 6.12, or --auth=off")
            self.files.protect(path)
            if key:
                self._set(path, key)

    def _open_ports(self, export: TargetExport) -> None:
        """Open the port at each address. An address that this machine does not have now closes no other."""
        missing = []
        for position, address in enumerate(export.addresses):
            try:
                self._open_port(export, position, address)
            except SystemCallFailed as failure:
                if failure.errno != errno.EADDRNOTAVAIL:
                    raise
                missing.append(failure)
        if len(missing) == len(export.addresses):
            raise missing[0]

    def _open_port(self, export: TargetExport, position: int, address: str) -> None:
        number = _port_number(export.port, position)
        link = f"{exports_of(number)}/{export.nqn}"
        if self.files.has(link):
            return
        family = f"ipv{ipaddress.ip_address(address).version}"
        with self._shared:
            self._make(port_of(number))
            if others := self.files.names(exports_of(number)):
                why = f"it is that of the export {others[0]}; use another range of ports"
                raise SystemCallFailed(f"open port {export.port} at {address}", errno.EADDRINUSE, why)
            for name, value in zip(_PLACE, ("tcp", family, address, str(export.port)), strict=True):
                self._set(f"{port_of(number)}/addr_{name}", value)
            inline = f"{port_of(number)}/param_inline_data_size"
            if self.files.has(inline):
                self._set(inline, str(_INLINE_BYTES))
            self.files.link(subsystem_of(export.nqn), link)


def _port_numbers(port: int) -> list[str]:
    return [_port_number(port, position) for position in range(MOST_ADDRESSES)]


def _port_number(port: int, position: int) -> str:
    return str((port + position * PORT_STRIDE) % _PORTS)
