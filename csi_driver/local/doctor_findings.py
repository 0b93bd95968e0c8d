"""Findings of the doctor's checks, and how they are printed. Values and their text only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Check(StrEnum):
    """The checks, in the order in which they are printed. docs/doctor.md has a section for each."""

    KERNEL = "kernel"
    TOOLS = "tools"
    MODULES = "modules"
    CAPABILITIES = "capabilities"
    CONFINEMENT = "confinement"
    DEVICE_NODES = "device-nodes"
    PATH_ROOTS = "path-roots"
    PROPAGATION = "propagation"
    STATE_DIRECTORY = "state-directory"
    CLIENT = "client"
    DEVICE_DIRECTORY = "device-directory"
    NAMES = "names"
    ZONE = "zone"
    CLIENT_MANAGEMENT = "client-management"
    DESCRIPTION = "description"
    MANAGEMENT = "management"
    CERTIFICATE = "certificate"
    LOGIN = "login"
    CLIENTS = "clients"
    DRIVER = "driver"
    SOCKETS = "sockets"
    API_SERVER = "api-server"
    NODE_OBJECT = "node-object"
    REGISTRATION = "registration"
    VOLUMES = "volumes"
    MARKS = "marks"
    LOOP_DEVICES = "loop-devices"
    HOST_IDENTITY = "host-identity"
    CLOCK = "clock"


class Severity(StrEnum):
    """How much a finding matters, the worst first. SKIPPED: the check could not be made."""

    ERROR = "error"
    WARNING = "warning"
    SKIPPED = "skipped"
    OK = "ok"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found; for a problem also what was expected, and how to fix it."""

    check: Check
    severity: Severity
    found: str
    expected: str = ""
    fix: str = ""


def fault(check: Check, found: str, expected: str, fix: str) -> Finding:
    """Return an error: volumes cannot be used on this machine."""
    return Finding(check, Severity.ERROR, found, expected, fix)


def warning(check: Check, found: str, expected: str, fix: str) -> Finding:
    """Return a warning: some volumes cannot be used, or all of them will not be some day."""
    return Finding(check, Severity.WARNING, found, expected, fix)


def unknown(check: Check, found: str, fix: str = "") -> Finding:
    """Return a check that could not be made, and how it can be."""
    return Finding(check, Severity.SKIPPED, found, fix=fix)


def fine(check: Check, found: str) -> Finding:
    """Return a check that passed."""
    return Finding(check, Severity.OK, found)


# --- printing -------------------------------------------------------------------------------------------------

_SEVERITIES, _CHECKS = list(Severity), list(Check)
_INDENT = " " * 28


def by_severity(findings: Sequence[Finding]) -> list[Finding]:
    """Sort findings: the worst first, then in the order of the checks."""
    return sorted(findings, key=lambda each: (_SEVERITIES.index(each.severity), _CHECKS.index(each.check)))


def is_bad(findings: Sequence[Finding], *, strict: bool) -> bool:
    """Tell whether there is an error; with `strict` also whether there is a warning."""
    bad = {Severity.ERROR, Severity.WARNING} if strict else {Severity.ERROR}
    return any(finding.severity in bad for finding in findings)


def table(title: str, findings: Sequence[Finding], took_s: float) -> Iterator[str]:
    """Yield the lines for people."""
    yield title
    yield ""
    for finding in by_severity(findings):
        yield f"{finding.severity.upper():<8} {finding.check:<18} {_plain(finding.found)}"
        if finding.expected:
            yield f"{_INDENT}expected: {_plain(finding.expected)}"
        if finding.fix:
            yield f"{_INDENT}fix:      {_plain(finding.fix)}"
    yield ""
    yield f"{_counted(findings)}; {took_s:.1f} s"


def _counted(findings: Sequence[Finding]) -> str:
    numbers = {severity: sum(finding.severity is severity for finding in findings) for severity in Severity}
    errors, warnings = numbers[Severity.ERROR], numbers[Severity.WARNING]
    return (
        f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)},"
        f" {numbers[Severity.SKIPPED]} skipped, {numbers[Severity.OK]} ok"
    )


def document(driver_name: str, node_name: str, findings: Sequence[Finding]) -> str:
    """Return all of it as JSON."""
    entries = [
        {key: str(value) for key, value in zip(_FIELDS, _values(finding), strict=True) if value}
        for finding in by_severity(findings)
    ]
    return json.dumps({"driver": driver_name, "node": node_name, "findings": entries}, indent=2)


_FIELDS = ("check", "severity", "found", "expected", "fix")


def _values(finding: Finding) -> tuple[str, ...]:
    return finding.check, finding.severity, finding.found, finding.expected, finding.fix


def _plain(text: str) -> str:
    """Return the text without what a terminal would obey: some of it is not ours."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
