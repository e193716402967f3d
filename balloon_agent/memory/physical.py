"""How much memory the machine has, whoever has it: the limit of what a host can sensibly ask for.

MemTotal is less (the kernel keeps some for itself, and leaves offline blocks out), so it is no such limit.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import blocks

_SYSTEM_RAM = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) : System RAM$", re.MULTILINE)


def physical_bytes(memory_root: str = blocks.MEMORY_ROOT, proc_root: Path = Path("/proc")) -> int:
    """Bytes of RAM, those included that are offline. Reading the ranges of /proc/iomem needs root.

    Memory blocks are counted where the kernel has them, which can be up to a block too many; else the ranges of System RAM.
    """
    size = blocks.block_size(memory_root)
    if size is not None:
        return size * blocks.count(memory_root)
    ranges = _SYSTEM_RAM.findall((proc_root / "iomem").read_text())
    return sum(int(end, 16) - int(begin, 16) + 1 for begin, end in ranges)
