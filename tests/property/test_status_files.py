# SPDX-License-Identifier: Apache-2.0
"""No content of the storage client's files makes the driver fail, or take a volume for another one."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver.host.connectors import nvmesh

UUID = "01234567-89ab-cdef-0123-456789abcdef"
OTHER = "fedcba98-7654-3210-fedc-ba9876543210"
IDENTITY = {"name": "csi-1", "uuid": UUID, "type": "visible"}
HINTS = (
    "size[blks]", "block[b]", "debug_di", "status", "attach_status", "dbg", "io_enabled", "reservation", "topo",
    "uuid_old",
)  # fmt: skip

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["0x200", 0x1092, 1, OTHER, "Preempted"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "uuid", "type", "dbg"]) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
documents = st.dictionaries(
    st.sampled_from(HINTS) | st.text(max_size=8).filter(lambda key: key not in IDENTITY), values
)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_not_known(data: bytes) -> None:
    text = data.decode(errors="replace")
    assert nvmesh.parse_volume_status(text) is None
    assert nvmesh.parse_client_uuid(text) is None
    assert nvmesh.parse_reference_ids(text) in (None, ())
    assert nvmesh.parse_opens(text) is None
    nvmesh.parse_client_problem(text)
    nvmesh.parse_serial_page(data)
    assert not nvmesh.is_nvmesh(data[:16])


@given(documents)
def test_whatever_other_fields_hold_the_identity_is_the_volumes_own(more: dict[str, object]) -> None:
    status = nvmesh.parse_volume_status(json.dumps(IDENTITY | more))
    assert status is not None
    assert (status.name, status.uuid) == ("csi-1", UUID)
    assert status.size_bytes is None or 0 <= status.size_bytes < 1 << 63
    assert not status.preempted or status.io_enabled is False


@given(documents, st.data())
def test_a_status_that_is_torn_anywhere_says_nothing(more: dict[str, object], data: st.DataObject) -> None:
    text = json.dumps(IDENTITY | more)
    cut = data.draw(st.integers(0, len(text) - 1))
    assert nvmesh.parse_volume_status(text[:cut]) is None


@given(documents, documents, st.data())
def test_the_end_of_another_status_does_not_change_who_it_is(
    more: dict[str, object], others: dict[str, object], data: st.DataObject
) -> None:
    """A file that is read while it is replaced: the beginning of one, the end of another, of any length."""
    text = json.dumps(IDENTITY | more)
    end = json.dumps(IDENTITY | {"uuid": OTHER} | others)
    seam = data.draw(st.integers(len(json.dumps(IDENTITY)) - 1, len(text)))
    status = nvmesh.parse_volume_status(text[:seam] + end[data.draw(st.integers(0, len(end))) :])
    assert status is None or status.uuid == UUID


references = st.lists(st.from_regex(r"[a-z0-9-]{1,63}", fullmatch=True), max_size=5)


def blob(ids: list[str], *more: str) -> str:
    head = ("encoding_version = 1", "attach_version_global = 9", *more, f"n_strings = {len(ids)}")
    return "".join(f"{line}\n" for line in (*head, *ids, "= the end ="))


@given(references, st.data())
def test_reference_ids_are_all_there_or_not_known(ids: list[str], data: st.DataObject) -> None:
    text = blob(ids, "attach_version_pervol = 3")
    assert nvmesh.parse_reference_ids(text) == tuple(ids)
    torn = text[: data.draw(st.integers(0, len(text)))]
    assert nvmesh.parse_reference_ids(torn) in (None, tuple(ids))


@given(references, st.lists(st.from_regex(r"[a-z_]{1,20} = [0-9]{1,20}", fullmatch=True), max_size=3))
def test_lines_that_newer_clients_add_do_not_matter(ids: list[str], more: list[str]) -> None:
    assert nvmesh.parse_reference_ids(blob(ids, *more)) == tuple(ids)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000), st.sampled_from('[{"'))
def test_what_is_nested_or_opened_without_end_says_nothing(depth: int, opener: str) -> None:
    assert nvmesh.parse_volume_status(opener * depth) is None
    assert nvmesh.parse_client_uuid('{"main": ' * depth) is None
