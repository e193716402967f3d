"""Taking a PCI function from its driver, and giving it back; and which of the ways to it there is.

What was there before is remembered by the caller (``previous``) before anything changes, and comes back on any failure.
"""

from __future__ import annotations

import errno
import logging
import os
import subprocess
from contextlib import suppress
from pathlib import Path

from balloon_agent.errors import (
    BadInput,
    DeviceBusy,
    DriverUnavailable,
    NotPermitted,
    Obstacle,
)

from . import host
from .names import DRIVERS, UIO_DRIVER, VFIO_DRIVER
from .pci import PciFunction

AUTO = "auto"
# Whom we take a balloon from without asking: the kernel's own driver, ourselves, nobody.
KERNEL_DRIVER = "virtio-pci"
# What may have other functions of a group that goes to userspace. drivers/vfio/vfio_main.c, vfio_dev_driver_allowed.
_HARMLESS = ("pci-stub", "pcieport")
_log = logging.getLogger(__name__)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except PermissionError as error:
        raise NotPermitted(f"{path}: {error.strerror}; run as root, and see whether the kernel is locked down") from error


def choose_driver(function: PciFunction, wanted: str = AUTO, sysfs_root: Path = host.SYSFS, *, noiommu: bool = False) -> str:
    """The driver to reach ``function`` through: the one it is with, or ``wanted``, or the best that is possible here.

    DriverUnavailable with the reasons if none is. Its module is loaded, and nothing else changed.
    """
    if noiommu and wanted == UIO_DRIVER:
        raise BadInput(f"--vfio-noiommu is for --driver {VFIO_DRIVER}, not {UIO_DRIVER}")
    known = (wanted,) if wanted != AUTO else (VFIO_DRIVER,) if noiommu else DRIVERS
    obstacles: list[Obstacle] = []
    # What it is with already comes first.
    for driver in sorted(known, key=lambda driver: driver != function.driver):
        why = obstacle(function, driver, sysfs_root, noiommu=noiommu)
        if why is None:
            try:
                require_driver(driver, sysfs_root / "bus/pci")
                return driver
            except DriverUnavailable as error:
                why = Obstacle.of(error)
        obstacles.append(why)
    raise DriverUnavailable(f"{function.address} cannot be reached: {'; '.join(map(str, obstacles))}")


def obstacle(function: PciFunction, driver: str, sysfs_root: Path = host.SYSFS, *, noiommu: bool = False) -> Obstacle | None:
    """The reason for which ``function`` cannot be reached through ``driver`` here; None if there seems to be none."""
    locked = host.lockdown(sysfs_root)
    if driver == UIO_DRIVER:
        if locked:
            return Obstacle(f"not by {driver}, for the kernel is locked down ({locked}): it lets only vfio have registers")
        return None
    if noiommu:
        return Obstacle(f"not by {driver} without an IOMMU, for the kernel is locked down ({locked})") if locked else None
    group = host.group_of(function)
    if group is None:
        return Obstacle(
            f"not by {driver}, for there is no IOMMU",
            "give the VM one (QEMU: -machine q35 -device intel-iommu; and intel_iommu=on for its kernel)",
        )
    others = [
        f"{member.address} ({member.driver})"
        for member in group.members
        if member.address != function.address and member.driver not in (None, VFIO_DRIVER, *_HARMLESS)
    ]
    if others:
        return Obstacle(
            f"not by {driver}, for IOMMU group {group.number} has others in use: {', '.join(others)}",
            "give the balloon a group of its own (QEMU: behind a pcie-root-port)",
        )
    return None


def require_driver(driver: str, bus: Path) -> None:
    """Make sure that the kernel has ``driver``, loading its module if need be. DriverUnavailable if it has not."""
    folder = bus / "drivers" / driver
    if folder.exists():
        return
    try:
        result = subprocess.run(["modprobe", driver], capture_output=True, text=True, timeout=30, check=False)
        said = result.stderr.strip().splitlines()[-1] if result.stderr.strip() else f"exit code {result.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    if not folder.exists():
        raise DriverUnavailable(
            f"the kernel has no driver {driver} ({said}): install the kernel's full module package, "
            f"or a kernel with {host.KERNEL_OPTIONS.get(driver, 'it')}"
        )


