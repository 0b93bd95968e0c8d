# SPDX-License-Identifier: Apache-2.0
"""Write the tables of documents that follow from the code: flags, values of the chart, options of mkfs.

The text between `<!-- table: NAME -->` and `<!-- end of table -->` is generated from the program and values.yaml; the
rest is written by hand. `make docs` runs it; a test compares the document with its output.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from csi_driver.config import COMMANDS, command_class
from csi_driver.config.command import flags_of
from csi_driver.flags import Flag, read_boolean
from csi_driver.local.doctor_checks import checks
from csi_driver.parameters.mkfs import ALLOWED
from tests.tools.chart_schema import OWN_VALUES, value_name

ROOT = Path(__file__).parents[2]
DOCUMENTS = tuple(ROOT / "docs" / name for name in ("parameters.md", "mkfs.md", "doctor.md"))
VALUES = ROOT / "deploy" / "helm" / "nvmesh-csi-driver" / "values.yaml"

_BLOCK = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def fresh(text: str) -> str:
    """Return the document with every table as it should be."""
    return _BLOCK.sub(lambda block: f"{block[1]}{_table(block[2])}{block[3]}", text)


def _table(name: str) -> str:
    kind, _, of = name.partition(" ")
    return "".join(f"{line}\n" for line in _KINDS[kind](of))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_cell(text) for text in cells)} |"


def _cell(text: str) -> str:
    """Return text for a cell: separators and tags are escaped."""
    spans = re.split(r"(`[^`]*`)", text.replace("|", r"\|"))
    return "".join(span if span.startswith("`") else span.replace("<", "&lt;") for span in spans)


# --- flags ------------------------------------------------------------------------------------------------------


def _flags(command: str) -> Iterator[str]:
    """Yield the table of a command's flags; a command outside the chart leaves out flags of the commands above."""
    in_chart = command in OWN_VALUES
    above = {} if in_chart else _flags_above(command)
    flags = flags_of(command_class(command))
    yield _row(["flag", "default", "environment", *(["value of the chart"] * in_chart), "description"])
    yield "|---|---|---|---|" + "---|" * in_chart
    for flag in flags.values():
        if flag.describe() == above.get(flag.name):
            continue
        if flag.is_positional:
            yield _row([f"`{flag.name}`", flag.shown_default or "required", "", flag.explain()])
            continue
        name = f"`{flag.name}`" if flag.read is read_boolean else f"`{flag.name} {flag.read.metavar}`"
        value = [_chart_value(command, flag)] if in_chart else []
        yield _row([name, flag.shown_default or "required", f"`{flag.variable}`", *value, flag.explain()])

    same = [f"`{name}`" for name, flag in flags.items() if flag.describe() == above.get(name)]
    if same:
        yield from ("", *textwrap.wrap(f"As above: {', '.join(same)}.", 100, break_on_hyphens=False))


def _flags_above(command: str) -> dict[str, str]:
    """Return the help of the flags of all commands that the document shows before this one."""
    found: dict[str, str] = {}
    for name in itertools.takewhile(lambda name: name != command, COMMANDS):
        found |= {each.name: each.describe() for each in flags_of(command_class(name)).values()}
    return found


def _chart_value(role: str, flag: Flag[object]) -> str:
    own = OWN_VALUES[role].get(flag.name, f"{role}.flags.{value_name(flag)}")
    return re.sub(r"[\w.]*\w\.\w[\w.]*|^\w+$|\b\w+(?= and )", r"`\g<0>`", own)


def _commands(_: str) -> Iterator[str]:
    yield _row(["command", "description"])
    yield "|---|---|"
    yield from (_row([f"`nvmesh-csi {name}`", purpose]) for name, purpose in COMMANDS.items())


def _doctor(_: str) -> Iterator[str]:
    yield _row(["check", "why it matters", "expected", "fix"])
    yield "|---|---|---|---|"
    yield from (_row([f"`{check.name}`", check.why, check.expected, check.fix]) for check in checks())


# --- values of the chart ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChartValue:
    """One value: its path, its default as in values.yaml, and the comment above it."""

    path: str
    default: str
    says: str


