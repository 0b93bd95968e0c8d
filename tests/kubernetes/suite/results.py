# SPDX-License-Identifier: Apache-2.0
"""Results of one run of the suite: read from ginkgo's own report, kept as a small file of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.kubernetes.suite.driver_log import Calls

PASSED = "passed"
SKIPPED = "skipped"
_PREFIX = "External Storage "


@dataclass(frozen=True, slots=True)
class Outcome:
    """One test and its result. `reason`: the message of the suite after a skip or failure."""

    name: str
    state: str
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Undefined:
    """A pattern for which a part of the suite defines no test with this driver, in its own words."""

    pattern: str
    suite: str
    reason: str


@dataclass(frozen=True, slots=True)
class Run:
    """Data of one run."""

    selection: str
    began: str
    seconds: float
    versions: Mapping[str, str]
    tests: Sequence[Outcome]
    filtered: Sequence[str]
    undefined: Sequence[Undefined] = ()
    calls: Calls = field(default_factory=Calls)

    def ended(self, *states: str) -> list[Outcome]:
        """Return the tests that ended so, by name."""
        return sorted((test for test in self.tests if test.state in states), key=lambda test: test.name)

    def failed(self) -> list[Outcome]:
        """Return the tests that ended in any other way than passed or skipped."""
        return sorted((t for t in self.tests if t.state not in (PASSED, SKIPPED)), key=lambda test: test.name)

    def save(self, path: Path) -> None:
        """Write the run to a file."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def load(path: Path) -> Run:
    """Read what `Run.save` wrote."""
    document = json.loads(path.read_text())
    tests = tuple(Outcome(**test) for test in document.pop("tests"))
    undefined = tuple(Undefined(**entry) for entry in document.pop("undefined"))
    return Run(tests=tests, undefined=undefined, calls=Calls.from_document(document.pop("calls")), **document)


def of_driver(report: Iterable[Mapping[str, Any]], driver: str) -> tuple[list[Outcome], list[str]]:
    """Return the tests of one driver in ginkgo's JSON report that were selected, and the names of those that were not.

    A test that skips itself has a reason; one outside of the selection has none.
    """
    tests: list[Outcome] = []
    filtered: list[str] = []
    for spec in (spec for suite in report for spec in suite["SpecReports"]):
        name = " ".join([*(spec["ContainerHierarchyTexts"] or ()), spec["LeafNodeText"]])
        if spec["LeafNodeType"] != "It" or not name.startswith(f"{_PREFIX}[Driver: {driver}]"):
            continue
        short = name.removeprefix(f"{_PREFIX}[Driver: {driver}] ")
        reason = (spec.get("Failure") or {}).get("Message", "")
        if spec["State"] == SKIPPED and not reason:
            filtered.append(short)
        else:
            tests.append(Outcome(short, spec["State"], reason, spec["RunTime"] / 1e9))
    return tests, filtered


def undefined(output: str, driver: str) -> list[Undefined]:
    """Return the patterns that the suite defines no tests for (with DEBUG_STORAGE_TESTSUITE set), each once."""
    found: dict[Undefined, None] = {}
    for line in output.splitlines():
        start, _, rest = line.partition("Skipping registration: [Testpattern: ")
        what, _, reason = rest.partition(f" [Driver: {driver}] - ")
        if start or not reason:
            continue
        pattern, _, suite = what.rpartition("] ")
        found.setdefault(Undefined(pattern, suite, reason.strip()))
    return list(found)
