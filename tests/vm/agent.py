# SPDX-License-Identifier: Apache-2.0
"""Run commands in a guest for the tests outside of it: one TCP connection for each command, JSON lines.

A request is `{"argv": [...]}`. The answer is `{"output": text}` for each piece of output, then `{"status": number}`.
When the caller closes its side, the command is killed with what it started, and the rest of its output is sent. It
runs in the guest: only the standard library.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import socketserver
import subprocess
import sys


class Command(socketserver.StreamRequestHandler):
    """One connection."""

    def handle(self) -> None:
        request = json.loads(self.rfile.readline())
        process = subprocess.Popen(
            request["argv"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        with process.stdout, contextlib.suppress(OSError):  # the caller may have gone
            try:
                self._pass_on(process)
                self._answer({"status": process.wait()})
            finally:
                _kill(process)

    def _pass_on(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        output, watched = process.stdout.fileno(), [process.stdout.fileno(), self.connection.fileno()]
        while True:
            readable, _, _ = select.select(watched, [], [])
            if self.connection.fileno() in readable and not self.connection.recv(1):
                watched.remove(self.connection.fileno())
                _kill(process)
            if output in readable:
                data = os.read(output, 1 << 16)
                if not data:
                    return
                self._answer({"output": data.decode(errors="replace")})

    def _answer(self, answer: dict[str, object]) -> None:
        self.connection.sendall(json.dumps(answer).encode() + b"\n")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a command, if it runs, with everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def main() -> None:
    """Serve on the address of the first argument, until the machine ends."""
    host, port = sys.argv[1].rsplit(":", 1)
    with Server((host, int(port)), Command) as server:
        server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.serve_forever()


if __name__ == "__main__":
    main()
