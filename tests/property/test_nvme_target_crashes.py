# SPDX-License-Identifier: Apache-2.0
"""An end of the manager at any step of a change of an export: the next call finishes it, and no host gets too much."""

from __future__ import annotations

import itertools
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from csi_driver.host.nvme_target import NvmeTarget
from csi_driver.nvme_model import HostKeys, TargetExport, host_nqn, subsystem_nqn
from tests.fakes.nvme_kernel import NvmeKernel

ONE, OTHER = (host_nqn(name) for name in ("node-1", "node-2"))
POOL, VOLUME = str(uuid.uuid4()), str(uuid.uuid4())
KEYS = {host: HostKeys("DHHC-1:00:a:", "DHHC-1:00:b:") for host in (ONE, OTHER)}
ADDRESSES = ("127.0.0.1", "::1")
STATES = (None, (), (ONE,), (OTHER,), (ONE, OTHER))
"""Hosts of an export; None: there is none."""


class Killed(BaseException):
    pass


@dataclass
class Machine:
    file: Path
    kernel: NvmeKernel = field(default_factory=NvmeKernel)
    may: tuple[frozenset[str], ...] = ()
    """Which hosts may be able to connect at the same time now."""
    left: int | None = None
    """Changes until the manager is killed."""

    def __post_init__(self) -> None:
        self.nqn = subsystem_nqn(POOL, VOLUME, "1")
        self.kernel.before_change = self.look

    def export(self, hosts: tuple[str, ...]) -> TargetExport:
        return TargetExport(self.nqn, VOLUME, self.file, 23001, ADDRESSES, frozenset(hosts), is_enabled=bool(hosts))

    def look(self, change: str) -> None:
        if any(self.nqn in port.subsystems for port in self.kernel.ports.values()):
            allowed = self.kernel.subsystems[self.nqn].allowed_hosts
            assert any(allowed <= hosts for hosts in self.may), f"before {change}"
            namespace = self.kernel.namespace(self.nqn)
            assert namespace is not None, f"before {change}"
            assert namespace.is_enabled or not allowed, f"before {change}"
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed

    def change(self, state: tuple[str, ...] | None) -> None:
        """By a manager that has just started."""
        target = NvmeTarget(self.kernel.configfs, self.kernel.connections)
        self.may = (*self.may, frozenset(state or ()))
        if state is None:
            target.withdraw(self.export((ONE, OTHER)))
            assert target.exported(POOL) == ()
            assert {*self.kernel.hosts, *self.kernel.ports, *self.kernel.subsystems} == set()
        else:
            export = self.export(state)
            made = target.apply(export, KEYS)
            assert made == export
        self.may = (frozenset(state or ()),)
        hosts = set(state or ())
        assert {each.host for each in self.kernel.controllers} <= hosts
        assert not any(each.running for each in self.kernel.closing if each.host not in hosts)

    def use(self) -> None:
        """All hosts that can connect do, with requests that are running."""
        for number, host in itertools.product(sorted(self.kernel.ports), (ONE, OTHER)):
            port = self.kernel.ports[number]
            if host in self.kernel.subsystems[self.nqn].allowed_hosts and port.subsystems:
                made = self.kernel.connect(self.nqn, host, *port.place, key="DHHC-1:00:a:")
                made.running = 2


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("after", STATES)
def test_an_end_at_any_step_is_repaired_by_any_next_change(
    tmp_path: Path, before: tuple[str, ...] | None, after: tuple[str, ...] | None
) -> None:
    file = tmp_path / "volume"
    file.write_bytes(bytes(1 << 16))
    for step, last in itertools.product(range(100), STATES):
        machine = Machine(file)
        machine.change(before)
        machine.use()
        machine.left = step
        try:
            machine.change(after)
        except Killed:
            machine.left = None
            machine.use()
            machine.change(last)
            machine.change(last)
        else:
            assert step > 0 or before == after
            return
    pytest.fail("no step was the last one")


def test_a_second_address_is_added_without_a_cut_and_one_that_is_gone_is_closed(tmp_path: Path) -> None:
    file = tmp_path / "volume"
    file.write_bytes(bytes(1 << 16))
    machine = Machine(file)
    target = NvmeTarget(machine.kernel.configfs, machine.kernel.connections)
    machine.may = (frozenset({ONE}),)
    export = machine.export((ONE,))
    target.apply(replace(export, addresses=ADDRESSES[:1]))
    controller = machine.kernel.connect(export.nqn, ONE, "127.0.0.1", export.port)
    assert target.apply(export) == export
    assert controller.is_live
    assert target.apply(replace(export, addresses=ADDRESSES[:1])) == replace(export, addresses=ADDRESSES[:1])
    assert machine.kernel.ports.keys() >= {"23001"}
