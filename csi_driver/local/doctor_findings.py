"""What a look at the machine can find, and how it is told. Values and their text only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Check(StrEnum):
    """What is looked at, in the order in which it is told. docs/doctor.md has a section for each."""

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


class Gravity(StrEnum):
    """How much a finding matters, the gravest first. UNKNOWN: it could not be looked at."""

    FAULT = "fault"
    WARNING = "warning"
    UNKNOWN = "unknown"
    FINE = "fine"


@dataclass(frozen=True, slots=True)
class Finding:
    """What is; where that is not well, what was wanted and how to mend it."""

    check: Check
    gravity: Gravity
    what: str
    wanted: str = ""
    mend: str = ""


def fault(check: Check, what: str, wanted: str, mend: str) -> Finding:
    """Return what keeps this machine from work."""
    return Finding(check, Gravity.FAULT, what, wanted, mend)


def warning(check: Check, what: str, wanted: str, mend: str) -> Finding:
    """Return what limits this machine, or will keep it from work some day."""
    return Finding(check, Gravity.WARNING, what, wanted, mend)


def unknown(check: Check, what: str, mend: str = "") -> Finding:
    """Return what could not be looked at, and how it can be."""
    return Finding(check, Gravity.UNKNOWN, what, mend=mend)


def fine(check: Check, what: str) -> Finding:
    """Return what is well."""
    return Finding(check, Gravity.FINE, what)


# --- telling --------------------------------------------------------------------------------------------------

_GRAVITIES, _CHECKS = list(Gravity), list(Check)
NAMES = {Gravity.FAULT: "FAULT", Gravity.WARNING: "WARNING", Gravity.UNKNOWN: "unknown", Gravity.FINE: "ok"}
_INDENT = " " * 28


def by_gravity(findings: Sequence[Finding]) -> list[Finding]:
    """Sort findings: the gravest first, then as the checks stand."""
    return sorted(findings, key=lambda each: (_GRAVITIES.index(each.gravity), _CHECKS.index(each.check)))


def is_bad(findings: Sequence[Finding], *, strict: bool) -> bool:
    """Tell whether anything was found that keeps this machine from work; `strict`: or might some day."""
    bad = {Gravity.FAULT, Gravity.WARNING} if strict else {Gravity.FAULT}
    return any(finding.gravity in bad for finding in findings)


def table(title: str, findings: Sequence[Finding], took_s: float) -> Iterator[str]:
    """Yield the lines for people."""
    yield title
    yield ""
    for finding in by_gravity(findings):
        yield f"{NAMES[finding.gravity]:<8} {finding.check:<18} {_plain(finding.what)}"
        if finding.wanted:
            yield f"{_INDENT}wanted: {_plain(finding.wanted)}"
        if finding.mend:
            yield f"{_INDENT}mend:   {_plain(finding.mend)}"
    yield ""
    yield f"{_counted(findings)}; {took_s:.1f} s"


def _counted(findings: Sequence[Finding]) -> str:
    numbers = {gravity: sum(finding.gravity is gravity for finding in findings) for gravity in Gravity}
    faults, warnings = numbers[Gravity.FAULT], numbers[Gravity.WARNING]
    return (
        f"{faults} fault{'s' * (faults != 1)}, {warnings} warning{'s' * (warnings != 1)},"
        f" {numbers[Gravity.UNKNOWN]} not looked at, {numbers[Gravity.FINE]} well"
    )


def document(driver_name: str, node_name: str, findings: Sequence[Finding]) -> str:
    """Return all of it as JSON."""
    entries = [
        {key: str(value) for key, value in zip(_FIELDS, _values(finding), strict=True) if value}
        for finding in by_gravity(findings)
    ]
    return json.dumps({"driver": driver_name, "node": node_name, "findings": entries}, indent=2)


_FIELDS = ("check", "gravity", "what", "wanted", "mend")


def _values(finding: Finding) -> tuple[str, ...]:
    return finding.check, finding.gravity, finding.what, finding.wanted, finding.mend


def _plain(text: str) -> str:
    """Return the text without what a terminal would obey: some of it is not ours."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