_USUAL = {
    "affinity": "As in a pod.",
    "annotations": "Annotations of the object.",
    "defaultFsType": "Filesystem where neither class nor claim says one.",
    "enabled": "Whether it is there.",
    "extraArgs": "More arguments of the sidecar.",
    "extraEnv": "More environment of the driver's container, as in a pod.",
    "httpPort": "Port of /metrics and of the check of the lease; 0: none.",
    "image": "Image of the sidecar.",
    "nodeSelector": "As in a pod.",
    "podAnnotations": "Annotations of the pods.",
    "podLabels": "Labels of the pods.",
    "priorityClassName": "As in a pod.",
    "pullPolicy": "As in a pod.",
    "replicas": "How many of them.",
    "repository": "Name of the image, without tag.",
    "resources": "As in a container.",
    "retryIntervalMaxSeconds": "Longest pause before a call that failed is made again.",
    "retryIntervalStartSeconds": "First pause before a call that failed is made again; doubled each time.",
    "serviceAccount": "Whether the chart makes one, its name, its annotations.",
    "terminationGracePeriodSeconds": "As in a pod.",
    "timeoutSeconds": "Seconds for one call.",
    "tolerations": "As in a pod.",
    "updateStrategy": "As in the workload.",
    "workerThreads": "Calls at the same time.",
}
"""Descriptions of common values without a comment in values.yaml."""
_WHOLE = {"resources", "updateStrategy"}
"""Values shown as one row: Kubernetes objects."""
_AS_ABOVE = "See the line above."


def chart_values() -> list[ChartValue]:
    """Return every value, in the order of values.yaml."""
    text = VALUES.read_text()
    return list(_values_below(yaml.compose(text), "", text.splitlines()))


def _values_below(node: yaml.Node | None, path: str, lines: list[str]) -> Iterator[ChartValue]:
    assert isinstance(node, yaml.MappingNode)
    is_said_above = False
    for key, value in node.value:
        inner = f"{path}.{key.value}" if path else str(key.value)
        comment = _comment_above(lines, key.start_mark.line)
        follows = bool(lines[key.start_mark.line - 1].strip()) and is_said_above
        says = comment or _USUAL.get(key.value, "") or _AS_ABOVE * follows
        is_section = _is_section(value, lines) and key.value not in _WHOLE
        is_said_above = bool(comment) or follows
        if not is_section:
            yield ChartValue(inner, _written(value), says)
            continue
        is_said_above = False
        if comment:
            yield ChartValue(inner, "", comment)
        yield from _values_below(value, inner, lines)


def _is_section(node: yaml.Node, lines: list[str]) -> bool:
    """Return whether the values below have their own comments; otherwise the comment above applies to all."""
    return (
        isinstance(node, yaml.MappingNode)
        and not node.flow_style
        and any(_comment_above(lines, key.start_mark.line) or _is_section(value, lines) for key, value in node.value)
    )


def _comment_above(lines: list[str], number: int) -> str:
    """Return the comment that ends right above a line, as one text; indented lines in it are an example, left out."""
    block: list[str] = []
    while number > 0 and lines[number - 1].lstrip().startswith("#"):
        number -= 1
        block.insert(0, lines[number].strip().removeprefix("#"))
    is_heading = any(line.strip().startswith("---") for line in block)
    return "" if is_heading else " ".join(line.strip() for line in block if not line.startswith("   ")).strip()


def _written(node: yaml.Node) -> str:
    """Return a default as it would be written on one line."""
    plain = yaml.safe_load(yaml.serialize(node))
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=10_000).strip()
    return f"`{text.removesuffix('...').strip()}`"


def _values(_: str) -> Iterator[str]:
    yield _row(["value", "default", "description"])
    yield "|---|---|---|"
    yield from (_row([f"`{each.path}`", each.default, each.says]) for each in chart_values())


# --- options of mkfs --------------------------------------------------------------------------------------------


def _mkfs(fs_type: str) -> Iterator[str]:
    yield _row([f"option of mkfs.{fs_type}", "value"])
    yield "|---|---|"
    yield from (_row([f"`{flag}`", value.says if value else "none"]) for flag, value in ALLOWED[fs_type].items())


_KINDS: dict[str, Callable[[str], Iterator[str]]] = {
    "flags": _flags, "commands": _commands, "values": _values, "mkfs": _mkfs, "doctor": _doctor,
}  # fmt: skip


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(fresh(document.read_text()))
