"""Machines that the agent cannot run on: that is known before anything is touched, and the same at each start."""

from __future__ import annotations

import os
from pathlib import Path

from balloon_agent.errors import Unsupported
from balloon_agent.frames import FRAME
from balloon_agent.linux.installed_memory import end_of_ram
from balloon_agent.size import format_size

# The virtqueue relies on stores staying in order, and gets by without barriers in Python: true of x86 (virtio/queue.py).
MACHINES = ("x86_64",)
# Frame numbers and sizes of a balloon have 32 bits on the wire: le32, virtio 1.3, 5.5.6.
MOST_FRAMES = 1 << 32


def unsupported(machine: str, page_size: int, end: int) -> tuple[str, str] | None:
    """The obstacle and its remedy, if there is one. ``end`` is the address behind the last byte of RAM."""
    if machine not in MACHINES:
        return f"this machine is {machine}, and the agent supports {', '.join(MACHINES)} only", "use the kernel's own driver"
    if page_size != FRAME:
        return f"this kernel has pages of {page_size} bytes, and the agent supports {FRAME} only", "boot one with 4 KiB pages"
    if end > MOST_FRAMES * FRAME:
        most = f"{format_size(MOST_FRAMES * FRAME)}, the end of what a balloon has frame numbers for"
        return f"RAM goes up to {format_size(end)}, beyond {most}", "give the guest less memory, or no balloon"
    return None


def this_machine(proc_root: Path = Path("/proc")) -> tuple[str, int, int]:
    """What ``unsupported`` asks for, of the machine that this process runs on. Without root ``end`` is 0."""
    return os.uname().machine, os.sysconf("SC_PAGE_SIZE"), end_of_ram(proc_root)


def check_supported() -> None:
    """Unsupported, with the remedy, where the agent cannot run."""
    if (found := unsupported(*this_machine())) is not None:
        raise Unsupported("; ".join(found))
