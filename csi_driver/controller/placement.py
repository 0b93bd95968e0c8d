"""Which zones a volume may live in, and in which order they are tried."""

from __future__ import annotations

from collections.abc import Sequence

from csi_driver.controller.requests import TopologyRequirement
from csi_driver.errors import Exhausted


def allowed_zones(zones: Sequence[str], requirement: TopologyRequirement | None, key: str) -> list[str]:
    """Return the zones that satisfy the requirement, best first (CSI specification, TopologyRequirement).

    Raises `Exhausted` where none does: nothing can be provisioned there.
    """
    if requirement is None:
        return list(zones)
    preferred = [segments.get(key) for segments in requirement.preferred]
    requisite = [segments.get(key) for segments in requirement.requisite]
    allowed = [zone for zone in zones if not requirement.requisite or zone in requisite]
    if not allowed:
        wanted = ", ".join(sorted({str(zone) for zone in requisite}))
        raise Exhausted(f"this driver serves {key} {', '.join(zones)}, wanted one of: {wanted}")
    return sorted(allowed, key=lambda zone: preferred.index(zone) if zone in preferred else len(preferred))
