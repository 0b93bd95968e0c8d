# SPDX-License-Identifier: Apache-2.0
"""`kubectl nvmesh release`: what is done for a volume of a lost node, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from csi_driver.plugin.lost_nodes import OUT_OF_SERVICE, Facts, Plan, plan, show
from tests.unit.plugin import objects as made

LOST = made.node(ready="Unknown")
DOWN = made.stored(holders=[made.holder(status="down")])
RELEASED = made.stored(holders=[made.holder(status="down", desired="detaching")])
GOING = made.attachment(metadata={"deletionTimestamp": "2026-11-29T05:00:00Z"})
MARKED = made.node(ready="Unknown", taints=[{"key": OUT_OF_SERVICE, "effect": "NoExecute"}])


def facts(**more: Any) -> Facts:
    usual: dict[str, Any] = {
        "node_name": "node-1", "node": LOST, "attachment": made.attachment(), "volume": DOWN, "node_id": made.NODE_ID,
        "pods": (),
    }  # fmt: skip
    return Facts(**usual | more)


def test_a_node_that_is_not_ready_with_its_client_down_is_marked_out_of_service() -> None:
    found = plan(facts())
    assert found.commands == (("taint", "nodes", "node-1", f"{OUT_OF_SERVICE}=nodeshutdown:NoExecute"),)
    assert any("also of other drivers" in effect for effect in found.effects)


def test_the_attachment_of_a_node_that_is_gone_is_deleted_and_never_its_finalizer() -> None:
    found = plan(facts(node=None))
    assert found.commands == (("delete", "volumeattachment", "csi-node-1-pvc-1", "--wait=false"),)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"node": made.node()}, "is Ready"),
        ({"volume": made.stored(holders=[made.holder()])}, "the machine runs and may write"),
        ({"volume": made.stored(holders=[made.holder(status="unknown")])}, "is unknown"),
        ({"node": None, "volume": made.stored(holders=[made.holder()])}, "the machine runs and may write"),
        ({"node": None, "node_id": "", "volume": made.stored(holders=[made.holder("other", "x")])}, "may write"),
        ({"volume": {"error": "no response of zone a", "kind": "DeadlineReached"}}, "no response of zone a"),
        ({"is_complete": False}, "could not be read"),
        ({"attach_required": False}, "--attach-by node"),
        ({"attachment": GOING}, "is being deleted"),
        ({"is_shared": True}, "Power the machine off. Then: kubectl taint nodes node-1"),
        ({"node": MARKED}, "is marked out of service"),
        ({"volume": made.stored()}, "the storage does not have the volume on node node-1"),
        ({"attachment": None}, "the driver was never asked to detach"),
        ({"node": None, "pods": (made.pod(),)}, "kubectl delete pod web"),
    ],
)
def test_it_is_refused_with_the_reason(given: dict[str, Any], reason: str) -> None:
    found = plan(facts(**given))
    assert (found.commands, found.is_done) == ((), False)
    assert reason in found.reason


@pytest.mark.parametrize(
    "given", [{"attachment": None, "volume": RELEASED}, {"attachment": None, "volume": made.stored()}]
)
def test_a_volume_that_is_released_needs_nothing(given: dict[str, Any]) -> None:
    assert plan(facts(**given)).is_done


def every_state() -> itertools.product[Any]:
    holders = [[made.holder(status=status, desired=desired)] for status in ("ready", "down", "unknown", "exiting")
               for desired in ("attached", "detaching", "detached")]  # fmt: skip
    volumes = [made.stored(holders=each) for each in [*holders, [], [made.holder("x", "y"), made.holder()]]]
    return itertools.product(
        [made.node(), LOST, MARKED, None], [made.attachment(), GOING, None], [*volumes, {"error": "e"}],
        [made.NODE_ID, ""], [(), (made.pod(),)], [True, False], [True, False],
    )  # fmt: skip


def test_nothing_is_done_unless_every_client_that_may_be_the_node_is_down() -> None:
    names = ("node", "attachment", "volume", "node_id", "pods", "attach_required", "is_complete")
    acted = 0
    for state in every_state():
        given = facts(**dict(zip(names, state, strict=True)))
        if not plan(given).commands:
            continue
        acted += 1
        assert given.is_complete
        assert given.attach_required
        assert given.node is None or given.node["status"]["conditions"][0]["status"] != "True"
        assert {each["clientStatus"] for each in given.volume["holders"] if given.node_id in ("", each["nodeId"])} <= {
            "down"
        }
    assert acted


def test_the_commands_are_shown_before_they_are_run() -> None:
    assert "  kubectl delete volumeattachment csi-1" in list(
        show(Plan("gone", (("delete", "volumeattachment", "csi-1"),)))
    )
