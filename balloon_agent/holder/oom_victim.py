"""The OOM killer waits for what it has won: a killed holder's address space outlasts its pins.

Pinned memory is not free when its process is gone. The kernel gives it back an RCU grace period after the ring is closed, some
ten milliseconds, and as soon as a victim's address space has been torn down the OOM killer looks for the next one. So whoever
needed memory then, or merely had to read its own program back in, killed one holder more, and another, while that of the first
was on its way: of six often all.

There is a second thread, which never does anything, and has none of the process's descriptors. Both are killed at once. The
first closes the rings, while the second keeps the address space; and with that it has to wait for longer than the pins take: an
address space with an AIO context is torn down after two grace periods. Till then there is a victim, and nobody else is killed.

The first thread has to be the first, on one busy processor and on many idle ones. So it has real-time priority while it
answers and waits, and none while it works; and the other one's way out is longer. Where that is not permitted, or comes out
otherwise after all, it is as if there were no second thread.

Sources: exit_mm() before exit_files() in kernel/exit.c; MMF_OOM_SKIP in exit_mmap() of mm/mmap.c and oom_evaluate_task() of
mm/oom_kill.c, whose reaper ends the wait after two seconds whatever happens; exit_aio() and free_ioctx_users() in fs/aio.c;
io_ring_exit_work() in io_uring/io_uring.c; exit_robust_list() in kernel/futex/core.c.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from balloon_agent.linux import libc

# What it needs the numbers of.
SYSCALLS = ("close_range", "io_setup", "set_robust_list")
_CLOSE_RANGE_UNSHARE = 2
_HIGHEST_DESCRIPTOR = 0xFFFFFFFF


class _Link(ctypes.Structure):
    """struct robust_list with what it guards, include/uapi/linux/futex.h."""

    _fields_ = (("next", ctypes.c_void_p), ("futex", ctypes.c_uint64))


class _Head(ctypes.Structure):
    """struct robust_list_head of the same."""

    _fields_ = (("next", ctypes.c_void_p), ("futex_offset", ctypes.c_long), ("pending", ctypes.c_void_p))


@contextmanager
def first_to_end() -> Iterator[None]:
    """For a thread that waits: when all are killed now, its turn comes before the other's, and before any program's."""
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def outlast_pins() -> None:
    """Start that thread, in this process and in each child anew. Where the kernel allows it not, nothing is changed."""
    # Signals are for the first thread.
    signals = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        is_ready = _thread.allocate_lock()
        is_ready.acquire()
        _thread.start_new_thread(_outlast, (is_ready,))
        # Before anything is held, for it to have no descriptor of that. It waits for nobody.
        is_ready.acquire()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def _outlast(is_ready: _thread.LockType) -> None:
    try:
        # A table of its own, with nothing in it.
        libc.syscall("close_range", 0, _HIGHEST_DESCRIPTOR, _CLOSE_RANGE_UNSHARE)
        context = ctypes.c_ulong(0)
        libc.syscall("io_setup", 1, ctypes.addressof(context))
        # On its way out the kernel walks this list, which has no end, as far as it ever walks one: a tenth of a millisecond, in
        # which the other thread is past that point on a processor of its own.
        link, head = _Link(), _Head()
        link.next = ctypes.addressof(link)
        head.next, head.futex_offset = ctypes.addressof(link), _Link.futex.offset
        libc.syscall("set_robust_list", ctypes.addressof(head), ctypes.sizeof(head))
    except OSError:
        return
    finally:
        is_ready.release()
    while True:
        signal.pause()
