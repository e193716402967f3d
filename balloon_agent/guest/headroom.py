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
import time
from collections.abc import Callable
from pathlib import Path

from balloon_agent.frames import FRAME

# Characters: more than the longest number, with the spaces before it.
_NUMBER = 32
# Far more than the kernel's reserves can change meanwhile: bytes beyond what is to be left, and seconds.
PLENTY = 512 << 20
KNOWN_HOLDS = 1.0


def spare_pages(zoneinfo: str) -> tuple[int, int]:
    """Pages above the kernel's own reserves, and besides these the half of caches and reclaimable slabs that is sure to go."""
    spare = low = cache = slab = 0
    # The text begins with "Node", so that the first part is empty.
    for zone in zoneinfo.split("Node ")[1:]:
        # The counters per node stand once per node, with its first zone.
        cache += _number(zone, "\n      nr_inactive_file ") + _number(zone, "\n      nr_active_file ")
        slab += _number(zone, "\n      nr_slab_reclaimable ")
        at = zone.find("\n  pages free ")
        if at < 0:
            continue
        minimum = _number(zone, "\n        min ", at)
        # The min watermark is shown with its boost, which fragmentation brings about, and which goes away again.
        kept = minimum + _protection(zone, at)
        spare += max(0, _number(zone, "\n  pages free ", at) + _on_lists(zone, at) - kept)
        # The low watermark as the kernel sets it by itself: where it is moved for an early warning, caches are as good.
        low += (minimum - _number(zone, "\n        boost ", at)) * 5 // 4
    return spare, sum(kind - min(kind // 2, low) for kind in (cache, slab))


def _number(zone: str, field: str, start: int = 0) -> int:
    """The number after a field; 0 if there is none. Searched for and not parsed: the text is read at every step."""
    at = zone.find(field, start)
    return 0 if at < 0 else int(zone[at + len(field) : at + len(field) + _NUMBER].split(None, 1)[0])


def _protection(zone: str, start: int) -> int:
    """The largest of the pages that a zone keeps from those who could have others."""
    at = zone.find(" protection: (", start)
    values = zone[at + len(" protection: (") : zone.find(")", at)] if at >= 0 else ""
    return max(map(int, values.split(",")), default=0) if values else 0


def _on_lists(zone: str, start: int) -> int:
    """Free pages on the lists of all processors."""
    pages, field = 0, " count: "
    while (start := zone.find(field, start)) >= 0:
        start += len(field)
        pages += int(zone[start : start + _NUMBER].split(None, 1)[0])
    return pages


def is_hopeless(zoneinfo: str) -> bool:
    """kswapd has reclaimed in vain so often that it is not woken up any more, until somebody else has reclaimed something.

    A "hopeless node" in wakeup_kswapd() of mm/vmscan.c.
    """
    return any(_number(node, "") for node in zoneinfo.split("\n  node_unreclaimable:")[1:])


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
        self.hopeless = is_hopeless(zoneinfo)
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
