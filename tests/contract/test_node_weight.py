# SPDX-License-Identifier: Apache-2.0
"""What a node's process has loaded while it serves: the standard library loads the most inside its functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Ends the node once it serves, and tells what it has loaded until then.
_RUN = """
import os, signal, sys, threading, time
from csi_driver.__main__ import main

def end(socket):
    while not os.path.exists(socket):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end, args=(sys.argv[3],), daemon=True).start()
print(main(sys.argv[1:]), *sys.modules)
"""


def test_a_node_loads_no_archive_reader_and_no_name_tables(tmp_path: Path) -> None:
    ended = subprocess.run(
        [
            sys.executable, "-c", _RUN, "node", "--endpoint", str(tmp_path / "s"), "--node-name", "node-1",
            "--state-directory", str(tmp_path / "state"), "--path-root", str(tmp_path),
            "--device-directory", str(tmp_path / "dev"), "--status-directory", str(tmp_path / "proc"),
            "--http-listen", "127.0.0.1:0",
        ],
        stdout=subprocess.PIPE, text=True, timeout=60, check=True,
    )  # fmt: skip
    status, *loaded = ended.stdout.split()
    assert status == "0"
    assert "csi_driver.telemetry.pages" in loaded
    assert not {"csv", "zipfile", "unicodedata"} & set(loaded)
