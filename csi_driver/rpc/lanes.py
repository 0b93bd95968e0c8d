"""Threads by kind of call, so that health and reads never wait behind work.

grpcio runs a call on the pool that its handler names (`experimental_thread_pool`, grpc/_server.py), else on the
server's own. Threads are made when they are needed and kept.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from csi_driver.rpc.contract import Lane

# Calls that wait for their turn (formatting has a limit of its own, far lower) hold a thread each; what comes on top
# of this many waits in a queue. A boot storm on a node is some hundreds.
WORK_THREADS = 512
_READ_THREADS = 64
_ANSWER_THREADS = 8


class Lanes:
    """One pool per lane."""

    def __init__(self, *, work: int = WORK_THREADS, read: int = _READ_THREADS, answer: int = _ANSWER_THREADS) -> None:
        self._pools = {
            Lane.WORK: ThreadPoolExecutor(work, thread_name_prefix="work"),
            Lane.READ: ThreadPoolExecutor(read, thread_name_prefix="read"),
            Lane.ANSWER: ThreadPoolExecutor(answer, thread_name_prefix="answer"),
        }

    def pool(self, lane: Lane) -> ThreadPoolExecutor:
        """Return the threads of a lane."""
        return self._pools[lane]

    def close(self) -> None:
        """Take no more calls; running ones go on, queued ones are dropped."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
