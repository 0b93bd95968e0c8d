# SPDX-License-Identifier: Apache-2.0
"""A read-only web page of a storage management: what it holds and how it is, behind its own login."""
