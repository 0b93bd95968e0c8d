"""Flags as a table: each with its reader, unit, default and environment name; flags beat the environment.

`Values` collects every problem, so that all are reported together.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NoReturn, TypeVar

from csi_driver.errors import shown

if TYPE_CHECKING:
    from csi_driver.host_model import RunningRole

T = TypeVar("T")

_PREFIX = "NVMESH_CSI_"


class UsageError(Exception):
    """The command line or the environment cannot be used. `problems`: a sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(problems))


@dataclass(frozen=True, slots=True)
class Flag(Generic[T]):
    """One flag. `shown_default` is how the default reads in the help; empty = it must be given."""

    name: str
    read: Callable[[str], T]
    default: T
    shown_default: str
    help: str
    unit: str = ""
    metavar: str = "VALUE"
    repeatable: bool = False
    environment: str = ""

    @property
    def variable(self) -> str:
        """The name of the environment variable."""
        return self.environment or _PREFIX + self.name.removeprefix("--").replace("-", "_").upper()

    @property
    def is_positional(self) -> bool:
        """Whether it is a word by its place, not a flag: then it must be given, and the environment has none."""
        return not self.name.startswith("--")

    @property
    def is_switch(self) -> bool:
        """Whether the flag may stand without a value."""
        return isinstance(self.default, bool)

    def describe(self) -> str:
        """Write the help: effect, unit, default, environment."""
        if self.is_positional:
            return self.help
        parts = [self.help]
        if self.repeatable:
            parts.append("May be repeated; separated by commas in the environment.")
        if self.unit:
            parts.append(f"Unit: {self.unit}.")
        parts.append(f"Default: {self.shown_default}." if self.shown_default else "Required.")
        parts.append(f"Environment: {self.variable}.")
        return " ".join(parts).replace("%", "%%")


class Values:
    """The words given for the flags of one command, read when they are asked for."""

    def __init__(
        self,
        given: Mapping[str, Sequence[str]],
        environ: Mapping[str, str],
        beside: RunningRole | None = None,
    ) -> None:
        """Take the words; `beside` is the role that runs here, for a command that is run beside one."""
        self.problems: list[str] = []
        self.beside = beside
        self._given = given
        self._environ = environ

    def one(self, flag: Flag[T]) -> T:
        """Return the value of a flag (the last one given), else its default."""
        source, words = self._words(flag)
        if not words:
            if not flag.shown_default:
                self.problems.append(f"{flag.name} (or {flag.variable}) is required")
            return flag.default
        return self._read(flag, source, words[-1])

    def all(self, flag: Flag[T]) -> tuple[T, ...]:
        """Return every value of a repeatable flag; empty when none was given."""
        source, words = self._words(flag)
        if not words and not flag.shown_default:
            self.problems.append(f"{flag.name} (or {flag.variable}) is required, at least once")
        return tuple(self._read(flag, source, word) for word in words)

    def given(self, flag: Flag[T]) -> bool:
        """Tell whether a flag was set, by argument or environment."""
        return bool(self._words(flag)[1])

    def chosen(self, flag: Flag[T], elsewhere: T | None) -> T:
        """Return the value of a flag that was set, else what stands elsewhere, else the flag's default."""
        return self.one(flag) if self.given(flag) or elsewhere is None else elsewhere

    def _words(self, flag: Flag[T]) -> tuple[str, Sequence[str]]:
        given = self._given.get(flag.name)
        if given:
            return flag.name, given
        if flag.is_positional:
            return flag.name, ()
        found = self._environ.get(flag.variable, "")
        if not found:
            return flag.variable, ()
        return flag.variable, [word.strip() for word in found.split(",")] if flag.repeatable else [found]

    def _read(self, flag: Flag[T], source: str, word: str) -> T:
        try:
            return flag.read(word)
        except ValueError as error:
            self.problems.append(f"{source}: expected {error}, got {shown(word)}")
            return flag.default


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError([message])


def add(parser: argparse.ArgumentParser, flag: Flag[T]) -> None:
    """Make the parser accept the flag."""
    if flag.is_positional:
        parser.add_argument(flag.name, action="append", help=flag.describe())
        return
    parser.add_argument(
        flag.name,
        dest=flag.name,
        action="append",
        nargs="?" if flag.is_switch else None,
        const="true" if flag.is_switch else None,
        metavar=flag.metavar,
        help=flag.describe(),
    )
