"""The pools of huge pages that hugetlbfs has: how many there are of each size, for the whole guest.

The kernel grows a pool by one page after the other, compacting hard, stops at the first that it cannot find, and reports
success all the same: so it is read back. Source: Documentation/admin-guide/mm/hugetlbpage.rst.
"""

from __future__ import annotations

import os
import re

from .files import read_file, write_file

# The same can happen again meanwhile.
_TRIES = 8
HUGEPAGES_ROOT = "/sys/kernel/mm/hugepages"


def folder(root: str, size: int) -> str:
    """Where the kernel shows the pool of pages of ``size`` bytes."""
    return f"{root}/hugepages-{size >> 10}kB"


def exists(root: str, size: int) -> bool:
    """Whether this kernel has huge pages of that size at all."""
    return os.path.isdir(folder(root, size))


def sizes(root: str) -> list[int]:
    """Bytes of each kind of huge pages that this kernel has."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    found = (re.fullmatch(r"hugepages-(\d+)kB", name) for name in names)
    return sorted(int(match[1]) << 10 for match in found if match is not None)


def has_any(root: str, size: int) -> bool:
    """Whether the pool has any page, surplus ones included."""
    return read_file(f"{folder(root, size)}/nr_hugepages") != "0"


def pages(root: str, size: int) -> int:
    """How many pages the pool has to have, used ones included.

    Those beyond that (surplus) go by themselves as soon as they are free, as ours do when the last of their pin has gone: a
    moment after they were given back.
    """
    at = folder(root, size)
    return int(read_file(f"{at}/nr_hugepages")) - int(read_file(f"{at}/surplus_hugepages"))


def set_pages(root: str, size: int, count: int) -> None:
    """Ask for a pool of so many pages. What comes of it, ``pages`` tells. May take long.

    A page that goes free while the kernel makes the pool smaller can end up in it, free, and counted as surplus: nothing would
    ever take it out (mm/hugetlb.c: set_max_huge_pages counts what is in use as surplus a moment after it has freed what is
    free). Asked for as many more, the kernel counts it as one of them again, and frees it when asked for less.
    """
    at = folder(root, size)
    write_file(f"{at}/nr_hugepages", str(count))
    for _ in range(_TRIES):
        stuck = min(int(read_file(f"{at}/surplus_hugepages")), int(read_file(f"{at}/free_hugepages")))
        if stuck == 0:
            return
        write_file(f"{at}/nr_hugepages", str(count + stuck))
        write_file(f"{at}/nr_hugepages", str(count))
