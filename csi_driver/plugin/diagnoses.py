# SPDX-License-Identifier: Apache-2.0
"""Everything that can be wrong with a volume, in the order in which it is made, attached and mounted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from csi_driver.plugin import making, using
from csi_driver.plugin.cases import Case, Finding

CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    making.no_pod,
    making.no_claim,
    making.claim_is_lost,
    making.claim_is_terminating,
    making.no_class,
    making.other_driver,
    making.controller_is_down,
    making.data_source,
    making.no_consumer,
    making.not_provisioned,
    making.not_scheduled,
    making.volume_of_another_claim,
    making.no_answer_yet,
    making.volume_is_terminating,
    making.no_node_for_volume,
    using.storage_error,
    using.storage_faults,
    using.node_is_down,
    using.lost_node,
    using.node_is_not_registered,
    using.volume_limit,
    using.attachment_errors,
    using.attached_elsewhere,
    using.held_by_hand,
    using.not_attached,
    using.not_mounted,
    using.container_fails,
    using.stuck_pod,
    using.not_expanded,
    using.not_modified,
    using.told_by_the_driver,
    using.unread,
)


def diagnose(*cases: Case) -> Sequence[Finding]:
    """Return every problem, the first cause first; unknown states come last."""
    found = [finding for case in cases for check in CHECKS for finding in check(case)]
    return sorted(dict.fromkeys(found), key=lambda each: not each.is_wrong)
