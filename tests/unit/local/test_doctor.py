"""Looks that hang, fail or have a bug cost nothing but themselves; findings are told the gravest first."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from csi_driver.config.commands import parse
from csi_driver.config.made import DoctorCommand
from csi_driver.deadline import Deadline
from csi_driver.errors import HostFailure
from csi_driver.host_model import RunningRole
from csi_driver.local import doctor
from csi_driver.local.doctor import Look, examine, looks
from csi_driver.local.doctor_findings import Check, Finding, Severity, document, fault, fine, is_bad, table, warning
from csi_driver.local.doctor_management import judge_clients
from csi_driver.local.doctor_settings import Patient
from csi_driver.storage_model import Client, ClientStatus


def patient(*flags: str, running: RunningRole | None = None) -> Patient:
    command = parse(["doctor", *flags], {}, lambda roles: running)
    assert isinstance(command, DoctorCommand)
    return command.settings.patient


def found(look: Look, seconds: float = 5.0) -> list[Finding]:
    return examine([(Check.ZONE, look), (Check.KERNEL, well)], patient(), Deadline.after(seconds))


def well(_: Patient) -> Iterator[Finding]:
    yield fine(Check.KERNEL, "well")


def test_what_hangs_is_named_and_what_it_said_before_is_told() -> None:
    released = threading.Event()

    def hangs(_: Patient) -> Iterator[Finding]:
        yield warning(Check.ZONE, "first", "w", "m")
        released.wait(30)
        yield fine(Check.ZONE, "late")

    findings = found(hangs, 0.1)
    released.set()
    assert [(each.check, each.severity) for each in findings] == [
        (Check.ZONE, Severity.WARNING), (Check.ZONE, Severity.SKIPPED), (Check.KERNEL, Severity.OK)
    ]  # fmt: skip
    assert "no result" in findings[1].found


@pytest.mark.parametrize("error", [HostFailure("/proc is not mounted"), PermissionError(13, "Permission denied")])
def test_what_cannot_be_looked_at_is_unknown(error: Exception) -> None:
    def fails(_: Patient) -> Iterator[Finding]:
        yield from ()
        raise error

    first, second = found(fails)
    assert (first.severity, second.found) == (Severity.SKIPPED, "well")
    assert str(error) in first.found


def test_a_bug_in_one_look_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    told = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: told.set())

    def has_a_bug(_: Patient) -> Iterator[Finding]:
        yield from ()
        raise KeyError("bug")

    first, second = found(has_a_bug)
    assert told.wait(120), "the traceback is printed as ever"
    assert "an error of this program" in first.found
    assert second.found == "well"


def test_findings_are_told_the_gravest_first_and_then_in_order() -> None:
    findings = [
        fine(Check.KERNEL, "k"), warning(Check.CLOCK, "c", "w", "m"), fault(Check.ZONE, "z\x1b[31m", "one", "say it"),
        fault(Check.TOOLS, "t", "w", "m"),
    ]  # fmt: skip
    lines = list(table("title", findings, 0.25))
    assert [line.split()[1] for line in lines if line[:1] in "EWO" and line] == ["tools", "zone", "clock", "kernel"]
    assert "\x1b" not in "".join(lines)
    assert lines[-1] == "2 errors, 1 warning, 0 skipped, 1 ok; 0.2 s"
    told = json.loads(document("d", "n", findings))
    assert (told["driver"], told["node"]) == ("d", "n")
    assert told["findings"][1] == {
        "check": "zone", "severity": "error", "found": "z\x1b[31m", "expected": "one", "fix": "say it"
    }  # fmt: skip
    assert told["findings"][3] == {"check": "kernel", "severity": "ok", "found": "k"}


@pytest.mark.parametrize(
    ("findings", "strict", "bad"),
    [
        ([fine(Check.KERNEL, "k")], True, False),
        ([warning(Check.KERNEL, "k", "w", "m")], False, False),
        ([warning(Check.KERNEL, "k", "w", "m")], True, True),
        ([fault(Check.KERNEL, "k", "w", "m"), fine(Check.KERNEL, "k")], False, True),
    ],
)
def test_faults_are_bad_and_warnings_where_that_is_asked_for(
    findings: Sequence[Finding], strict: bool, bad: bool
) -> None:
    assert is_bad(findings, strict=strict) is bad


def test_a_controller_is_looked_at_for_what_a_controller_needs() -> None:
    assert {check for check, _ in looks(doctor.CONTROLLER)} < {check for check, _ in looks(doctor.NODE)}
    assert Check.PROPAGATION not in {check for check, _ in looks(doctor.CONTROLLER)}
    flags = ("--endpoint=/c.sock", "--management-server=https://m:4000", "--management-password-file=/p", "--zone=z")
    running = RunningRole(7, "controller", (*flags, "--force-detach"), {})
    told = patient(running=running)
    assert (told.role, told.endpoint, told.management.servers) == ("controller", Path("/c.sock"), ("https://m:4000",))
    assert patient("--role=node", "--endpoint=/n", running=running).endpoint == Path("/n")


def test_clients_of_one_uuid_are_a_fault_and_those_without_one_are_not() -> None:
    def client(name: str, uuid: str) -> Client:
        return Client(name, uuid, ClientStatus.READY)

    rows = [client("a", "u1"), client("b", "u1"), client("c", ""), client("d", ""), client("e", "u2")]
    (shared,) = judge_clients(patient("--status-directory=/nowhere"), rows)
    assert shared.severity is Severity.ERROR
    assert "a, b have one uuid, u1" in shared.found
