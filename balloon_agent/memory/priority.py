"""Whose turn it is on a busy processor: niceness, as in Documentation/scheduler/sched-nice-design.rst.

The agent's own work is short, and others wait for it: it runs ahead of them. So does what is done for it, if that is bound to
be short. All the rest, above all zeroing memory, has its turn like any other process.
"""

from __future__ import annotations

import os
from contextlib import suppress

# Others still get a tenth of a processor that both want.
AHEAD, ORDINARY = -10, 0


def give_priority(niceness: int, process: int = 0) -> bool:
    """Set the niceness of a process's first thread (0: the calling thread). Whether that was permitted (CAP_SYS_NICE)."""
    with suppress(PermissionError, ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, process, niceness)
        return True
    return False
