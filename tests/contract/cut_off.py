# SPDX-License-Identifier: Apache-2.0
"""A program that is killed right before its n-th write to its disk: ptrace(2), so that the point is always the same."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Sequence

# include/uapi/linux/ptrace.h
_TRACEME, _PEEKUSER, _SYSCALL, _SETOPTIONS = 0, 3, 24, 0x4200
_MARK_SYSCALLS, _KILL_WITH_TRACER = 1, 0x100000
_MARKED = signal.SIGTRAP | 0x80
# Offsets of the system call's number and its first argument (sys/user.h, struct user_regs_struct), and the numbers of
# those that write (arch/x86/entry/syscalls/syscall_64.tbl), all of x86-64.
_ORIG_RAX, _RDI = 15 * 8, 14 * 8
_WRITES = frozenset({1, 18, 20, 296, 328})


def can_cut_off() -> bool:
    """Return whether this machine is one that the numbers above are of."""
    return os.uname().machine == "x86_64"


def run_until_write(argv: Sequence[str], number: int) -> int:
    """Run a program and kill it right before its `number`-th write beyond standard error; 0 = let it end.

    Return how many such writes it made.
    """
    child = os.fork()
    if child == 0:
        _become(argv)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    os.waitpid(child, 0)
    libc.ptrace(_SETOPTIONS, child, None, _MARK_SYSCALLS | _KILL_WITH_TRACER)
    made, is_entry, deliver = 0, True, 0
    while True:
        libc.ptrace(_SYSCALL, child, None, deliver)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            return made
        deliver = 0
        stopped_by = os.WSTOPSIG(status)
        if stopped_by != _MARKED:
            deliver = stopped_by if stopped_by != signal.SIGTRAP else 0
            continue
        if is_entry and libc.ptrace(_PEEKUSER, child, _ORIG_RAX, None) in _WRITES:
            if libc.ptrace(_PEEKUSER, child, _RDI, None) > 2:
                made += 1
            if made == number and number:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return made - 1
        is_entry = not is_entry


def _become(argv: Sequence[str]) -> None:
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        ctypes.CDLL(None).ptrace(_TRACEME, 0, None, None)
        os.execvp(argv[0], list(argv))
    finally:
        os._exit(127)
