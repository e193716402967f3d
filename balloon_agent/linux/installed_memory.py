"""How much memory the machine has, whoever has it: the limit of what a host can sensibly ask for.

MemTotal is less (the kernel keeps some for itself, and leaves offline blocks out), so it is no such limit.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import memory_blocks

# What firmware keeps of the end of RAM below 4 GiB, at most: larger reserved ranges are windows of the chipset's.
_MOST_KEPT = 16 << 20
_FOUR_GIB = 1 << 32
_RANGE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) : (System RAM|Reserved|ACPI \S.*|reserved)$", re.MULTILINE)
_SYSTEM_RAM = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) : System RAM$", re.MULTILINE)


def physical_bytes(memory_root: str = memory_blocks.MEMORY_ROOT, proc_root: Path = Path("/proc")) -> int:
    """Bytes of RAM, those included that are offline. Reading the ranges of /proc/iomem needs root.

    Memory blocks are counted where the kernel has them, which can be up to a block too many; else the ranges of System RAM.
    """
    size = memory_blocks.block_size(memory_root)
    if size is not None:
        return size * memory_blocks.count(memory_root)
    ranges = _SYSTEM_RAM.findall((proc_root / "iomem").read_text())
    return sum(int(end, 16) - int(begin, 16) + 1 for begin, end in ranges)


def end_of_ram(proc_root: Path = Path("/proc")) -> int:
    """The address behind the last byte of RAM, offline memory included. 0 without root, which alone is shown the addresses."""
    ranges = _SYSTEM_RAM.findall((proc_root / "iomem").read_text())
    return max((int(end, 16) + 1 for _, end in ranges if int(end, 16)), default=0)


def machine_bytes(proc_root: Path = Path("/proc")) -> int:
    """Bytes of RAM that the hypervisor has given the machine, what firmware keeps included: so much QEMU's monitor counts.

    RAM below 4 GiB begins at 0, holes for old hardware included, and ends where firmware has put its tables. OSError, or 0
    without root, which alone is shown the addresses.
    """
    found = _RANGE.findall((proc_root / "iomem").read_text())
    ranges = [(int(begin, 16), int(end, 16) + 1, kind) for begin, end, kind in found if int(end, 16)]
    ram = [(begin, end) for begin, end, kind in ranges if kind == "System RAM"]
    low = max((end for _, end in ram if end <= _FOUR_GIB), default=0)
    for begin, end, kind in ranges:
        if kind != "System RAM" and begin == low and end - begin <= _MOST_KEPT:
            low = end
    return low + sum(end - begin for begin, end in ram if begin >= _FOUR_GIB)
