"""A virtio PCI function through uio_pci_generic: registers from sysfs, interrupts from /dev/uioN.

uio_pci_generic knows INTx only. Its handler sets the interrupt-disable bit of the command register; whoever has served
the interrupt clears it again (drivers/uio/uio_pci_generic.c). Closing /dev/uioN clears bus-master, so that a device whose
agent has died can no longer write to memory.
"""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import ExitStack
from pathlib import Path

from balloon_agent.errors import (
    DeviceBusy,
    DeviceFailed,
    DeviceMisbehaved,
    DriverUnavailable,
    NotPermitted,
)
from balloon_agent.linux.pagemap import Pagemap

from .descriptors import raise_above_all
from .dma import DmaMemory
from .host import IDENTITY, group_of
from .names import UIO_DRIVER
from .pci import CLASS_REGISTER, Command, PciFunction
from .transport import PciTransport

LOCKED = "the kernel is locked down, which keeps uio from registers; see --driver vfio-pci"


class UioTransport(PciTransport):
    """One function that uio_pci_generic has."""

    driver = UIO_DRIVER

    def __init__(self, function: PciFunction, dev_root: Path = Path("/dev"), proc_root: str = "/proc") -> None:
        self._dev_root = dev_root
        self._proc_root = proc_root
        super().__init__(function)

    def _open(self, stack: ExitStack) -> None:
        function = self.function
        self.interrupt_fd = self._open_uio()
        stack.callback(os.close, self.interrupt_fd)
        if not function.interrupt_pin:
            raise DriverUnavailable(
                f"{function.address} has no interrupt pin (its register 0x3d is 0), and {function.driver} knows no other "
                "interrupts: let the host give the balloon INTx"
            )
        # Registers only, for now: what an earlier driver has left in the device may not touch memory. See ``enable``.
        try:
            function.set_command(on=Command.MEMORY, off=Command.BUS_MASTER | Command.INTX_DISABLE)
        except PermissionError as error:
            raise NotPermitted(f"{function.path}/config: {error.strerror}: {LOCKED}") from error
        self._find_registers(stack, function.config(), self._map_bar)
        group = group_of(function)
        if group is not None and group.kind != IDENTITY:
            self.unreachable = (
                f"it addresses memory through an IOMMU (group {group.number}, {group.kind}), and {UIO_DRIVER} has nothing "
                "mapped there: use --driver vfio-pci, or boot the guest with iommu=pt"
            )
        pagemap = Pagemap(self._proc_root)
        stack.callback(pagemap.close)
        self.memory = DmaMemory(pagemap)
        stack.callback(self.memory.close)

    def _open_uio(self) -> int:
        names = sorted(path.name for path in (self.function.path / "uio").glob("uio*"))
        if not names:
            raise DeviceBusy(f"{self.function.address} has no uio device: its driver is {self.function.driver or 'none'}")
        path = self._dev_root / names[0]
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except PermissionError as error:
            raise NotPermitted(f"{path}: {error.strerror}; run as root") from error
        # It clears bus-master when it is closed.
        return raise_above_all(fd)

    def _map_bar(self, bar: int) -> mmap.mmap:
        path = self.function.path / f"resource{bar}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise DeviceMisbehaved(f"{self.function.address} names BAR {bar} in a capability but has none") from error
        try:
            return mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES):
                raise NotPermitted(f"mmap of {path}: {error.strerror}: {LOCKED}") from error
            raise
        finally:
            os.close(fd)

    def interrupts(self) -> int | None:
        """The count of interrupts so far, if one came since the last call. Does not block."""
        try:
            return int.from_bytes(os.read(self.interrupt_fd, 4), "little")
        except BlockingIOError:
            return None
        except OSError as error:
            # What uio says of a function that has been taken from it, for whatever reason.
            self.check_present()
            raise DeviceFailed(f"{self.function.address}: no interrupt can be waited for: {error.strerror}") from error

    def enable_interrupt(self) -> None:
        self._set_command(off=Command.INTX_DISABLE)

    def _class(self) -> bytes:
        # Of this very function, and of no other in its place.
        fd = os.open("config", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._folder)
        try:
            return os.pread(fd, 4, CLASS_REGISTER)
        finally:
            os.close(fd)

    def _change_command(self, on: int = 0, off: int = 0) -> None:
        self.function.set_command(on, off)
