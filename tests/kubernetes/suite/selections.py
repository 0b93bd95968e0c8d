# SPDX-License-Identifier: Apache-2.0
"""Selections of the suite with their definitions of the driver, and omitted tests with the reason."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
_HEAVY = r"\[Disruptive\]|\[Serial\]"
_SLOW_OR_FEATURE = r"\[Slow\]|\[Feature:"


@dataclass(frozen=True, slots=True)
class Selection:
    """One run of the suite. `focus` and `skip` are regular expressions on the names of tests, as ginkgo takes them.

    `logs_in`: it has tests that log in to the node, to stop and start the kubelet.
    """

    name: str
    title: str
    definition: str
    focus: str
    skip: str
    side_by_side: bool = True
    logs_in: bool = False

    @property
    def definition_file(self) -> Path:
        return HERE / "definitions" / f"{self.definition}.yaml"


@dataclass(frozen=True, slots=True)
class NotRun:
    """Tests that are left out, and why. `definitions`: only of these, where some are named."""

    pattern: str
    reason: str
    definitions: frozenset[str] = frozenset()
    only_without_capability: int | None = None

    def meets(self, name: str, definition: str) -> bool:
        """Return whether a test of a definition is one of these."""
        return (not self.definitions or definition in self.definitions) and re.search(self.pattern, name) is not None


_CAP_SYS_RESOURCE = 24  # linux/capability.h

NOT_RUN = (
    NotRun(r"\[Feature:SELinux\]", "the node has no SELinux"),
    NotRun(
        "any volume data source",
        "it deploys images that cannot be built here: hello-populator and volume-data-source-validator; their "
        "sources the Go module proxy does not serve",
    ),
    NotRun(
        "multiple pods should modify volumes with a different volumeAttributesClass",
        "it changes claims that no pod uses yet, which are unbound with this binding mode; the selection `immediate` "
        "runs it",
        frozenset({"xfs", "shared-block"}),
    ),
    NotRun(
        "two volumes with different volume mode",
        "it makes a filesystem with the definition's access mode too, and no filesystem here survives several writing "
        "nodes: the driver refuses ReadWriteMany for filesystems",
        frozenset({"shared-block"}),
    ),
    NotRun(
        r"resize volume when PVC is edited while pod is using it|Generic Ephemeral.*should support expansion of pvcs",
        "a mounted ext4 grows only where the node has CAP_SYS_RESOURCE, which this machine withholds",
        frozenset({"ext4"}),
        _CAP_SYS_RESOURCE,
    ),
)

SELECTIONS = (
    Selection(
        "fast",
        "filesystem and block: fast tests",
        "xfs",
        "External.Storage",
        f"{_HEAVY}|{_SLOW_OR_FEATURE}",
    ),
    Selection(
        "slow",
        "filesystem and block: slow tests, features",
        "xfs",
        f"External.Storage.*({_SLOW_OR_FEATURE})",
        _HEAVY,
    ),
    Selection(
        "disruptive",
        "filesystem and block: serial and disruptive tests",
        "xfs",
        f"External.Storage.*({_HEAVY})",
        "$^",
        side_by_side=False,
        logs_in=True,
    ),
    Selection("ext4", "ext4", "ext4", r"External.Storage.*(\(default fs\)|\(filesystem volmode\))", _HEAVY),
    Selection("btrfs", "btrfs", "btrfs", r"External.Storage.*(\(default fs\)|\(filesystem volmode\))", _HEAVY),
    Selection(
        "shared-block",
        "raw block shared by writers (ReadWriteMany)",
        "shared-block",
        r"External.Storage.*\(block volmode\)",
        _HEAVY,
    ),
    Selection(
        "immediate",
        "immediate binding: VolumeAttributesClasses, ephemeral volumes",
        "immediate",
        r"External.Storage.*(volume-modify|\(immediate-binding\))",
        _HEAVY,
    ),
    Selection(
        "performance",
        "immediate binding: a hundred claims at once",
        "immediate",
        "External.Storage.*performance",
        "$^",
        side_by_side=False,
    ),
)
NAMES = tuple(selection.name for selection in SELECTIONS)


def named(name: str) -> Selection:
    """Return the selection of that name."""
    return next(selection for selection in SELECTIONS if selection.name == name)


def has_capability(number: int) -> bool:
    """Return whether processes of this machine may have a capability at all: it is in their bounding set."""
    status = Path("/proc/self/status").read_text()
    bounding = re.search(r"^CapBnd:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return bounding is not None and bool(int(bounding[1], 16) >> number & 1)


def left_out(definition: str) -> tuple[NotRun, ...]:
    """Return the tests omitted with that definition on this machine."""
    return tuple(
        entry
        for entry in NOT_RUN
        if (not entry.definitions or definition in entry.definitions)
        and (entry.only_without_capability is None or not has_capability(entry.only_without_capability))
    )
