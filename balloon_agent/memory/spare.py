"""How much memory the guest could hand over without starving: from /proc/zoneinfo.

MemAvailable answers a different question: what programs can use before the kernel begins to work for it. It counts
everything up to the *high* watermark as gone (47 MiB of a 1 GiB guest), leaves out the free pages on per-CPU lists (up to a
further 43 MiB there), and never falls below 0, so that it cannot tell a tight guest from a starving one. What programs
can really get ends at the *min* watermark: below it the kernel reclaims on their time, and then kills.
Sources: si_mem_available() in mm/show_mem.c, __zone_watermark_ok() in mm/page_alloc.c.
"""

from __future__ import annotations

import re
from pathlib import Path

from .frames import FRAME

_ZONE = re.compile(r"^Node (\d+), zone\s+(\S+)", re.MULTILINE)
_FREE = re.compile(r"^\s+pages free\s+(\d+)", re.MULTILINE)
_COUNT = re.compile(r"^\s+count:\s+(\d+)", re.MULTILINE)
_PROTECTION = re.compile(r"^\s+protection:\s+\(([^)]*)\)", re.MULTILINE)


def _number(name: str, text: str) -> int:
    match = re.search(rf"^\s+{name}\s+(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else 0


def spare_pages(zoneinfo: str) -> int:
    """Pages above the kernel's own reserves, with the half of caches and reclaimable slabs that is sure to go."""
    spare = low = 0
    starts = [*_ZONE.finditer(zoneinfo)]
    for match, following in zip(starts, [*starts[1:], None], strict=True):
        zone = zoneinfo[match.start() : following.start() if following else None]
        free = _FREE.search(zone)
        if free is None:
            continue
        protection = _PROTECTION.search(zone)
        kept = _number("min", zone) + _number("boost", zone)
        kept += max((int(part) for part in protection[1].split(",")), default=0) if protection else 0
        on_lists = sum(int(count) for count in _COUNT.findall(zone))
        spare += max(0, int(free[1]) + on_lists - kept)
        low += _number("low", zone)
    # The per-node counters stand once per node, with its first zone.
    cache = _total("nr_inactive_file", zoneinfo) + _total("nr_active_file", zoneinfo)
    slab = _total("nr_slab_reclaimable", zoneinfo)
    return spare + sum(kind - min(kind // 2, low) for kind in (cache, slab))


def _total(name: str, text: str) -> int:
    return sum(int(value) for value in re.findall(rf"^\s+{name}\s+(\d+)", text, re.MULTILINE))


def spare_bytes(proc_root: Path = Path("/proc"), page_size: int = FRAME) -> int:
    """Bytes that could be taken from the guest right now, down to the kernel's own reserves."""
    return spare_pages((proc_root / "zoneinfo").read_text()) * page_size
