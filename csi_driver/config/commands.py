"""The commands of the program: which flags each takes, and what they make."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from csi_driver.config import controller, node, onebox, storage
from csi_driver.config.controller import ControllerCommand
from csi_driver.config.flags import Flag, Parser, UsageError, Values, add
from csi_driver.config.node import NodeCommand
from csi_driver.config.onebox import DemoCommand, LocalCommand
from csi_driver.config.storage import StorageCommand

PROGRAM = "nvmesh-csi"


@dataclass(frozen=True, slots=True)
class VersionCommand:
    """`nvmesh-csi version`."""


Command = ControllerCommand | NodeCommand | StorageCommand | LocalCommand | DemoCommand | VersionCommand

_EXIT_STATUS = """exit status:
  0  ended as asked (SIGTERM and Ctrl-C included)
  1  could not start or go on; the last line says why
  2  the command line or the environment cannot be used; every problem is listed
  128 + N  ended at once by the second signal, number N
"""


@dataclass(frozen=True, slots=True)
class _Definition:
    """One command."""

    name: str
    help: str
    flags: Sequence[Flag[object]]
    make: Callable[[Values], Command]


_DEFINITIONS = (
    _Definition(
        "controller",
        "Serve the CSI identity and controller services over the storage management.",
        controller.CONTROLLER_FLAGS,
        controller.controller,
    ),
    _Definition("node", "Serve the CSI identity and node services on this machine.", node.NODE_FLAGS, node.node),
    _Definition(
        "storage",
        "Run the embedded storage manager: the management's REST API over files of this machine.",
        storage.STORAGE_FLAGS,
        storage.storage,
    ),
    _Definition(
        "local", "Run storage, controller and node on this machine in one command.", onebox.LOCAL_FLAGS, onebox.local
    ),
    _Definition("demo", "Show the life of volumes here, and leave no trace.", onebox.DEMO_FLAGS, onebox.demo),
    _Definition("version", "Print the version.", (), lambda values: VersionCommand()),
)


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Command:
    """Read the arguments after the program's name. Raises `UsageError` with every problem; --help ends the process."""
    parser = _parser()
    names, unknown = parser.parse_known_args(list(argv))
    if names.command is None:
        raise UsageError([f"no command is given, wanted one of {', '.join(d.name for d in _DEFINITIONS)}"])
    definition = next(d for d in _DEFINITIONS if d.name == names.command)
    given = {flag.name: getattr(names, flag.name) or [] for flag in definition.flags}
    values = Values(given, environ)
    values.problems.extend(f"{argument} is not known to {PROGRAM} {definition.name}" for argument in unknown)
    command = definition.make(values)
    if values.problems:
        raise UsageError(values.problems)
    return command


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="CSI driver for NVMesh, with a storage manager of its own for one machine.",
        epilog=_EXIT_STATUS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for definition in _DEFINITIONS:
        sub = commands.add_parser(
            definition.name,
            help=definition.help,
            description=definition.help,
            epilog=_EXIT_STATUS,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for flag in definition.flags:
            add(sub, flag)
    return parser
