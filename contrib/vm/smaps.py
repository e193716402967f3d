"""What the host spends on the guest's RAM: one mapping of the QEMU process, read from /proc/PID/smaps."""

from __future__ import annotations

import re
from dataclasses import dataclass

_HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")
_FIELD = re.compile(r"^(\w+):\s+(\d+) kB")


@dataclass(frozen=True)
class GuestRam:
    """Sizes in KiB, of the mapping that holds the guest's RAM and of nothing else."""

    size_kib: int
    rss_kib: int
    anon_huge_kib: int


def mapping_at(smaps: str, address: int) -> GuestRam:
    """The mapping that holds the host virtual ``address``; LookupError if none does."""
    inside = False
    fields: dict[str, int] = {}
    for line in smaps.splitlines():
        if header := _HEADER.match(line):
            if inside:
                break
            inside = int(header[1], 16) <= address < int(header[2], 16)
        elif inside and (field := _FIELD.match(line)):
            fields[field[1]] = int(field[2])
    if not fields:
        raise LookupError(f"no mapping holds the address {address:#x}")
    return GuestRam(fields["Size"], fields["Rss"], fields["AnonHugePages"])
