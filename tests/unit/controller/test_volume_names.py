# SPDX-License-Identifier: Apache-2.0
"""Names of volumes, handles and references."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.controller.volume_lookup import issued_reference
from csi_driver.model import VolumeHandle, volume_name
from csi_driver.publish_context import reference_id

UUID = "01234567-89ab-cdef-0123-456789abcdef"


def test_a_provisioned_name_keeps_the_form_of_earlier_drivers() -> None:
    assert volume_name(f"pvc-{UUID}") == "csi-01234567-89ab-cdef"


@pytest.mark.parametrize("name", ["pvc-1", f"pvc-{UUID}x", f"pvc-{UUID.upper()}", "sanity", "a" * 128, f"disk-{UUID}"])
def test_any_other_name_is_hashed(name: str) -> None:
    assert re.fullmatch(r"csi-[a-z2-7]{18}", volume_name(name))


@given(st.text(min_size=1, max_size=128))
def test_every_name_fits_the_storage(name: str) -> None:
    assert re.fullmatch(r"(?!e_|d_)[\w+=-]{1,22}", volume_name(name), re.ASCII)


def test_long_names_that_begin_alike_differ() -> None:
    assert volume_name("a" * 127 + "b") != volume_name("a" * 127 + "c")


@pytest.mark.parametrize("reference", ["team-a", "0", "a" * 63])
def test_a_namespace_is_its_own_reference(reference: str) -> None:
    assert reference_id(VolumeHandle("v", "z", UUID, reference)) == reference


@pytest.mark.parametrize("reference", ["Team", "a b", "a:b", "ü", "a" * 64, UUID])
def test_what_the_storage_would_not_take_or_would_confuse_is_hashed(reference: str) -> None:
    made = reference_id(VolumeHandle("v", "z", UUID, reference))
    assert made is not None
    assert re.fullmatch(r"r-[0-9a-f]{40}", made)


def test_a_handle_without_reference_sends_none() -> None:
    assert reference_id(VolumeHandle("v", "z", UUID)) is None


@given(st.text(max_size=80), st.text("abc", min_size=1, max_size=60))
def test_what_is_issued_can_be_read_back(reference: str, zone: str) -> None:
    issued = VolumeHandle(
        "csi-01234567-89ab-cdef", zone, UUID, issued_reference(zone, "csi-01234567-89ab-cdef", reference)
    )
    assert len(issued.format().encode()) <= 128
    assert VolumeHandle.parse(issued.format()) == issued
