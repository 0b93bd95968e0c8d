# SPDX-License-Identifier: Apache-2.0
"""`nvmesh-csi doctor`: checks this machine and the services that the driver needs; prints each problem with its fix.

It changes nothing. Checks run side by side; one that hangs delays no other and is reported as skipped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Self

from csi_driver.background import run_detached
from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, one_line
from csi_driver.flags import choice, flag, host_name, read_boolean, read_file, read_positive_duration, section
from csi_driver.host_model import RunningRole
from csi_driver.management.settings import TLS_VERIFY, ClusterDefaults, ManagementSettings
from csi_driver.model import DEFAULT_ZONE
from csi_driver.node_settings import STATE_DIRECTORY, NodeObjectSettings, NodePaths, state_directory
from csi_driver.settings import DRIVER_NAME, ENDPOINT, EXPORT_PORTS, NODE_NAME, ApiSettings

NODE, CONTROLLER, STORAGE = "node", "controller", "storage"
_API_TIMEOUT_S = 4.0
_INDENT = " " * 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The machine or pod to check, as its driver's flags describe it. Times in seconds."""

    as_json: bool = flag(False, "--json", read_boolean, "Print the results as JSON.")
    bundle: Path | None = flag(
        None,
        "--bundle",
        read_file,
        "Also write a support bundle (tar.gz): the results, versions, pages and logs, without secrets.",
        shown="none",
    )
    scan: bool = flag(
        False,
        "--scan",
        read_boolean,
        "Make no check: search standard input for the secrets of the roles that run here. Exit status: 1 when one is"
        " found.",
    )
    strict: bool = flag(False, "--strict", read_boolean, "Exit with status 1 for warnings, too.")
    timeout_s: float = flag(10.0, "--timeout", read_positive_duration, "Time limit of all checks together.")
    encrypted_volumes: bool = flag(
        False, "--encrypted-volumes", read_boolean, "Check the requirements of encrypted volumes on this node."
    )
    role: str = flag(
        NODE,
        "--role",
        choice(NODE, CONTROLLER, STORAGE),
        "Role that is checked.",
        shown="node, or the role that runs here",
    )
    endpoint: Path | None = ENDPOINT.with_default(None, "that of the role that runs here")
    driver_name: str = DRIVER_NAME.field()
    node_name: str = NODE_NAME.field()
    state_directory: Path = STATE_DIRECTORY.field()
    paths: NodePaths = section(NodePaths)
    export_ports: tuple[int, int] = EXPORT_PORTS.field()
    management: ManagementSettings = section(ManagementSettings)
    tls_verify: bool | None = TLS_VERIFY.with_default(None, TLS_VERIFY.shown_default)
    node_object: NodeObjectSettings = section(NodeObjectSettings)
    api: ApiSettings = section(ApiSettings)
    """Without a host where no flag and no pod gives one."""
    running: RunningRole | None = None
    """The process of the role that runs here, if it is known."""

    def resolved(self) -> Self:
        """Fill in defaults that depend on the machine and on other flags."""
        return replace(
            self,
            node_name=self.node_name or host_name(),
            state_directory=state_directory(self.state_directory, self.driver_name),
            api=replace(self.api, timeout_s=_API_TIMEOUT_S),
        )

    @property
    def defaults(self) -> ClusterDefaults:
        return ClusterDefaults(self.management, self.paths.zone or DEFAULT_ZONE, self.tls_verify is not None)


class Severity(StrEnum):
    """ERROR: no volume can be used. WARNING: some cannot, or will not be some day. SKIPPED: not checked."""

    ERROR = "error"
    WARNING = "warning"
    SKIPPED = "skipped"
    OK = "ok"


@dataclass(frozen=True, slots=True)
class Finding:
    """A result of a check, named where its function makes several. A problem takes absent texts from its check."""

    severity: Severity
    found: str
    expected: str = ""
    fix: str = ""
    check: str = ""


error = partial(Finding, Severity.ERROR)
warning = partial(Finding, Severity.WARNING)
skipped = partial(Finding, Severity.SKIPPED)
ok = partial(Finding, Severity.OK)

Find = Callable[[Target], Iterator[Finding]]


@dataclass(frozen=True, slots=True)
class Check:
    """A check: name, function (of several checks, perhaps), why it matters, expectation, fix. See docs/doctor.md."""

    name: str
    find: Find
    why: str
    expected: str
    fix: str


