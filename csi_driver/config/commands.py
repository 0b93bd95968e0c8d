"""The commands of the program: which flags each takes, and what they make."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from csi_driver.config.flags import Flag, Parser, UsageError, Values, add
from csi_driver.config.made import Command, VersionCommand
from csi_driver.errors import shown

if TYPE_CHECKING:
    from csi_driver.host_model import RunningRole

PROGRAM = "nvmesh-csi"

Definition = tuple[Sequence[Flag[object]], Callable[[Values], Command]]

_EXIT_STATUS = """exit status:
  0  success (stopped by SIGTERM or Ctrl-C included)
  1  failed to start or to continue; the last line says why
  2  invalid command line or environment; every problem is listed
  128 + N  ended at once by the second signal, number N
"""

COMMANDS = {
    "controller": "Run the CSI controller service.",
    "node": "Run the CSI node service.",
    "storage": "Run the embedded storage manager: the management REST API over files of this machine.",
    "local": "Run storage, controller and node on this machine in one command.",
    "demo": "Create, use and delete volumes on this machine, step by step, and clean up.",
    "doctor": "Check this machine and what the driver needs. Exit status: 1 when a check fails.",
    "pre-stop": "Wait, before the node's pod stops, until a node that is being drained has no volume left.",
    "volume": "Print the state of a volume, or allow that its old data is formatted over, once.",
    "version": "Print the version.",
}


BESIDE: Mapping[str, Sequence[str]] = {"doctor": ("node", "controller"), "pre-stop": ("node",)}
"""Commands that are run beside a role, and work with what that role was told where they are told nothing else."""

Running = Callable[[Sequence[str]], "RunningRole | None"]


def parse(argv: Sequence[str], environ: Mapping[str, str], running: Running = lambda _: None) -> Command:
    """Read the arguments after the program's name. Raises `UsageError` with every problem; --help ends the process.

    `running` returns the process of one of these roles that runs here.
    """
    name = next((argument for argument in argv if argument in COMMANDS), "")
    if argv and not name and not argv[0].startswith("-"):
        raise UsageError([f"unknown command {shown(argv[0])}{_meant(argv[0], tuple(COMMANDS))}"])
    flags, make = definition(name)
    names, unknown = _parser(name, flags).parse_known_args(list(argv))
    if names.command is None:
        raise UsageError([f"no command given; expected one of {', '.join(COMMANDS)}"])
    given = {flag.name: getattr(names, flag.name) or [] for flag in flags}
    beside = running(BESIDE[name]) if name in BESIDE else None
    if beside is not None:
        # What it was told and this command does not know says nothing to this command.
        told, _ = _parser(name, flags).parse_known_args([name, *beside.arguments])
        given = {flag: words or getattr(told, flag) or [] for flag, words in given.items()}
        environ = {**beside.environ, **environ}
    values = Values(given, environ, beside)
    values.problems.extend(_unknown(unknown, name, [flag.name for flag in flags]))
    command = make(values)
    if values.problems:
        raise UsageError(values.problems)
    return command


def _unknown(arguments: Sequence[str], command: str, flags: Sequence[str]) -> Iterator[str]:
    """Yield a problem for each argument that the command does not have; the value of an unknown flag is not shown."""
    is_value = False
    for argument in arguments:
        if argument.startswith("-"):
            name = argument.partition("=")[0]
            yield f"unknown flag {shown(name)[1:-1]} for {command}{_meant(name, flags)}"
        elif not is_value:
            yield f"unexpected argument {shown(argument)} for {command}"
        is_value = argument.startswith("-") and "=" not in argument


def _meant(word: str, known: Sequence[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; see {PROGRAM} --help"


def definition(name: str) -> Definition:
    """Return the flags of a command and what makes its settings, loading this command's alone."""
    match name:
        case "controller":
            from csi_driver.config import controller

            return controller.CONTROLLER_FLAGS, controller.controller
        case "node":
            from csi_driver.config import node

            return node.NODE_FLAGS, node.node
        case "storage":
            from csi_driver.config import storage

            return storage.STORAGE_FLAGS, storage.storage
        case "local":
            from csi_driver.config import onebox

            return onebox.LOCAL_FLAGS, onebox.local
        case "demo":
            from csi_driver.config import onebox

            return onebox.DEMO_FLAGS, onebox.demo
        case "doctor":
            from csi_driver.config import doctor

            return doctor.DOCTOR_FLAGS, doctor.doctor
        case "pre-stop":
            from csi_driver.config import prestop

            return prestop.PRE_STOP_FLAGS, prestop.pre_stop
        case "volume":
            from csi_driver.config import volume

            return volume.VOLUME_FLAGS, volume.volume
        case _:
            return (), lambda values: VersionCommand()


def _parser(chosen: str, flags: Sequence[Flag[object]]) -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="CSI driver for NVMesh, with a storage manager of its own for one machine.",
        epilog=_EXIT_STATUS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, purpose in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=purpose,
            description=purpose,
            epilog=_EXIT_STATUS,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for flag in flags if name == chosen else ():
            add(sub, flag)
    return parser
