# SPDX-License-Identifier: Apache-2.0
"""Roles and arguments in command lines."""

from __future__ import annotations

import pytest

from csi_driver.host.processes import parse_role


@pytest.mark.parametrize(
    ("argv", "called"),
    [
        (["/opt/nvmesh-csi/bin/python3", "/opt/nvmesh-csi/bin/nvmesh-csi", "node", "--zone=a"], ["node", "--zone=a"]),
        (["nvmesh-csi", "node"], ["node"]),
        (["python3", "-m", "csi_driver", "node", "--node-name", "node"], ["node", "--node-name", "node"]),
        (["python3", "-I", "-m", "csi_driver", "node"], ["node"]),
        (["nvmesh-csi", "controller"], []),
        (["nvmesh-csi", "pre-stop", "node"], []),
        (["nvmesh-csi"], []),
        (["grep", "-r", "csi_driver", "node"], []),
        (["sh", "-c", "sleep 1; nvmesh-csi node"], []),
        (["a", "b", "c", "d", "nvmesh-csi", "node"], []),
        ([], []),
    ],
)
def test_the_role_is_read_from_the_command_line(argv: list[str], called: list[str]) -> None:
    assert list(parse_role(argv, ["node"])) == called
