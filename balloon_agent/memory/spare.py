"""How much memory the guest could hand over without starving: from /proc/zoneinfo.

MemAvailable answers a different question: what programs can use before the kernel begins to work for it. It counts
everything up to the *high* watermark as gone (47 MiB of a 1 GiB guest), leaves out the free pages on per-CPU lists (up to a
further 43 MiB there), and never falls below 0, so that it cannot tell a tight guest from a starving one. What programs
can really get ends at the *min* watermark: below it the kernel reclaims on their time, and then kills.
Sources: si_mem_available() in mm/show_mem.c, __zone_watermark_ok() in mm/page_alloc.c, min_wmark_pages() in
include/linux/mmzone.h.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from .frames import FRAME

# What counts of each zone, in one pass: the text is read at every step.
_LINE = re.compile(
    r"^(?:Node (\d+), zone|\s+(pages free|boost|min|count:|protection:|nr_inactive_file|nr_active_file|nr_slab_reclaimable)"
    r"\s+(\(.*\)|\d+))",
    re.MULTILINE,
)
# kswapd has tried so often in vain that it is not woken up any more, until somebody else has reclaimed something: a "hopeless
# node" in wakeup_kswapd() of mm/vmscan.c.
_HOPELESS = re.compile(r"^  node_unreclaimable:\s+[1-9]", re.MULTILINE)
# Far more than the kernel's reserves can change meanwhile: bytes beyond what is to be left, and seconds.
PLENTY = 512 << 20
KNOWN_HOLDS = 1.0
_CACHES = ("nr_inactive_file", "nr_active_file")


def spare_pages(zoneinfo: str) -> tuple[int, int]:
    """Pages above the kernel's own reserves, and besides these the half of caches and reclaimable slabs that is sure to go."""
    spare = low = cache = slab = 0
    zone: dict[str, int] = {}

    def close() -> None:
        nonlocal spare, low
        if "pages free" in zone:
            # The min watermark is shown with its boost, which fragmentation brings about, and which goes away again.
            kept = zone.get("min", 0) + zone.get("protection:", 0)
            spare += max(0, zone["pages free"] + zone.get("count:", 0) - kept)
            # The low watermark as the kernel sets it by itself: where it is moved for an early warning, caches are as good.
            low += (zone.get("min", 0) - zone.get("boost", 0)) * 5 // 4
        zone.clear()

    for node, name, value in _LINE.findall(zoneinfo):
        if node:
            close()
        elif name == "protection:":
            zone[name] = max((int(part) for part in value[1:-1].split(",")), default=0)
        elif name == "count:":
            # A list for each CPU.
            zone[name] = zone.get(name, 0) + int(value)
        elif name in _CACHES:
            # The per-node counters stand once per node, with its first zone.
            cache += int(value)
        elif name == "nr_slab_reclaimable":
            slab += int(value)
        else:
            zone.setdefault(name, int(value))
    close()
    return spare, sum(kind - min(kind // 2, low) for kind in (cache, slab))


def free_pages_kib(meminfo: bytes) -> int:
    """MemFree."""
    _, _, rest = meminfo.partition(b"MemFree:")
    return int(rest.split(None, 1)[0])


class Spare:
    """Bytes that could be taken from the guest right now, down to the kernel's own reserves.

    Reading and parsing /proc/zoneinfo takes longer than some of the steps that it is read for. Where there are more than
    ``plenty`` bytes without any caches, how far MemFree has moved since the last look says enough.
    ``caches`` is the part of the last answer that caches and slabs would have to go for, which are of use to the guest.
    ``hopeless`` says whether, at the last look, the kernel had given up reclaiming: of need it gives no early sign then.
    """

    def __init__(
        self, plenty: int, page_size: int = FRAME, proc_root: Path = Path("/proc"), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.plenty = plenty
        self._page_size = page_size
        self._zoneinfo = str(proc_root / "zoneinfo")
        # Open as long as this object.
        self._meminfo = (proc_root / "meminfo").open("rb", buffering=0)
        self._clock = clock
        self._known_until = -math.inf
        self.hopeless = False
        self.caches = 0
        # Spare bytes beside those in MemFree, not counting caches, which may be in MemFree by now; mostly negative.
        self._known = 0

    def __call__(self) -> int:
        now = self._clock()
        free = free_pages_kib(os.pread(self._meminfo.fileno(), 65536, 0)) << 10
        if now < self._known_until and free + self._known >= self.plenty:
            self.caches = 0
            return free + self._known
        zoneinfo = _read(self._zoneinfo).decode("ascii")
        self.hopeless = _HOPELESS.search(zoneinfo) is not None
        spare, caches = (pages * self._page_size for pages in spare_pages(zoneinfo))
        self._known, self._known_until = spare - free, now + KNOWN_HOLDS
        self.caches = caches
        return spare + caches


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while data := os.read(fd, 65536):
            parts.append(data)
        return b"".join(parts)
    finally:
        os.close(fd)
