# SPDX-License-Identifier: Apache-2.0
"""Commands of one machine: storage, local, demo, doctor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from csi_driver.config.command import Command, Values, build
from csi_driver.embedded.settings import StorageSettings
from csi_driver.flags import section
from csi_driver.local.doctor import Target
from csi_driver.local.settings import DemoSettings, LocalSettings
from csi_driver.settings import DRIVER_NAME, HTTP_LISTEN, HttpSettings
from csi_driver.telemetry.log import LogSettings
from csi_driver.telemetry.tracing import TracingSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageCommand(Command):
    storage: StorageSettings = section(StorageSettings)
    driver_name: str = DRIVER_NAME.field()
    tracing: TracingSettings = section(TracingSettings)
    http: HttpSettings | None = HTTP_LISTEN.field()
    log: LogSettings = section(LogSettings)

    def problems(self, values: Values) -> Iterator[str]:
        yield from self.storage.problems()
        yield from self.tracing.problems()


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCommand(Command):
    settings: LocalSettings = section(LocalSettings)
    log: LogSettings = section(LogSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoCommand(Command):
    settings: DemoSettings = section(DemoSettings)
    log: LogSettings = section(LogSettings)

    def problems(self, values: Values) -> Iterator[str]:
        least, given = self.settings.volume_bytes, self.settings.expanded_bytes
        if given < least:
            yield f"--expanded-size: expected at least the {least} bytes of --volume-size, got {given}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorCommand(Command):
    target: Target = section(Target)
    log: LogSettings = field(default_factory=lambda: LogSettings("error"))

    @classmethod
    def read(cls, values: Values) -> Self:
        if values.running is not None:
            values.file["--role"] = ("running role", values.running.role)
        return cls(target=replace(build(Target, values), running=values.running))

    def problems(self, values: Values) -> Iterator[str]:
        if self.target.management.servers:
            yield from self.target.management.problems()


COMMANDS: Mapping[str, type[Command]] = {
    "storage": StorageCommand,
    "local": LocalCommand,
    "demo": DemoCommand,
    "doctor": DoctorCommand,
}
