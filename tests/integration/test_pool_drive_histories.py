# SPDX-License-Identifier: Apache-2.0
"""Drives of a pool that were used elsewhere, exchanged, or written to, between two steps or starts of the manager."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable

import pytest

from csi_driver.__main__ import FAILED, main
from csi_driver.host import zero_scan
from csi_driver.host.filesystem import LinuxFilesystems
from csi_driver.local.pool_drive import LEAST_BYTES
from tests.contract.host_machine import shell
from tests.integration.real_node import clear, everything, write
from tests.integration.test_pool_drive import Killed, Machine, machine, mkfs

__all__ = ["machine"]
pytestmark = pytest.mark.root


def killed_after_mkfs(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> str:
    """Format the drive, and end before the record says "in use"; return the uuid."""
    make = LinuxFilesystems.make

    def made(*args: object, **more: object) -> None:
        make(*args, **more)  # type: ignore[arg-type]
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(LinuxFilesystems, "make", made)
        with pytest.raises(Killed):
            machine.named().mount()
    return machine.record().volume_uuid


def test_a_filesystem_that_is_complete_is_never_made_again(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine, which has no record, has used the drive since a format that ended here."""
    identity = killed_after_mkfs(machine, monkeypatch)
    elsewhere = machine.host.place("elsewhere")
    shell("mount", str(machine.drive.loop.node), str(elsewhere))
    (elsewhere / "file").write_text("data")
    shell("umount", str(elsewhere))
    machine.named().mount()
    assert (machine.pool / "file").read_text() == "data"
    assert machine.assert_is_pool() == identity


def test_no_two_drives_get_the_uuid_of_one_format(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first one, which is empty, could take the place of the second."""
    first = killed_after_mkfs(machine, monkeypatch)
    machine.connect("second")
    machine.named("second").mount()
    (machine.pool / "file").write_text("data")
    machine.unmount()
    machine.refuses(f"holds xfs with the uuid {first}.*expected the pool {machine.record().volume_uuid}")
    machine.named("second").mount()
    assert (machine.pool / "file").read_text() == "data"


def test_data_that_comes_while_a_drive_is_read_is_kept(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    first_data: Callable[..., int | None] = zero_scan.first_data
    for at in (0, 4096, LEAST_BYTES - 4096):

        def read(*args: object, at: int = at, **more: object) -> int | None:
            found = first_data(*args, **more)
            write(machine.drive, at, b"precious")
            return found

        with monkeypatch.context() as patch:
            patch.setattr(zero_scan, "first_data", read)
            with pytest.raises(Exception, match="nothing recognises; expected a blank drive"):
                machine.named().mount()
        assert everything(machine.drive)
        assert not machine.records().recorded()
        clear(machine.drive)


def test_sigterm_ends_the_reading_of_a_drive(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a container, whose process 1 gets no signal that it does not handle."""

    def read(*args: object, **more: object) -> int | None:
        assert callable(signal.getsignal(signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)
        return None

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(zero_scan, "first_data", read)
        with pytest.raises(SystemExit):
            machine.named().mount()
    assert signal.getsignal(signal.SIGTERM) == before
    assert not everything(machine.drive)
    machine.named().mount()
    machine.assert_is_pool()


def test_a_drive_is_not_known_by_the_uuid_of_its_content(machine: Machine) -> None:
    """A copy of a pool, e.g. a snapshot of its logical volume, has the same uuid: the name may mean either."""
    identity = str(uuid.uuid4())
    shell(*mkfs(identity, machine.drive.loop.node))
    path = machine.dev / "disk/by-uuid" / identity
    path.parent.mkdir()
    path.symlink_to(machine.drive.loop.node or "")
    machine.refuses("a name that means the same drive after a reboot", machine.named(path=path))


def test_the_directory_of_a_drive_is_no_pool_without_it(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """As after an upgrade that lost --drive."""
    machine.use(str(uuid.uuid4()))
    here = machine.host.directory
    argv = ["storage", "--pool", str(machine.pool), "--listen", "127.0.0.1:0"]
    argv += ["--device-directory", str(here / "d"), "--status-directory", str(here / "s")]
    (machine.pool / "volumes").write_text("")  # ends a manager that does not refuse
    assert main(argv) == FAILED
    assert "set --drive" in capsys.readouterr().err
