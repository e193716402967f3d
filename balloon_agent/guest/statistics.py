"""What the running kernel tells about its memory, as the host asks for it on the statistics queue.

Each tag is counted as Linux's own driver counts it (update_balloon_stats() in drivers/virtio/virtio_balloon.c), but for the
minor faults, of which the specification wants those alone: /proc/vmstat's pgfault has the major ones in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import psutil

from balloon_agent.balloon.wire import StatisticTag as Tag

# Tags by the counters of /proc/vmstat that make them up, in pages ...
_PAGES = {
    Tag.SWAP_IN: "pswpin",
    Tag.SWAP_OUT: "pswpout",
    Tag.CACHES: "nr_file_pages",
    Tag.ASYNC_SCANNED: "pgscan_kswapd",
    Tag.DIRECT_SCANNED: "pgscan_direct",
    Tag.ASYNC_RECLAIMED: "pgsteal_kswapd",
    Tag.DIRECT_RECLAIMED: "pgsteal_direct",
}
# ... or in events.
_EVENTS = {
    Tag.MAJOR_FAULTS: "pgmajfault",
    Tag.HUGETLB_ALLOCATIONS: "htlb_buddy_alloc_success",
    Tag.HUGETLB_FAILURES: "htlb_buddy_alloc_fail",
    Tag.OOM_KILLS: "oom_kill",
}
# One for each zone that the kernel has.
_STALLS = "allocstall_"


class GuestStatistics:
    """Reads the same set every time (spec 5.5.6.3.1): what the kernel provided when this object was made."""

    def __init__(self, proc_root: Path = Path("/proc")) -> None:
        self._path = proc_root / "vmstat"
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._tags = sorted(self._now())

    def read(self) -> dict[Tag, int]:
        """Bytes, or numbers, by tag."""
        now = self._now()
        return {tag: now.get(tag, 0) for tag in self._tags}

    def by_name(self) -> dict[str, int]:
        """The same for people."""
        return {tag.name.lower(): value for tag, value in self.read().items()}

    def _now(self) -> dict[Tag, int]:
        memory = psutil.virtual_memory()
        values = {
            Tag.FREE_MEMORY: int(memory.free),
            Tag.TOTAL_MEMORY: int(memory.total),
            Tag.AVAILABLE_MEMORY: int(memory.available),
        }
        counters = self._counters()
        values |= {tag: counters[name] * self._page for tag, name in _PAGES.items() if name in counters}
        values |= {tag: counters[name] for tag, name in _EVENTS.items() if name in counters}
        if {"pgfault", "pgmajfault"} <= counters.keys():
            values[Tag.MINOR_FAULTS] = counters["pgfault"] - counters["pgmajfault"]
        if stalls := [value for name, value in counters.items() if name.startswith(_STALLS)]:
            values[Tag.ALLOCATION_STALLS] = sum(stalls)
        return values

    def _counters(self) -> Mapping[str, int]:
        """/proc/vmstat, or nothing where the kernel has none."""
        try:
            lines = self._path.read_text().splitlines()
        except FileNotFoundError:
            return {}
        return {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