def run_doctor(
    target: Target,
    chosen: Sequence[Check],
    write: Callable[[str], None] = print,
    roles: Callable[[], Sequence[RunningRole]] = tuple,
) -> int:
    """`roles`: returns the processes of all roles that run here."""
    from csi_driver.local import doctor_bundle

    if target.scan:
        found = doctor_bundle.scan(sys.stdin.buffer.read(), roles())
        write(json.dumps({"found": found}))
        return int(bool(found))
    deadline = Deadline.after(target.timeout_s)
    findings = examine(chosen, target, deadline)
    if target.as_json:
        write(document(target, findings))
    else:
        for line in table(target, findings, deadline.elapsed_s()):
            write(line)
    if target.bundle is not None:
        write(doctor_bundle.make(target.bundle, document(target, findings), roles()))
    failing = (Severity.ERROR, Severity.WARNING) if target.strict else (Severity.ERROR,)
    return int(any(finding.severity in failing for finding in findings))


def examine(chosen: Sequence[Check], target: Target, deadline: Deadline) -> list[Finding]:
    """Run checks until the deadline; return their findings, the worst first, then in the order of the checks."""
    by_name = {check.name: check for check in chosen}
    first = {check.find: check.name for check in reversed(chosen)}
    findings = [
        _completed(by_name[finding.check or name], finding)
        for name, finding in collect({name: partial(find, target) for find, name in first.items()}, deadline)
    ]
    severities, names = list(Severity), list(by_name)
    return sorted(findings, key=lambda each: (severities.index(each.severity), names.index(each.check)))


def _completed(check: Check, finding: Finding) -> Finding:
    if finding.severity in (Severity.OK, Severity.SKIPPED):
        return replace(finding, check=check.name)
    return replace(finding, check=check.name, expected=finding.expected or check.expected, fix=finding.fix or check.fix)


def collect(jobs: Mapping[str, Callable[[], Iterator[Finding]]], deadline: Deadline) -> Iterator[tuple[str, Finding]]:
    """Run each job in a thread; yield its name with every finding that it made before the deadline."""
    runs: list[tuple[str, list[Finding], Future[None]]] = []
    for name, job in jobs.items():
        found: list[Finding] = []
        runs.append((name, found, run_detached(f"doctor-{name}", partial(_collect, job, found))))
    for name, found, done in runs:
        last = _wait(name, done, deadline)
        yield from ((name, finding) for finding in [*found, *last] or [ok("no problem found")])


def _collect(job: Callable[[], Iterator[Finding]], found: list[Finding]) -> None:
    for finding in job():
        found.append(finding)  # noqa: PERF402  # findings before a hang are printed


def _wait(name: str, done: Future[None], deadline: Deadline) -> list[Finding]:
    try:
        failure = done.exception(deadline.remaining_s())
    except TimeoutError:
        found = f"{name}: no result within {deadline.elapsed_s():.0f} s"
        return [skipped(found, fix="find out what hangs, or raise --timeout")]
    if failure is None:
        return []
    if isinstance(failure, (DriverError, OSError)):
        return [skipped(f"{name}: {failure}")]
    return [skipped(f"{name}: internal error; see the traceback")]


def table(target: Target, findings: Sequence[Finding], took_s: float) -> Iterator[str]:
    """Yield the lines for people. Control characters are escaped: some of the text comes from other programs."""
    where = f"node {target.node_name}" if target.role == NODE else target.role
    running = target.running
    yield f"driver {target.driver_name}, {where}" + (
        f", with the settings of process {running.pid} ({running.role})" if running is not None else ""
    )
    yield ""
    for finding in findings:
        yield f"{finding.severity.upper():<8} {finding.check:<18} {one_line(finding.found)}"
        if finding.expected:
            yield f"{_INDENT}expected: {one_line(finding.expected)}"
        if finding.fix:
            yield f"{_INDENT}fix:      {one_line(finding.fix)}"
    yield ""
    numbers = {severity: sum(finding.severity is severity for finding in findings) for severity in Severity}
    plural = {severity: "" if number == 1 else "s" for severity, number in numbers.items()}
    errors, warnings = (f"{numbers[each]} {each}{plural[each]}" for each in (Severity.ERROR, Severity.WARNING))
    yield f"{errors}, {warnings}, {numbers[Severity.SKIPPED]} skipped, {numbers[Severity.OK]} ok; {took_s:.1f} s"


def document(target: Target, findings: Sequence[Finding]) -> str:
    keys = ("check", "severity", "found", "expected", "fix")
    entries = [{key: value for key in keys if (value := getattr(each, key))} for each in findings]
    return json.dumps({"driver": target.driver_name, "node": target.node_name, "findings": entries}, indent=2)
