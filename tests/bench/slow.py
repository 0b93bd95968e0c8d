# SPDX-License-Identifier: Apache-2.0
"""A management server that takes its time: everything between client and server is passed on, each request late.

It counts the requests that are being served at the same time, as it is there to show that they stay few.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

_CHUNK_BYTES = 1 << 16


class SlowServer:
    """Listens before another server of this machine. One connection carries one request at a time (HTTP/1.1)."""

    def __init__(self, target_port: int, delay_s: float) -> None:
        self._target_port = target_port
        self._delay_s = delay_s
        self.in_flight = self.most_in_flight = self.requests = 0
        self.port = 0

    def reset(self) -> None:
        """Reset the counters."""
        self.most_in_flight = self.requests = 0

    async def serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        """Serve until `stop` is set."""
        server = await asyncio.start_server(self._serve_one, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        async with server:
            await stop.wait()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        is_busy = False

        async def requests() -> None:
            nonlocal is_busy
            while data := await reader.read(_CHUNK_BYTES):
                if not is_busy:
                    is_busy = True
                    self._begin()
                    await asyncio.sleep(self._delay_s)
                target_writer.write(data)
                await target_writer.drain()
            target_writer.close()

        async def answers() -> None:
            nonlocal is_busy
            while data := await target_reader.read(_CHUNK_BYTES):
                if is_busy:
                    is_busy = False
                    self.in_flight -= 1
                writer.write(data)
                await writer.drain()
            writer.close()

        # Cancelled when serving ends while clients are still connected.
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await asyncio.gather(requests(), answers())

    def _begin(self) -> None:
        self.requests += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)


@contextlib.contextmanager
def slow_server(target_port: int, delay_s: float) -> Iterator[SlowServer]:
    """Run one on a thread of its own."""
    slow = SlowServer(target_port, delay_s)
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def run() -> None:
        loop.run_until_complete(slow.serve(started, stop))
        for task in asyncio.all_tasks(loop):
            task.cancel()
            loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    if not started.wait(30):
        raise SystemExit("the slow server did not start")
    try:
        yield slow
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
