"""Who attaches volumes, and how: flags of the controller, and of a node that attaches for itself."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING

from csi_driver.config import values as read
from csi_driver.config.flags import Flag, Values
from csi_driver.controller.ports import ControllerSettings, Fencing

if TYPE_CHECKING:
    from csi_driver.compat.clusters import OldSettings


class AttachBy(StrEnum):
    """Who attaches: the controller, asked by the orchestrator; or each node for itself, when it stages."""

    CONTROLLER = "controller"
    NODE = "node"


ATTACH_BY = Flag(
    "--attach-by",
    read.choice(*AttachBy),
    AttachBy.CONTROLLER.value,
    AttachBy.CONTROLLER.value,
    "Which role attaches volumes: controller, or node where the orchestrator has no attacher. Set the same on"
    " controller and nodes. With node, nodes need the management's address and credentials.",
    metavar="WHO",
)
_FORCE_DETACH = Flag(
    "--force-detach",
    read.boolean,
    False,
    "false",
    "Detach volumes by force, even if their device is in use: unwritten data is lost. Applies to detachments that begin"
    " after it was set.",
)
_FENCING = Flag(
    "--fencing",
    read.choice(*Fencing),
    Fencing.RECORDED.value,
    Fencing.RECORDED.value,
    "When to take a volume from a node that has it attached: never; recorded = after ControllerUnpublishVolume and with"
    " the node's storage client down (not possible with --attach-by node); always.",
    metavar="WHEN",
)
_USE_PREEMPT = Flag(
    "--use-preempt", read.boolean, False, "false", "usePreempt of older drivers: same as --fencing always."
)
_ATTACH_WAIT = Flag(
    "--attach-io-enabled-timeout",
    read.seconds,
    30.0,
    "30",
    "Time limit for an attachment to have I/O enabled.",
    unit="seconds",
    metavar="TIME",
)
_DETACH_WAIT = Flag(
    "--detach-timeout",
    read.seconds,
    60.0,
    "60",
    "Time limit of a detachment.",
    unit="seconds",
    metavar="TIME",
)

ATTACH_FLAGS = (_FORCE_DETACH, _FENCING, _USE_PREEMPT, _ATTACH_WAIT, _DETACH_WAIT)


def attaching(settings: ControllerSettings, values: Values, old: OldSettings) -> ControllerSettings:
    """Add how volumes are attached to the settings; what no flag says may stand in an old driver's configuration."""
    return replace(
        settings,
        force_detach=values.chosen(_FORCE_DETACH, old.force_detach),
        fencing=_fencing(values, use_preempt=values.chosen(_USE_PREEMPT, old.use_preempt)),
        attach_wait_s=values.chosen(_ATTACH_WAIT, old.attach_wait_s),
        detach_wait_s=values.chosen(_DETACH_WAIT, old.detach_wait_s),
    )


def _fencing(values: Values, *, use_preempt: bool) -> Fencing:
    fencing = Fencing(values.one(_FENCING))
    if not use_preempt:
        return fencing
    if fencing is Fencing.NEVER and values.given(_FENCING):
        values.problems.append("--use-preempt and --fencing never are both given; set only one of them")
    return Fencing.ALWAYS
