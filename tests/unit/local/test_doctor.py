# SPDX-License-Identifier: Apache-2.0
"""A check that hangs or fails affects no other check; findings are printed the worst first."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from csi_driver.config import parse
from csi_driver.config.local_commands import DoctorCommand
from csi_driver.deadline import Deadline
from csi_driver.errors import HostFailure
from csi_driver.host_model import RunningRole
from csi_driver.local.doctor import (
    CONTROLLER,
    NODE,
    STORAGE,
    Check,
    Find,
    Finding,
    Severity,
    Target,
    error,
    examine,
    ok,
    run_doctor,
    warning,
)
from csi_driver.local.doctor_checks import check_clients, checks
from csi_driver.storage_model import Client, ClientStatus


def target(*flags: str, running: RunningRole | None = None) -> Target:
    command = parse(["doctor", *flags], {}, lambda roles: running)
    assert isinstance(command, DoctorCommand)
    return command.target


def check(name: str, find: Find) -> Check:
    return Check(name, find, "why", "expected", "fix")


def examined(seconds: float = 5.0, **finds: Find) -> list[Finding]:
    return examine([check(name, find) for name, find in finds.items()], target(), Deadline.after(seconds))


def passes(_: Target) -> Iterator[Finding]:
    yield ok("fine")


def test_a_check_that_hangs_is_skipped_and_its_earlier_findings_are_kept() -> None:
    released = threading.Event()

    def hangs(_: Target) -> Iterator[Finding]:
        yield warning("first")
        released.wait(30)
        yield ok("late")

    findings = examined(0.1, zone=hangs, kernel=passes)
    released.set()
    assert [(each.check, each.severity) for each in findings] == [
        ("zone", Severity.WARNING), ("zone", Severity.SKIPPED), ("kernel", Severity.OK)
    ]  # fmt: skip
    assert "no result" in findings[1].found


@pytest.mark.parametrize("failure", [HostFailure("/proc is not mounted"), PermissionError(13, "Permission denied")])
def test_a_check_that_cannot_be_made_is_skipped(failure: Exception) -> None:
    def fails(_: Target) -> Iterator[Finding]:
        yield from ()
        raise failure

    first, second = examined(zone=fails, kernel=passes)
    assert (first.severity, second.found) == (Severity.SKIPPED, "fine")
    assert str(failure) in first.found


def test_an_unexpected_exception_is_logged_and_skips_its_check_alone(caplog: pytest.LogCaptureFixture) -> None:
    def has_a_bug(_: Target) -> Iterator[Finding]:
        yield from ()
        raise KeyError("bug")

    first, second = examined(zone=has_a_bug, kernel=passes)
    assert (first.severity, second.found) == (Severity.SKIPPED, "fine")
    (record,) = caplog.records
    assert (record.levelno, record.exc_info is not None) == (logging.ERROR, True)


def test_a_problem_gets_the_expectation_and_the_fix_of_its_check_where_it_has_none() -> None:
    def fails(_: Target) -> Iterator[Finding]:
        yield error("one")
        yield error("two", "more", "do this")

    findings = examined(zone=fails)
    assert [(each.expected, each.fix) for each in findings] == [("expected", "fix"), ("more", "do this")]


def test_a_check_without_findings_passes() -> None:
    (finding,) = examined(zone=lambda _: iter(()))
    assert (finding.severity, finding.found) == (Severity.OK, "no problem found")


def test_a_function_that_makes_several_checks_runs_once() -> None:
    def both(_: Target) -> Iterator[Finding]:
        yield ok("one")
        yield ok("two", check="login")

    assert [(each.check, each.found) for each in examined(management=both, login=both)] == [
        ("management", "one"), ("login", "two")
    ]  # fmt: skip


def kernel(_: Target) -> Iterator[Finding]:
    yield ok("k")


def clock(_: Target) -> Iterator[Finding]:
    yield warning("c")


def zone(_: Target) -> Iterator[Finding]:
    yield error("z\x1b[31m")


def tools(_: Target) -> Iterator[Finding]:
    yield error("t")


def printed(*flags: str, **finds: Find) -> tuple[int, str]:
    """Run the doctor with these checks."""
    lines: list[str] = []
    status = run_doctor(target(*flags), [check(name, find) for name, find in finds.items()], lines.append)
    return status, "\n".join(lines)


ALL: Mapping[str, Find] = {"kernel": kernel, "tools": tools, "zone": zone, "clock": clock}


def test_findings_are_printed_the_worst_first_and_then_in_the_order_of_the_checks() -> None:
    _, text = printed(**ALL)
    lines = text.split("\n")
    assert [line.split()[1] for line in lines if line[:1] in "EWO" and line] == ["tools", "zone", "clock", "kernel"]
    assert "\x1b" not in text
    assert lines[-1].startswith("2 errors, 1 warning, 0 skipped, 1 ok; ")


def test_json_has_a_finding_for_each_line() -> None:
    _, text = printed("--json", "--driver-name=d", "--node-name=n", **ALL)
    report = json.loads(text)
    assert (report["driver"], report["node"]) == ("d", "n")
    assert report["findings"][1] == {
        "check": "zone", "severity": "error", "found": "z\x1b[31m", "expected": "expected", "fix": "fix"
    }  # fmt: skip
    assert report["findings"][3] == {"check": "kernel", "severity": "ok", "found": "k"}


@pytest.mark.parametrize(
    ("find", "flags", "status"),
    [(kernel, ["--strict"], 0), (clock, [], 0), (clock, ["--strict"], 1), (tools, [], 1)],
)
def test_errors_fail_and_warnings_fail_with_strict(find: Find, flags: list[str], status: int) -> None:
    assert printed(*flags, it=find)[0] == status


def test_a_storage_manager_is_checked_for_what_it_needs_itself() -> None:
    names = {check.name for check in checks(STORAGE)}
    assert {"nvme-exports", "privileges", "clock"} <= names
    assert not names & {"client", "registration", "management", "nvme-paths"}


@pytest.mark.parametrize(
    ("running", "role"),
    [
        (["storage"], STORAGE),
        (["node"], NODE),
        (["node", "storage"], NODE),
        (["node", "controller", "storage"], None),
        ([], None),
    ],
)
def test_a_machine_with_several_roles_is_checked_as_a_node(running: list[str], role: str | None) -> None:
    def find(roles: Sequence[str]) -> RunningRole | None:
        found = [each for each in running if each in roles]
        return RunningRole(1, found[0], (), {}) if len(found) == 1 else None

    command = parse(["doctor"], {}, find)
    assert isinstance(command, DoctorCommand)
    assert command.target.role == (role or NODE)
    assert (command.target.running is None) is (role is None)


def test_a_controller_is_checked_for_the_needs_of_a_controller() -> None:
    names = {check.name for check in checks(CONTROLLER)}
    assert names < {check.name for check in checks(NODE)}
    assert {"driver", "login"} <= names
    assert "propagation" not in names


def test_the_flags_of_the_running_role_are_used_unless_others_are_given() -> None:
    flags = ("--endpoint=/c.sock", "--management-server=https://m:4000", "--management-password-file=/p", "--zone=z")
    running = RunningRole(7, "controller", (*flags, "--force-detach"), {})
    found = target(running=running)
    assert (found.role, found.endpoint) == ("controller", Path("/c.sock"))
    assert found.defaults.management.servers == ("https://m:4000",)
    assert target("--role=node", "--endpoint=/n", running=running).endpoint == Path("/n")


def test_clients_with_one_uuid_are_an_error_and_clients_without_a_uuid_are_not() -> None:
    def client(name: str, uuid: str) -> Client:
        return Client(name, uuid, ClientStatus.READY)

    rows = [client("a", "u1"), client("b", "u1"), client("c", ""), client("d", ""), client("e", "u2")]
    (shared,) = check_clients(target("--status-directory=/nowhere"), rows)
    assert shared.severity is Severity.ERROR
    assert "a, b have one uuid, u1" in shared.found
