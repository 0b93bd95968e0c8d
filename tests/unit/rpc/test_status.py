# SPDX-License-Identifier: Apache-2.0
"""The table from failures to codes."""

from __future__ import annotations

import inspect

import grpc
import pytest

from csi_driver import errors
from csi_driver.rpc.boundary import CODES, code_of, message_of

# The codes of the specification's error scheme, independent of the table.
SPECIFIED = {
    "InvalidRequest": 3, "NotFound": 5, "Incompatible": 6, "CapacityOutOfRange": 11, "Exhausted": 8,
    "PreconditionFailed": 9, "OperationPending": 10, "StaleToken": 10, "Denied": 7, "Unauthenticated": 16,
    "StorageUnavailable": 14, "NotOffered": 12, "HostFailure": 13,
}  # fmt: skip

# The storage manager has refusals of its own, which leave it as HTTP answers and never come here.
FAMILIES = [family for family in errors.DriverError.__subclasses__() if family.__module__ == errors.__name__]
ALL = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.DriverError)]


def test_every_family_has_a_code() -> None:
    assert {family.__name__ for family in FAMILIES} == {family.__name__ for family in CODES}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_family_has_the_code_of_the_specification(family: type[errors.DriverError]) -> None:
    assert CODES[family].value[0] == SPECIFIED[family.__name__]


@pytest.mark.parametrize("leaf", [c for c in ALL if c is not errors.DriverError], ids=lambda leaf: leaf.__name__)
def test_every_class_of_the_tree_belongs_to_exactly_one_family(leaf: type[errors.DriverError]) -> None:
    assert sum(issubclass(leaf, family) for family in FAMILIES) == 1


def test_a_leaf_has_the_code_of_its_family() -> None:
    assert code_of(errors.VolumeNotFound("v")) is grpc.StatusCode.NOT_FOUND


def test_the_root_of_the_tree_is_internal() -> None:
    assert code_of(errors.DriverError("?")) is grpc.StatusCode.INTERNAL


def test_a_message_is_never_empty() -> None:
    assert message_of(errors.NotFound()) == "NotFound"


def test_a_message_that_cannot_be_encoded_is_escaped() -> None:
    assert message_of(errors.HostFailure("no \udcff here")) == "no \\udcff here"


def test_a_message_is_one_line_that_fits_a_trailer() -> None:
    message = message_of(errors.HostFailure("line\n" * 5000))
    assert "\n" not in message
    assert len(message) <= 1000


def test_control_characters_of_a_message_are_escaped() -> None:
    assert message_of(errors.HostFailure("a\x1b[2Jb\x00c\u2028d")) == "a\\x1b[2Jb\\x00c d"
