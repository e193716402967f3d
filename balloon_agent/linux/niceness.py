"""Whose turn it is on a busy processor: niceness, Documentation/scheduler/sched-nice-design.rst.

The agent's own work is short, and others wait for it: it runs ahead of them. So does what is done for it, if that is bound to
be short. All the rest, above all zeroing memory, has its turn like any other process.
"""

from __future__ import annotations

import os
from contextlib import suppress

from .process import Process

# Relative to what this process was started with. Others still get a tenth of a processor that both want.
AHEAD, ORDINARY = -10, 0
_STARTED_WITH = os.getpriority(os.PRIO_PROCESS, 0)
_AUTOGROUPS = "/proc/sys/kernel/sched_autogroup_enabled"


def give_priority(steps: int, process: Process | None = None) -> bool:
    """Set the niceness of a process's first thread (None: the calling thread). Whether that could be done (CAP_SYS_NICE).

    Nothing depends on it but time, so that it fails without an error.
    """
    with suppress(OSError):
        if process is None:
            os.setpriority(os.PRIO_PROCESS, 0, _STARTED_WITH + steps)
        elif process.ends_within(0):
            return False
        else:
            # No call sets this by pidfd. If it ends just now its number stays free for long: the kernel gives out all others
            # first (idr_alloc_cyclic() in alloc_pid(), kernel/pid.c).
            os.setpriority(os.PRIO_PROCESS, process.pid, _STARTED_WITH + steps)
        _give_session_priority(steps, process)
        return True
    return False


def _give_session_priority(steps: int, process: Process | None) -> None:
    """The same for its session, where sessions compete and not processes (man 7 sched, autogroup), if it has one of its own."""
    if not os.path.exists(_AUTOGROUPS):
        return
    pid = os.getpid() if process is None else process.pid
    with open(_AUTOGROUPS, encoding="ascii") as file:
        if file.read().strip() != "1" or os.getsid(pid) != pid:
            return
    autogroup: str | int = "/proc/self/autogroup" if process is None else process.open("autogroup", os.O_WRONLY)
    with open(autogroup, "w", encoding="ascii") as file:
        file.write(f"{_STARTED_WITH + steps}\n")
