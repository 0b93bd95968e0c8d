# SPDX-License-Identifier: Apache-2.0
"""A read-only web page of a storage management: its capacity, volumes and health, behind its own login."""
