"""What this kernel lets userspace do with a PCI function: IOMMU groups, lockdown, modules. Looked at, and nothing changed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .names import UIO_DRIVER, VFIO_DRIVER
from .pci import PciFunction

SYSFS = Path("/sys")
# A group's default domain in which addresses are what they are in memory. Documentation/ABI/testing/sysfs-kernel-iommu_groups.
IDENTITY = "identity"
_CHOSEN = re.compile(r"\[(\S+)\]")
# Where modprobe is told what to do in place of loading a module (modprobe.d(5)).
_MODPROBE_FOLDERS = ("etc/modprobe.d", "run/modprobe.d", "usr/local/lib/modprobe.d", "usr/lib/modprobe.d", "lib/modprobe.d")
# What a kernel is built with to have them.
KERNEL_OPTIONS = {UIO_DRIVER: "CONFIG_UIO_PCI_GENERIC", VFIO_DRIVER: "CONFIG_VFIO_PCI"}


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


def chosen(text: str) -> str | None:
    """The word in brackets of a file that lists all there are: ``none [integrity] confidentiality``."""
    match = _CHOSEN.search(text)
    return match[1] if match else None


def lockdown(sysfs_root: Path = SYSFS) -> str | None:
    """How far the kernel is locked down: ``integrity``, ``confidentiality``, or None if it is not, or does not say."""
    try:
        found = chosen((sysfs_root / "kernel/security/lockdown").read_text())
    except OSError:
        return None
    return None if found == "none" else found


def module_obstacle(driver: str, root: Path = Path("/")) -> tuple[str, str] | None:
    """Why a PCI driver is not to be had here, and what to do; None if it is there, or its module can be loaded.

    LookupError if that cannot be told: there is no list of modules.
    """
    if is_loaded(driver, root):
        return None
    name = driver.replace("-", "_")
    release = (root / "proc/sys/kernel/osrelease").read_text().strip()
    folder = next((path for path in (root / "lib/modules", root / "usr/lib/modules") if (path / release).is_dir()), None)
    if folder is None:
        raise LookupError(f"there is no /lib/modules/{release}")
    folder /= release
    files = [line.partition(":")[0] for part in ("modules.dep", "modules.builtin") for line in _lines(folder / part)]
    if not any(Path(file).name.partition(".")[0].replace("-", "_") == name for file in files):
        return (
            f"kernel {release} has no {driver}",
            f"install the kernel's full module package, or a kernel with {KERNEL_OPTIONS[driver]}",
        )
    if (refusal := _refusal(name, root)) is not None:
        return f"{refusal} keeps {driver} from being loaded", f"remove its line from {refusal}"
    if _lines(root / "proc/sys/kernel/modules_disabled") == ["1"]:
        return (
            f"{driver} is not loaded, and kernel.modules_disabled forbids it",
            f"echo {driver} >/etc/modules-load.d/balloon-agent.conf, and boot again",
        )
    return None


def is_loaded(driver: str, root: Path = Path("/")) -> bool:
    """Whether the kernel has a PCI driver of that name right now."""
    return (root / "sys/bus/pci/drivers" / driver).exists()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _refusal(name: str, root: Path) -> Path | None:
    """The file, as seen from the root, that makes modprobe do nothing, or fail, in place of loading a module."""
    for folder in _MODPROBE_FOLDERS:
        for path in sorted((root / folder).glob("*.conf")):
            for line in _lines(path):
                match line.split():
                    case ["install", module, command, *_] if module.replace("-", "_") == name and (
                        Path(command).name in ("true", "false", ":")
                    ):
                        return Path("/") / path.relative_to(root)
    return None
