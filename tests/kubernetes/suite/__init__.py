# SPDX-License-Identifier: Apache-2.0
"""The official external-storage suite of Kubernetes (e2e.test), run in the test cluster, and its report."""
