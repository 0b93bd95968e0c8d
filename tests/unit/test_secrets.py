# SPDX-License-Identifier: Apache-2.0
"""No `repr` of the driver's objects shows a secret: tracebacks and debug lines would carry it into logs."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterator

import pytest

import csi_driver
from csi_driver.config.command import Values
from csi_driver.controller.ports import CreateRequest
from csi_driver.embedded.requests import EncryptionInit, Login
from csi_driver.host_model import RunningRole
from csi_driver.management.settings import Credentials, ManagementSettings
from csi_driver.management.transport import Request, Response
from csi_driver.model import CapacityRange
from csi_driver.node import StageRequest
from csi_driver.parameters.encryption import EncryptionPlan
from csi_driver.publish_context import Encryption
from csi_driver.status_page.login import OpenSessions, Session
from csi_driver.yaml_document import Findings, MappingReader
from tests.unit.controller.world import RWO

CANARY = "canary-4711"
SECRETS = {"passphrase": CANARY}

HOLDS_A_SECRET = re.compile(r"secrets|passphrase|password|cookie|environ|entry|body|content|_open")
"""Fields that may hold a secret by their names; those that hold a path, a flag or another object are not shown."""
HARMLESS = re.compile(r"Path|bool|Password\b|DurableFile")


def dataclasses_of_the_driver() -> Iterator[type]:
    for module in pkgutil.walk_packages(csi_driver.__path__, "csi_driver."):
        if "rpc.pb" in module.name or module.name.endswith("__main__"):
            continue
        for each in vars(importlib.import_module(module.name)).values():
            if isinstance(each, type) and each.__module__ == module.name and dataclasses.is_dataclass(each):
                yield each


def holders() -> list[object]:
    sessions = OpenSessions()
    sessions._open[CANARY] = Session(frozenset(), 0.0, 0.0)
    create = CreateRequest("v", CapacityRange(), (RWO,), secrets=SECRETS)
    return [
        create,
        sessions,
        Values({}, {"TOKEN": CANARY}),
        MappingReader("zone a", {"password": CANARY}, Findings()),
        ManagementSettings(password=CANARY),
        Credentials("user", CANARY),
        Request("POST", "/login", CANARY.encode()),
        Response(200, {"passphrase": CANARY}, is_json=True, content=CANARY.encode(), location="", cookie=CANARY),
        StageRequest("v", "/staging", RWO, secrets=SECRETS),
        EncryptionPlan(Encryption.LUKS, CANARY, (CANARY,), (CANARY,)),
        RunningRole(1, "node", (), {"TOKEN": CANARY}),
        Login(username="user", password=CANARY),
        EncryptionInit.model_construct(passphrase=CANARY),
    ]


@pytest.mark.parametrize("holder", holders(), ids=lambda each: type(each).__name__)
def test_the_repr_of_an_object_does_not_show_its_secret(holder: object) -> None:
    assert CANARY not in repr(holder) + str(holder)


def test_no_field_whose_name_tells_of_a_secret_is_shown() -> None:
    shown = [
        f"{each.__module__}.{each.__name__}.{field.name}"
        for each in dataclasses_of_the_driver()
        if each.__dataclass_params__.repr  # type: ignore[attr-defined]
        for field in dataclasses.fields(each)
        if field.repr and HOLDS_A_SECRET.fullmatch(field.name) and not HARMLESS.search(str(field.type))
    ]
    assert not shown
