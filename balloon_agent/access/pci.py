"""A PCI function as sysfs shows it, and the search for those that are virtio balloons."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable
from enum import IntFlag
from pathlib import Path

import pyudev

from balloon_agent.errors import DeviceNotFound
from balloon_agent.virtio.spec import VENDOR

# Virtio device type 5, spec 5.5.1: modern id 0x1040 + 5, transitional id 0x1002 (spec 4.1.2).
BALLOON_IDS = (0x1045, 0x1002)
COMMAND_REGISTER = 0x04
CLASS_REGISTER = 0x08
_INTERRUPT_PIN = 0x3D
_ADDRESS = re.compile(r"^(?:([0-9a-f]{4}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])$", re.IGNORECASE)


class Command(IntFlag):
    """The PCI command register."""

    MEMORY = 1 << 1
    BUS_MASTER = 1 << 2
    INTX_DISABLE = 1 << 10


class PciFunction:
    """One function, by its sysfs folder. Holds nothing open."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.address = self.path.name
        # Looked at before each use of the device.
        self._driver_link = str(self.path / "driver")
        self._config_path = str(self.path / "config")

    def __repr__(self) -> str:
        return f"PciFunction({self.address})"

    def _id(self, name: str) -> int:
        return int((self.path / name).read_text(), 16)

    @property
    def is_balloon(self) -> bool:
        return self._id("vendor") == VENDOR and self._id("device") in BALLOON_IDS

    @property
    def driver(self) -> str | None:
        """The name of the driver that is bound to it, or None."""
        try:
            return os.path.basename(os.readlink(self._driver_link))
        except FileNotFoundError:
            return None

    @property
    def identity(self) -> int | None:
        """A number that no other function at this address will have, or None if there is none there."""
        try:
            return os.stat(self._config_path).st_ino
        except FileNotFoundError:
            return None

    @property
    def interrupt_pin(self) -> int:
        """1 to 4 for INTA to INTD, 0 for a function that has no such interrupt."""
        return self.config()[_INTERRUPT_PIN]

    def config(self) -> bytes:
        return (self.path / "config").read_bytes()

    def set_command(self, on: int = 0, off: int = 0) -> None:
        """Set and clear bits of the command register."""
        with (self.path / "config").open("r+b", buffering=0) as config:
            config.seek(COMMAND_REGISTER)
            (before,) = struct.unpack("<H", config.read(2))
            after = (before | on) & ~off
            if after != before:
                config.seek(COMMAND_REGISTER)
                config.write(struct.pack("<H", after))


def _functions_by_udev() -> Iterable[Path]:
    return [Path(device.sys_path) for device in pyudev.Context().list_devices(subsystem="pci")]


def functions(sysfs_root: Path | None = None) -> list[PciFunction]:
    """Every PCI function, in the order of addresses: by udev, or of a tree that looks like /sys."""
    paths = _functions_by_udev() if sysfs_root is None else (sysfs_root / "bus/pci/devices").glob("*")
    return sorted((PciFunction(path) for path in paths), key=lambda function: function.address)


def find_balloon(address: str | None, among: Iterable[PciFunction]) -> PciFunction:
    """The balloon at ``address`` (0000:00:05.0 or 00:05.0), or the only one there is. DeviceNotFound otherwise."""
    known = list(among)
    balloons = [function for function in known if function.is_balloon]
    listed = ", ".join(f"{function.address} ({function.driver or 'no driver'})" for function in balloons) or "none"
    if address is None:
        if len(balloons) == 1:
            return balloons[0]
        if balloons:
            raise DeviceNotFound(f"there are {len(balloons)} virtio balloons: {listed}", "choose one with --device ADDRESS")
        raise DeviceNotFound(
            "no virtio balloon on the PCI bus", "add one to the VM (QEMU: -device virtio-balloon-pci,cont-pages=on)"
        )
    match = _ADDRESS.match(address)
    if not match:
        raise DeviceNotFound(f"{address!r} is no PCI address", f"it looks like 0000:00:05.0 (virtio balloons here: {listed})")
    full = f"{match[1] or '0000'}:{match[2]}:{match[3]}.{match[4]}".lower()
    for function in known:
        if function.address == full:
            if function.is_balloon:
                return function
            raise DeviceNotFound(f"{full} is not a virtio balloon (virtio balloons here: {listed})")
    raise DeviceNotFound(f"there is no PCI function {full} (virtio balloons here: {listed})")
