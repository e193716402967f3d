"""Where NUMA nodes and their zones begin and end: from /proc/zoneinfo."""

from __future__ import annotations

import re

from balloon_agent.frames import FRAME

_ZONE = re.compile(r"^Node \d+, zone", re.MULTILINE)
_SPANNED = re.compile(r"^\s+spanned\s+(\d+)", re.MULTILINE)
_START = re.compile(r"^\s+start_pfn:\s+(\d+)", re.MULTILINE)


def node_starts(zoneinfo: str, page_size: int) -> list[int]:
    """Frames of 4096 bytes at which a zone of a node begins, or is over; ascending. ``page_size`` is the guest's, in bytes.

    Zones without pages count for nothing, as the kernel says nothing of where they are. Zones may lie within one another,
    where the memory of two nodes alternates: only what they span is known, not each hole.
    """
    starts: set[int] = set()
    for zone in _ZONE.split(zoneinfo)[1:]:
        spanned, start = _SPANNED.search(zone), _START.search(zone)
        if spanned is not None and start is not None and int(spanned[1]):
            starts |= {int(start[1]), int(start[1]) + int(spanned[1])}
    return sorted(page * (page_size // FRAME) for page in starts)
