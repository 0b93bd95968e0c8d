# SPDX-License-Identifier: Apache-2.0
"""The command line of `kubectl nvmesh`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from csi_driver import driver_version
from csi_driver.errors import DriverError, InvalidRequest, PreconditionFailed, one_line
from csi_driver.plugin import acting, volumes
from csi_driver.plugin.diagnoses import diagnose
from csi_driver.plugin.kubectl import Kubectl
from csi_driver.plugin.lost_nodes import plan, show
from csi_driver.plugin.support import MOST_PODS, Support, lines
from csi_driver.plugin.why import Reader, document, story

OK, FOUND, UNKNOWN = 0, 1, 2
_EXIT_STATUS = "exit status: 0 nothing is wrong, 1 something is, 2 unknown, or the command line is wrong"


def main(argv: Sequence[str] | None = None, version: str = "") -> int:
    """Run the plugin and return its exit status. `version`: of the one-file build, which has no metadata."""
    version = version or driver_version()
    arguments = _parser(version).parse_args(argv)
    if arguments.command == "version":
        print(version)
        return OK
    kubectl = Kubectl([option for option in (_option(arguments, name) for name in _GLOBAL) if option])
    try:
        status: int = arguments.run(kubectl, arguments)
    except DriverError as error:
        _warn(str(error))
        return UNKNOWN
    except (KeyboardInterrupt, BrokenPipeError):
        return UNKNOWN
    return status


def _say(*lines: str) -> None:
    """Print lines, in which names and texts of others may have anything, without what controls a terminal."""
    for line in lines:
        print(one_line(line, _LINE))


def _warn(text: str) -> None:
    print(f"kubectl nvmesh: {one_line(text)}", file=sys.stderr)


_LINE = 1 << 20
_KINDS = {"pvc": "pvc", "persistentvolumeclaim": "pvc", "pod": "pod", "po": "pod"}
_GLOBAL = ("context", "kubeconfig")


def _option(arguments: argparse.Namespace, name: str) -> str:
    value = getattr(arguments, name)
    return f"--{name}={value}" if value else ""


def _parser(version: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kubectl nvmesh", description="Look at volumes of the NVMesh CSI driver.", epilog=_EXIT_STATUS
    )
    for name in _GLOBAL:
        parser.add_argument(f"--{name}", help=f"As of kubectl: --{name}.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("version", help="Print the version of this plugin.")
    listing = commands.add_parser("volumes", help="List claims with pod, node, attachment, health and size.")
    listing.add_argument("-n", "--namespace", default="", help="Only claims of this namespace. Default: all.")
    listing.add_argument("-o", "--output", choices=("table", "wide", "json"), default="table")
    listing.add_argument("--tree", action="store_true", help="Show snapshots and copies below their volumes.")
    listing.set_defaults(run=_volumes)
    asking = commands.add_parser("why", help="Say the first thing that is wrong with a claim or pod, and what to do.")
    asking.add_argument("name", metavar="CLAIM|POD", help="A claim, else a pod; pod/NAME or pvc/NAME tells them apart.")
    asking.add_argument("-n", "--namespace", default="", help="Default: that of the context.")
    asking.add_argument("-o", "--output", choices=("text", "json"), default="text")
    asking.set_defaults(run=_why)
    checking = commands.add_parser("doctor", help="Show the doctor's findings in the driver's pods; write a bundle.")
    checking.add_argument("--bundle", metavar="FILE", help="Write a support bundle (tar.gz) without secrets.")
    checking.add_argument(
        "--unsearched", action="store_true", help="Write it even if pods that do not run cannot search it for secrets."
    )
    checking.add_argument("--nodes", type=int, default=MOST_PODS, help="Nodes to look at, unready ones first.")
    checking.set_defaults(run=_doctor, version=version)
    _add_actions(commands)
    tree = commands.add_parser("snapshots", help="Show volumes with their snapshots and copies.")
    tree.set_defaults(run=_volumes, namespace="", output="table", tree=True)
    return parser


def _add_actions(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    holding = commands.add_parser("holders", help="Show who holds a volume: storage, Kubernetes, mounts, processes.")
    holding.add_argument("-o", "--output", choices=("text", "json"), default="text")
    holding.set_defaults(run=_holders)
    allowing = commands.add_parser("allow-format", help="Allow the next attachment to format over old data, once.")
    allowing.add_argument("--yes", action="store_true", help="Do not ask.")
    allowing.set_defaults(run=_allow_format)
    releasing = commands.add_parser("release", help="Release a volume of a lost node, if the node is lost.")
    releasing.add_argument("--node", required=True, help="Name of the lost node.")
    releasing.add_argument("--yes", action="store_true", help="Do it. Without it the commands are shown only.")
    releasing.set_defaults(run=_release)
    for each in (holding, allowing, releasing):
        each.add_argument("name", metavar="CLAIM|PV|HANDLE")
        each.add_argument("-n", "--namespace", default="", help="Of the claim. Default: that of the context.")


def _doctor(kubectl: Kubectl, arguments: argparse.Namespace) -> int:
    support = Support(kubectl, arguments.nodes)
    driver, pods = support.pods()
    found = list(support.findings(driver, pods))
    _say(*list(lines(found)) or [f"no problem found in {len(pods)} pods"])
    if arguments.bundle:
        support.collect(driver, pods, arguments.version)
        _say(support.write(Path(arguments.bundle), driver, unsearched=arguments.unsearched))
    return FOUND if any(each["severity"] == "error" for _, each in found) else OK


def _target(kubectl: Kubectl, arguments: argparse.Namespace) -> acting.Target:
    return acting.Target.find(kubectl, arguments.name, arguments.namespace or kubectl.namespace())


def _holders(kubectl: Kubectl, arguments: argparse.Namespace) -> int:
    found = acting.holders(_target(kubectl, arguments))
    print(json.dumps(found, indent=2)) if arguments.output == "json" else _say(*acting.describe(found))
    return UNKNOWN if any("error" in each for each in found["nodes"].values()) else OK


def _allow_format(kubectl: Kubectl, arguments: argparse.Namespace) -> int:
    target = _target(kubectl, arguments)
    _say(*acting.loss(target, target.driver.volume("show", target.handle)))
    if not arguments.yes and _typed(f"Type the name {arguments.name} to allow it: ") != arguments.name:
        _say("nothing was changed")
        return FOUND
    done = target.driver.volume("allow-format", target.handle)
    _say(str(done.get("done") or f"kubectl nvmesh: {done['error']}"))
    return OK if "done" in done else FOUND


def _typed(question: str) -> str:
    try:
        return input(question)
    except EOFError:
        return ""


def _release(kubectl: Kubectl, arguments: argparse.Namespace) -> int:
    found = plan(_target(kubectl, arguments).facts(arguments.node))
    _say(*show(found))
    if not found.commands:
        return OK if found.is_done else FOUND
    if not arguments.yes:
        _say("nothing was changed: --yes does it")
        return OK
    if plan(_target(kubectl, arguments).facts(arguments.node)) != found:
        raise PreconditionFailed("the state has changed meanwhile; try again")
    for command in found.commands:
        print(kubectl.text(*command), end="")
    return OK


def _volumes(kubectl: Kubectl, arguments: argparse.Namespace) -> int:
    objects, driver, storage = volumes.read(kubectl, arguments.namespace)
    if "error" in storage:
        _warn(str(storage["error"]))
        return UNKNOWN
    found = list(volumes.rows(objects, driver.name(), storage))
    if arguments.namespace:
        found = [row for row in found if row.namespace == arguments.namespace]
    silent = [f"zone {each['zone']}: {each['error']}" for each in storage["zones"] if each["error"]]
    if arguments.tree:
        lines = list(volumes.Tree(found, storage).lines())
    elif arguments.output == "json":
        document = {"zones": storage["zones"], "volumes": [row.document() for row in found]}
        lines = json.dumps(document, indent=2).splitlines()
    else:
        heads = volumes.WIDE if arguments.output == "wide" else volumes.COLUMNS
        has_notes = arguments.output == "table" and any(row.note for row in found)
        heads = (*heads, "NOTE") if has_notes else heads
        cells = [row.cells() for row in found]
        shown = [(*line[: len(volumes.COLUMNS)], line[-1]) if arguments.output == "table" else line for line in cells]
        lines = list(volumes.table(heads, shown))
    _say(*lines)
    for problem in [*silent, *objects.gaps]:
        _warn(f"not shown: {problem}")
    return UNKNOWN if silent or objects.gaps else OK


def _why(kubectl: Kubectl, arguments: argparse.Namespace) -> int:
    kind, slash, name = arguments.name.rpartition("/")
    if slash and kind not in _KINDS:
        raise InvalidRequest(f"{arguments.name}: expected a claim, pvc/CLAIM or pod/POD")
    namespace = arguments.namespace or kubectl.namespace()
    cases = Reader(kubectl, namespace).cases(_KINDS.get(kind, ""), name)
    found = diagnose(*cases)
    if arguments.output == "json":
        print(document(cases, found))
    else:
        lines = dict.fromkeys(line for case in cases for line in story(case))
        told = [line for finding in found for line in finding.lines()] or ["OK       nothing is wrong"]
        _say(*lines, "", *told)
    return FOUND if any(each.is_wrong for each in found) else UNKNOWN if found else OK


if __name__ == "__main__":
    sys.exit(main())