class Binding:
    """A function in the hands of ``driver``, until ``restore``. ``previous`` is whom it belonged to."""

    def __init__(self, function: PciFunction, driver: str, previous: str | None, bus: Path) -> None:
        self.function = function
        self.driver = driver
        self.previous = previous
        self._bus = bus

    def restore(self) -> None:
        """Give the function back to its previous driver. Idempotent."""
        if self.function.driver == self.previous:
            return
        _hand_over(self.function, self.previous, self._bus)
        _log.info("%s is back with %s", self.function.address, self.previous or "no driver")


def take(
    function: PciFunction,
    driver: str = UIO_DRIVER,
    previous: str | None = None,
    bus: Path = Path("/sys/bus/pci"),
    *,
    instead_of: str | None = None,
) -> Binding:
    """Bind ``function`` to ``driver``; on any failure its old driver is bound again.

    ``previous`` says whom it belonged to if it is bound to ``driver`` already (an agent died and left it so), or to nobody.
    ``instead_of`` is a driver of ours that it may be taken from. The kernel's balloon driver gives its pages back to the guest
    when it is unbound.
    """
    current = function.driver
    if current not in (None, KERNEL_DRIVER, driver, instead_of):
        remedy = "balloon-agent unbind" if current in DRIVERS else f"echo {function.address} > {function.path}/driver/unbind"
        raise DeviceBusy(f"{function.address} is bound to {current}, which may be using it: unbind it first ({remedy})")
    require_driver(driver, bus)
    if current == driver:
        return Binding(function, driver, previous, bus)
    # Nobody has it if somebody was killed while it was handed over: then it is still whose it was before that.
    binding = Binding(function, driver, previous if current is None else current, bus)
    try:
        _hand_over(function, driver, bus)
    except BaseException:
        binding.restore()
        raise
    _log.info("%s taken from %s by %s", function.address, current or "no driver", driver)
    return binding


def give_to_kernel(function: PciFunction, bus: Path = Path("/sys/bus/pci")) -> None:
    """Bind ``function`` to the kernel's own driver; on any failure its old driver is bound again."""
    current = function.driver
    if current == KERNEL_DRIVER:
        return
    if current not in (None, *DRIVERS):
        raise DeviceBusy(f"{function.address} is bound to {current}, which may be using it: it is left alone")
    require_driver(KERNEL_DRIVER, bus)
    try:
        _hand_over(function, KERNEL_DRIVER, bus)
    except BaseException:
        Binding(function, KERNEL_DRIVER, current, bus).restore()
        raise
    _log.info("%s taken from %s by %s", function.address, current or "no driver", KERNEL_DRIVER)


def clear_override(function: PciFunction) -> None:
    """Undo what somebody has left who was killed between choosing one of our drivers and binding it."""
    override = function.path / "driver_override"
    with suppress(OSError):
        if override.read_text().strip() in DRIVERS:
            override.write_text("\n")


def _require_unused(function: PciFunction, dev_root: Path = Path("/dev")) -> None:
    """DeviceBusy if another program has a function of its group by vfio: who unbinds it would wait for that, unstoppably."""
    group = host.group_of(function)
    if function.driver != VFIO_DRIVER or group is None:
        return
    for name in (group.number, f"noiommu-{group.number}"):
        try:
            os.close(os.open(dev_root / "vfio" / name, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise DeviceBusy(
                    f"{dev_root / 'vfio' / name} is open: another program has {function.address}; end that first"
                ) from error


def _hand_over(function: PciFunction, driver: str | None, bus: Path) -> None:
    """Unbind whoever has it, and have the kernel probe ``driver`` for it; no driver at all if None."""
    override = function.path / "driver_override"
    _write(override, f"{driver}\n" if driver else "\n")
    try:
        if function.driver is not None:
            _require_unused(function)
            _write(function.path / "driver/unbind", function.address)
        if driver is not None:
            try:
                _write(bus / "drivers_probe", function.address)
            except OSError as error:
                raise DriverUnavailable(f"{driver} did not take {function.address}: {error.strerror}; see dmesg") from error
            if function.driver != driver:
                raise DriverUnavailable(
                    f"{driver} did not take {function.address} (it has {function.driver or 'no driver'}); see dmesg"
                )
    finally:
        # An override left behind would bind the function to us again at the next rescan.
        _write(override, "\n")
