# SPDX-License-Identifier: Apache-2.0
"""`kubectl nvmesh`: the plugin of kubectl. Needs the standard library alone, and reaches the cluster by kubectl."""
