# SPDX-License-Identifier: Apache-2.0
"""What the zones offer together, and what happens where one of them offers less."""

from __future__ import annotations

import pytest

from csi_driver.controller.features import Readiness, ZoneFeatures
from csi_driver.deadline import Deadline
from csi_driver.errors import NotOffered, PreconditionFailed, StorageUnavailable
from csi_driver.management.codec import NVMESH_FEATURES
from csi_driver.storage_model import Features
from tests.fakes.management import FakeClusters, FakeManagement

REFLINKS = Features(snapshots=True, group_snapshots=True)
EXT4 = Features(reason="embedded storage manager: its pool is on ext4")


class Zones:
    def __init__(self, **offered: Features) -> None:
        self.managements = {zone: FakeManagement() for zone in offered}
        for zone, features in offered.items():
            self.managements[zone].features = features
        self.features = ZoneFeatures(FakeClusters(self.managements))

    def deadline(self) -> Deadline:
        return Deadline.after(5)

    def asked(self, zone: str) -> int:
        return self.managements[zone].requests.count("system_info")


def test_a_zone_that_offers_snapshots_is_enough_to_offer_them() -> None:
    zones = Zones(a=NVMESH_FEATURES, b=Features(snapshots=True))
    assert zones.features.offered(deadline=zones.deadline()) == Features(snapshots=True)


def test_nothing_is_offered_where_no_zone_offers_it() -> None:
    zones = Zones(a=NVMESH_FEATURES, b=EXT4)
    assert zones.features.offered(deadline=zones.deadline()) == Features()


def test_a_zone_that_has_not_answered_may_offer_everything() -> None:
    zones = Zones(a=NVMESH_FEATURES, b=NVMESH_FEATURES)
    zones.managements["b"].is_reachable = False
    assert zones.features.offered(deadline=zones.deadline()).snapshots
    zones.managements["b"].is_reachable = True
    assert not zones.features.offered(deadline=zones.deadline()).snapshots


def test_the_health_check_tells_the_features_so_that_no_request_is_added() -> None:
    zones = Zones(a=NVMESH_FEATURES)
    assert Readiness(zones.features).why_unreachable() == ""
    zones.features.offered(deadline=zones.deadline())
    with pytest.raises(NotOffered):
        zones.features.zones_with("snapshots", deadline=zones.deadline())
    assert zones.asked("a") == 1


def test_a_changed_pool_is_seen_by_the_next_health_check() -> None:
    zones = Zones(a=EXT4)
    assert not zones.features.offered(deadline=zones.deadline()).snapshots
    zones.managements["a"].features = REFLINKS
    Readiness(zones.features).why_unreachable()
    assert zones.features.offered(deadline=zones.deadline()).snapshots


def test_a_zone_without_snapshots_among_others_is_a_failed_precondition_that_names_its_engine() -> None:
    zones = Zones(a=NVMESH_FEATURES, b=REFLINKS)
    zones.features.offered(deadline=zones.deadline())
    assert zones.features.require("b", "snapshots", deadline=zones.deadline()) is zones.managements["b"]
    with pytest.raises(PreconditionFailed, match="zone a offers no snapshots: NVMesh's management API"):
        zones.features.require("a", "snapshots", deadline=zones.deadline())


def test_without_a_zone_that_has_snapshots_they_are_not_offered() -> None:
    zones = Zones(a=NVMESH_FEATURES, b=EXT4)
    zones.features.offered(deadline=zones.deadline())
    with pytest.raises(NotOffered, match=r"zone b offers no group snapshots: .* ext4"):
        zones.features.require("b", "group_snapshots", deadline=zones.deadline())


def test_while_another_zone_is_unknown_a_refusal_is_no_final_one() -> None:
    zones = Zones(a=NVMESH_FEATURES, b=REFLINKS)
    with pytest.raises(PreconditionFailed):
        zones.features.require("a", "snapshots", deadline=zones.deadline())


def test_a_refusal_rests_on_a_new_answer_and_a_cut_on_the_last_one() -> None:
    zones = Zones(a=EXT4)
    zones.features.offered(deadline=zones.deadline())
    zones.managements["a"].features = REFLINKS
    zones.features.require("a", "snapshots", deadline=zones.deadline())
    zones.features.require("a", "snapshots", deadline=zones.deadline())
    assert zones.asked("a") == 2


def test_the_zones_to_list_are_those_with_snapshots() -> None:
    zones = Zones(b=REFLINKS, c=NVMESH_FEATURES, a=REFLINKS)
    assert zones.features.zones_with("snapshots", deadline=zones.deadline()).keys() == {"a", "b"}


def test_a_silent_zone_may_have_snapshots_so_that_a_list_without_it_is_refused() -> None:
    zones = Zones(a=REFLINKS, b=REFLINKS)
    zones.managements["b"].is_reachable = False
    with pytest.raises(StorageUnavailable, match="no response of zone b"):
        zones.features.zones_with("snapshots", deadline=zones.deadline())


def test_a_zone_whose_settings_changed_has_told_nothing_so_that_no_route_is_used_that_its_engine_lacks() -> None:
    zones = Zones(a=REFLINKS)
    zones.features.require("a", "snapshots", deadline=zones.deadline())
    zones.managements["a"] = FakeManagement()
    with pytest.raises(NotOffered, match="NVMesh"):
        zones.features.require("a", "snapshots", deadline=zones.deadline())
    assert zones.features.find("a", "snapshots", deadline=zones.deadline()) is None
    assert zones.features.offered(deadline=zones.deadline()) == Features()
