# SPDX-License-Identifier: Apache-2.0
"""Settings of a command, built from the texts of its flags: arguments, environment, a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from csi_driver.errors import shown
from csi_driver.flags import FLAG, SECTION, Flag

if TYPE_CHECKING:
    from csi_driver.host_model import RunningRole
    from csi_driver.telemetry.log import LogSettings

T = TypeVar("T")


class UsageError(Exception):
    """The command line or the environment is invalid. `problems`: a sentence each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("; ".join(self.problems))


@dataclass(slots=True)
class Values:
    """Texts of flags: arguments, else environment, else `file` (source, text); and the problems of reading them."""

    arguments: Mapping[str, Sequence[str]]
    environ: Mapping[str, str] = field(repr=False)
    running: RunningRole | None = None
    file: dict[str, tuple[str, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def is_given(self, flag: Flag[Any]) -> bool:
        return bool(self.arguments.get(flag.name) or (not flag.is_positional and self.environ.get(flag.variable)))

    def read(self, flag: Flag[T]) -> T:
        """Return the value of a flag: the last one given, all of a repeatable flag, else the default."""
        source, texts = self._texts(flag)
        if not texts and flag.is_required:
            self.problems.append(f"{flag.name} (or {flag.variable}) is required")
        values = []
        for text in texts if flag.is_repeatable else texts[-1:]:
            try:
                values.append(flag.read(text))
            except ValueError as error:
                self.problems.append(f"{source}: expected {error}, got {shown(text)}")
        if not values:
            return flag.default
        return cast("T", tuple(values) if flag.is_repeatable else values[0])

    def _texts(self, flag: Flag[Any]) -> tuple[str, Sequence[str]]:
        if given := self.arguments.get(flag.name):
            return flag.name, given
        if self.is_given(flag):
            text = self.environ[flag.variable]
            return flag.variable, [word.strip() for word in text.split(",")] if flag.is_repeatable else [text]
        source, *texts = self.file.get(flag.name, (flag.name,))
        return source, texts


def build(settings: type[T], values: Values) -> T:
    found: dict[str, Any] = {}
    for each in fields(settings):  # type: ignore[arg-type]
        if FLAG in each.metadata:
            found[each.name] = values.read(each.metadata[FLAG])
        elif SECTION in each.metadata:
            found[each.name] = build(each.metadata[SECTION], values)
    made = settings(**found)
    return made.resolved() if hasattr(made, "resolved") else made


def flags_of(settings: type[object]) -> dict[str, Flag[Any]]:
    """Return the flags of settings, a dataclass, by name. Of several declarations the first one counts."""
    found: dict[str, Flag[Any]] = {}
    for each in fields(settings):  # type: ignore[arg-type]
        if FLAG in each.metadata:
            found.setdefault(each.metadata[FLAG].name, each.metadata[FLAG])
        elif SECTION in each.metadata:
            found |= {name: flag for name, flag in flags_of(each.metadata[SECTION]).items() if name not in found}
    return found


class Command:
    __slots__ = ()
    log: LogSettings

    @classmethod
    def read(cls, values: Values) -> Self:
        return build(cls, values)

    def problems(self, values: Values) -> Iterable[str]:
        """Yield a sentence for each problem between flags."""
        return ()
