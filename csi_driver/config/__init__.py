# SPDX-License-Identifier: Apache-2.0
"""Read command line and environment into the settings of one command. Flags win; all problems are reported at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from csi_driver.config.command import Command, UsageError, Values, flags_of
from csi_driver.errors import shown
from csi_driver.flags import Flag, read_boolean

if TYPE_CHECKING:
    from csi_driver.host_model import RunningRole

PROGRAM = "nvmesh-csi"

COMMANDS = {
    "controller": "Run the CSI controller service.",
    "node": "Run the CSI node service.",
    "storage": "Run the embedded storage manager: the management REST API over files of this machine.",
    "local": "Run storage, controller and node on this machine in one command.",
    "demo": "Create, use and delete volumes on this machine, step by step, and clean up.",
    "doctor": "Check this machine and the driver's requirements. Exit status: 1 when a check fails.",
    "pre-stop": "Wait, before the node's pod stops, until a node that is being drained has no volume left.",
    "volume": "Print volumes and their users, or allow that the old data of one is formatted over, once.",
    "version": "Print the version.",
}
BESIDE: Mapping[str, Sequence[Sequence[str]]] = {
    # A machine with several roles is checked as a node.
    "doctor": (("node", "controller", "storage"), ("node", "controller")),
    "pre-stop": (("node",),),
    "volume": (("node", "controller"),),
}
"""Commands that take missing flags from the arguments and environment of a running role: of the first of these sets of
roles of which one process runs."""

_LOCAL_COMMANDS = ("storage", "local", "demo", "doctor")
_EXIT_STATUS = """exit status:
  0  success (stopped by SIGTERM or Ctrl-C included)
  1  failed to start or to continue; the last line gives the reason
  2  invalid command line or environment; every problem is listed
  128 + N  ended at once by the second signal, number N
"""


@dataclass(frozen=True, slots=True)
class VersionCommand(Command):
    """`nvmesh-csi version`."""


def command_class(name: str) -> type[Command]:
    """Return the class of a command, loading only what commands like it need."""
    if name == "version":
        return VersionCommand
    if name in _LOCAL_COMMANDS:
        from csi_driver.config import local_commands

        return local_commands.COMMANDS[name]
    from csi_driver.config import csi_commands

    return csi_commands.COMMANDS[name]


def parse(
    argv: Sequence[str],
    environ: Mapping[str, str],
    find_running: Callable[[Sequence[str]], RunningRole | None] = lambda _: None,
) -> Command:
    """Return the command of the arguments; --help ends the process. Raises `UsageError` with every problem."""
    name = next((argument for argument in argv if argument in COMMANDS), "")
    if argv and not name and not argv[0].startswith("-"):
        raise UsageError([f"unknown command {shown(argv[0])}{_suggestion(argv[0], COMMANDS)}"])
    kind = command_class(name or "version")
    flags = flags_of(kind)
    arguments, unknown = _parser(name, flags).parse_known_args(list(argv))
    if arguments.command is None:
        raise UsageError([f"no command given; expected one of {', '.join(COMMANDS)}"])
    given = {flag: [text for text in getattr(arguments, flag) or () if text is not None] for flag in flags}
    roles = () if _is_complete(name, given) else BESIDE.get(name, ())
    running = next(filter(None, map(find_running, roles)), None)
    if running is not None:
        # The role's other flags mean nothing to this command.
        named = {flag: each for flag, each in flags.items() if not each.is_positional}
        theirs, _ = _parser(name, named).parse_known_args([name, *running.arguments])
        given = {flag: texts or getattr(theirs, flag, None) or [] for flag, texts in given.items()}
        environ = {**running.environ, **environ}
    values = Values(given, environ, running)
    command = kind.read(values)
    problems = [*_unknown(unknown, name, flags), *values.problems, *command.problems(values)]
    if problems:
        raise UsageError(problems)
    return command


def _is_complete(name: str, given: Mapping[str, Sequence[str]]) -> bool:
    """Return whether the arguments name a management, which must not be mixed with the one of a running role."""
    return name == "volume" and any(given[flag] for flag in ("--management-server", "--clusters-file"))


def _unknown(arguments: Sequence[str], command: str, flags: Iterable[str]) -> Iterator[str]:
    """Yield a problem for each argument that the command does not have; the value of an unknown flag is not shown."""
    is_value = False
    for argument in arguments:
        if argument.startswith("-"):
            name = argument.partition("=")[0]
            yield f"unknown flag {shown(name)[1:-1]} for {command}{_suggestion(name, flags)}"
        elif not is_value:
            yield f"unexpected argument {shown(argument)} for {command}"
        is_value = argument.startswith("-") and "=" not in argument


def _suggestion(word: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches  # only for a mistake

    close = get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else f"; see {PROGRAM} --help"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError([message])


def _parser(chosen: str, flags: Mapping[str, Flag[Any]]) -> argparse.ArgumentParser:
    form: dict[str, Any] = {
        "epilog": _EXIT_STATUS, "allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter
    }  # fmt: skip
    parser = _Parser(
        prog=PROGRAM, description="CSI driver for NVMesh, with a storage manager of its own for one machine.", **form
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose, **form)
        for flag in flags.values() if name == chosen else ():
            value: dict[str, Any] = {} if flag.is_positional else {"dest": flag.name, "metavar": flag.read.metavar}
            if flag.read is read_boolean:
                value |= {"nargs": "?", "const": "true"}
            elif flag.is_positional and not flag.is_required:
                value |= {"nargs": "?"}
            command.add_argument(flag.name, action="append", help=flag.describe().replace("%", "%%"), **value)
    return parser
