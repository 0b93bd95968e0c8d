# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from csi_driver.errors import (
    DriverError,
    Exhausted,
    InvalidRequest,
    NodeNotFound,
    OperationPending,
    PreconditionFailed,
    ReservationConflict,
    StorageUnavailable,
    VolumeNotFound,
)
from csi_driver.management.failures import ApiError, Meaning, Operation, error_in, failure_of, meaning_of


def refusal(error: object, *, success: bool = False) -> ApiError:
    found = error_in({"_id": "v", "uuid": None, "success": success, "error": error, "payload": None})
    assert found is not None
    return found


def test_a_plain_success_has_no_error() -> None:
    assert error_in({"_id": "v", "uuid": "u", "success": True, "error": None, "payload": None}) is None


def test_ids_are_listed_innermost_first() -> None:
    assert refusal({"id": 1694, "innerMessage": {"id": 1717, "innerMessage": {"id": 3}}}).ids == (3, 1717, 1694)


def test_the_inner_id_decides_where_both_are_known() -> None:
    error = {"id": 1543, "innerMessage": {"id": 1718}}
    assert meaning_of(Operation.ATTACH, refusal(error)) == (Meaning.RESERVED, 1718)


def test_the_outer_id_decides_where_the_inner_one_is_not_known() -> None:
    error = {"id": 1621, "innerMessage": {"id": 999_999}}
    assert meaning_of(Operation.ATTACH, refusal(error)) == (Meaning.CLIENT_ABSENT, 1621)


def test_a_warning_with_success_is_still_an_error() -> None:
    assert isinstance(failure_of(Operation.UPDATE, refusal({"id": 1603}, success=True)), PreconditionFailed)


def test_an_error_may_be_a_string() -> None:
    assert refusal("Wrong credentials").ids == ()


def test_the_id_of_a_leaked_internal_object_is_found() -> None:
    assert refusal({"systemMessage": {"id": 16272}, "additionalInfo": {}}).ids == (16272,)


def test_a_leaked_internal_object_may_be_the_whole_response() -> None:
    found = error_in({"systemMessage": {"id": 16272}, "additionalInfo": {}})
    assert found is not None
    assert found.ids == (16272,)


@pytest.mark.parametrize("inner", [{}, [], None, 7])
def test_an_inner_message_without_an_id_leaves_the_outer_one(inner: object) -> None:
    assert refusal({"id": 1523, "innerMessage": inner}).ids == (1523,)


def test_success_false_without_an_error_is_an_error() -> None:
    assert error_in({"success": False, "error": None}) is not None


def test_an_endless_chain_of_errors_is_cut() -> None:
    error: dict[str, object] = {"id": 1}
    for number in range(2, 100):
        error = {"id": number, "innerMessage": error}
    assert len(refusal(error).ids) == 8


@pytest.mark.parametrize("operation", [Operation.CREATE, Operation.CLONE])
def test_no_space_is_recognised_by_the_bare_string(operation: Operation) -> None:
    error = {"id": 1664, "innerMessage": "Failed to allocate"}
    assert isinstance(failure_of(operation, refusal(error)), Exhausted)


def test_another_bare_string_is_not_no_space() -> None:
    error = {"id": 1664, "innerMessage": "something else"}
    assert type(failure_of(Operation.CREATE, refusal(error))) is StorageUnavailable


@pytest.mark.parametrize(
    ("operation", "ids", "family"),
    [
        (Operation.CREATE, (1664, 1514), InvalidRequest),
        (Operation.CREATE, (1664, 1552), InvalidRequest),
        (Operation.CREATE, (1664, 16824), InvalidRequest),
        (Operation.CREATE, (1665,), InvalidRequest),
        (Operation.CREATE, (422,), InvalidRequest),
        (Operation.CREATE, (1664, 1544), Exhausted),
        (Operation.CREATE, (1664, 16825), PreconditionFailed),
        (Operation.CREATE, (1664, 16358), OperationPending),
        (Operation.EXTEND, (1543,), VolumeNotFound),
        (Operation.EXTEND, (1671,), VolumeNotFound),
        (Operation.EXTEND, (1572,), OperationPending),
        (Operation.EXTEND, (1581,), OperationPending),
        (Operation.EXTEND, (1676, 16190), OperationPending),
        (Operation.EXTEND, (1672,), PreconditionFailed),
        (Operation.EXTEND, (1675,), Exhausted),
        (Operation.DELETE, (1571,), OperationPending),
        (Operation.DELETE, (1683,), PreconditionFailed),
        (Operation.DELETE, (1686,), PreconditionFailed),
        (Operation.DELETE, (1687,), StorageUnavailable),
        (Operation.UPDATE, (1543,), VolumeNotFound),
        (Operation.UPDATE, (1582,), OperationPending),
        (Operation.UPDATE, (1605,), PreconditionFailed),
        (Operation.ATTACH, (1621,), NodeNotFound),
        (Operation.ATTACH, (1693,), VolumeNotFound),
        (Operation.ATTACH, (1694, 1716), ReservationConflict),
        (Operation.ATTACH, (1694, 1719), OperationPending),
        (Operation.ATTACH, (1694, 11212), OperationPending),
        (Operation.ATTACH, (1694, 1569), PreconditionFailed),
        (Operation.ATTACH, (16303,), OperationPending),
        (Operation.DETACH, (16303,), OperationPending),
        (Operation.DETACH, (1703,), StorageUnavailable),
    ],
)
def test_an_id_raises_one_family_for_each_operation(
    operation: Operation, ids: tuple[int, ...], family: type[DriverError]
) -> None:
    error: dict[str, object] = {"id": ids[-1]}
    for number in reversed(ids[:-1]):
        error = {"id": number, "innerMessage": error}
    assert type(failure_of(operation, refusal(error), volume="v", client="n")) is family


@pytest.mark.parametrize("number", [1706, 17061, 162222, 162223, 1622, 1608, 1543])
def test_an_absent_attachment_client_or_volume_counts_as_detached(number: int) -> None:
    assert meaning_of(Operation.DETACH, refusal({"id": number}))[0] is Meaning.DONE


def test_a_conflict_has_the_current_version() -> None:
    failure = failure_of(
        Operation.ATTACH, refusal({"id": 1694, "innerMessage": {"id": 1717, "volumeReservation": 4}}), volume="v"
    )
    assert isinstance(failure, ReservationConflict)
    assert (failure.management_id, failure.current_version) == (1717, 4)


def test_an_error_quotes_the_reason_of_the_server() -> None:
    failure = failure_of(Operation.DELETE, refusal({"id": 1683, "message": "in use", "innerMessage": "by node-1"}))
    assert "in use: by node-1" in str(failure)


def test_a_long_or_strange_reason_is_cut_and_escaped() -> None:
    text = str(failure_of(Operation.DELETE, refusal({"id": 1687, "message": "\x1b[2J\n" + "x" * 10_000})))
    assert "\x1b" not in text
    assert len(text) < 512
