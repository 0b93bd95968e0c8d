# SPDX-License-Identifier: Apache-2.0
"""Exports are held until the end of a cut, and let go whatever happens. The kernel's target is a directory here."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import NotFreezable
from csi_driver.host.freeze import Freezer

NAMES = ("nqn.a", "nqn.b")
LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Machine:
    pool: Path
    target: Path

    def group_file(self, name: str) -> Path:
        return self.target / "subsystems" / name / "namespaces/1/ana_grpid"

    def export(self, name: str) -> None:
        self.group_file(name).parent.mkdir(parents=True)
        self.group_file(name).write_text("1\n")

    def groups(self) -> list[str]:
        return [self.group_file(name).read_text().strip() for name in NAMES]

    def freezer(self) -> Freezer:
        return Freezer(self.pool, target=self.target)

    def records(self) -> list[Path]:
        return list(self.pool.glob("*frozen*"))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path / "pool", tmp_path / "target")
    made.pool.mkdir()
    for name in NAMES:
        made.export(name)
    return made


def test_exports_are_held_until_the_end_and_no_longer(machine: Machine) -> None:
    with machine.freezer().held([], NAMES, limit_s=LIMIT_S) as end:
        assert machine.groups() == ["127", "127"]
        end()
        assert machine.groups() == ["1", "1"]
    assert machine.records() == []


def test_exports_are_let_go_after_an_exception(machine: Machine) -> None:
    with pytest.raises(ZeroDivisionError), machine.freezer().held([], NAMES, limit_s=LIMIT_S):
        raise ZeroDivisionError
    assert machine.groups() == ["1", "1"]
    assert machine.records() == []


def test_exports_are_let_go_when_their_time_is_up_and_the_copies_are_not_used(machine: Machine) -> None:
    with machine.freezer().held([], NAMES, limit_s=0.5) as end:
        assert Deadline.after(30).wait_until(lambda: machine.groups() == ["1", "1"])
        with pytest.raises(NotFreezable, match=r"more than 0\.5 s"):
            end()
    assert machine.records() == []


def test_exports_have_a_limit_of_their_own(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi_driver.host.freeze._EXPORT_LIMIT_S", 0.5)
    with machine.freezer().held([], NAMES, limit_s=600.0) as end:
        assert Deadline.after(60).wait_until(lambda: machine.groups() == ["1", "1"])
        with pytest.raises(NotFreezable):
            end()


def test_an_export_that_another_program_lets_go_refuses_the_copies(machine: Machine) -> None:
    with machine.freezer().held([], NAMES, limit_s=LIMIT_S) as end:
        machine.group_file("nqn.b").write_text("1\n")
        with pytest.raises(NotFreezable, match=r"nqn\.b"):
            end()
    assert machine.groups() == ["1", "1"]


def test_an_export_that_cannot_be_held_refuses_the_copies(machine: Machine) -> None:
    machine.group_file("nqn.b").unlink()
    machine.group_file("nqn.b").mkdir()
    refused = pytest.raises(NotFreezable, match="cannot be frozen")
    with refused, machine.freezer().held([], NAMES, limit_s=LIMIT_S):
        pass
    assert machine.group_file("nqn.a").read_text() == "1"


def test_an_export_that_ends_meanwhile_refuses_the_copies_and_holds_up_no_other(machine: Machine) -> None:
    with machine.freezer().held([], NAMES, limit_s=LIMIT_S) as end:
        machine.group_file("nqn.a").unlink()
        machine.group_file("nqn.a").parent.rmdir()
        with pytest.raises(NotFreezable):
            end()
    assert machine.group_file("nqn.b").read_text() == "1"
    assert machine.records() == []


def test_an_export_without_a_namespace_is_none(machine: Machine) -> None:
    with machine.freezer().held([], ["nqn.c"], limit_s=LIMIT_S) as end:
        end()


HOLD = """
import sys
from pathlib import Path
from csi_driver.host.freeze import Freezer
with Freezer(Path(sys.argv[1]), target=Path(sys.argv[2])).held([], sys.argv[3:], limit_s=600.0):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holding(machine: Machine) -> Iterator[subprocess.Popen[bytes]]:
    """Hold the exports in a process of its own."""
    argv = [sys.executable, "-c", HOLD, str(machine.pool), str(machine.target), *NAMES]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process


def guard_of(parent: int) -> int:
    (child,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(child)


def test_exports_are_let_go_when_the_manager_is_killed(machine: Machine) -> None:
    with holding(machine) as manager:
        manager.kill()
    assert Deadline.after(30).wait_until(lambda: machine.groups() == ["1", "1"])
    assert Deadline.after(30).wait_until(machine.freezer().recover)
    assert machine.records() == []


def test_exports_are_let_go_at_once_when_the_guard_is_killed(machine: Machine) -> None:
    with machine.freezer().held([], NAMES, limit_s=LIMIT_S) as end:
        os.kill(guard_of(os.getpid()), signal.SIGKILL)
        with pytest.raises(NotFreezable):
            end()
        assert machine.groups() == ["127", "127"]
    assert machine.groups() == ["1", "1"]
    assert machine.records() == []


def test_a_start_lets_go_what_was_held_when_manager_and_guard_were_killed(machine: Machine) -> None:
    with holding(machine) as manager:
        guard = guard_of(manager.pid)
        os.kill(manager.pid, signal.SIGSTOP)  # so that it cannot see the guard's end
        os.kill(guard, signal.SIGKILL)
        manager.kill()
    assert machine.groups() == ["127", "127"]
    assert Deadline.after(30).wait_until(machine.freezer().recover)
    assert machine.groups() == ["1", "1"]
    assert machine.records() == []
