"""What the kernel says of the ways to a PCI function: IOMMU groups, lockdown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .pci import PciFunction

SYSFS = Path("/sys")
# A group's default domain in which addresses are what they are in memory. Documentation/ABI/testing/sysfs-kernel-iommu_groups.
IDENTITY = "identity"


@dataclass(frozen=True)
class Group:
    """Functions that an IOMMU cannot tell apart.

    ``number`` is the group's name, ``kind`` that of its default domain: ``identity``, ``DMA``.
    """

    number: str
    kind: str
    members: tuple[PciFunction, ...]


def group_of(function: PciFunction) -> Group | None:
    """The function's IOMMU group, or None if no IOMMU is between it and memory."""
    try:
        folder = (function.path / "iommu_group").resolve(strict=True)
    except FileNotFoundError:
        return None
    try:
        kind = (folder / "type").read_text().strip()
    except OSError:
        kind = "unknown"
    members = sorted((PciFunction(path) for path in (folder / "devices").glob("*")), key=lambda member: member.address)
    return Group(folder.name, kind, tuple(members))


def lockdown(sysfs_root: Path = SYSFS) -> str | None:
    """How far the kernel is locked down: ``integrity``, ``confidentiality``, or None if it is not, or does not say."""
    try:
        text = (sysfs_root / "kernel/security/lockdown").read_text()
    except OSError:
        return None
    found = re.search(r"\[(\w+)\]", text)
    return None if found is None or found[1] == "none" else found[1]
