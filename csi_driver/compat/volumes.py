"""Names that the drivers 1.4 and 1.9 gave to what they stored with volumes. Pure."""

from __future__ import annotations

METADATA_FIELD = "csi_metadata"
"""Field of the volume's document for its metadata, where the management is older than API version 15."""
