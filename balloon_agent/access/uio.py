"""A virtio PCI function through uio_pci_generic: registers from sysfs, interrupts from /dev/uioN.

uio_pci_generic knows INTx only. Its handler sets the interrupt-disable bit of the command register; whoever has served
the interrupt clears it again (drivers/uio/uio_pci_generic.c). Closing /dev/uioN clears bus-master, so that a device whose
agent has died can no longer write to memory.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
from contextlib import ExitStack, suppress
from pathlib import Path

from balloon_agent.errors import (
    DeviceBusy,
    DeviceFailed,
    DeviceGone,
    DeviceMisbehaved,
    DeviceTaken,
    DriverUnavailable,
    NotPermitted,
)
from balloon_agent.memory.pagemap import Pagemap
from balloon_agent.virtio.capabilities import Layout, Region, layout
from balloon_agent.virtio.registers import Window

from .dma import DmaMemory, DmaPage
from .pci import Command, PciFunction

# Above every other descriptor of this process, and below the usual limit of 1024.
HIGH_DESCRIPTOR = 900


class UioTransport:
    """Registers, interrupt and memory of one function. Close only after the device has been reset."""

    def __init__(self, function: PciFunction, dev_root: Path = Path("/dev"), proc_root: str = "/proc") -> None:
        self._function = function
        self._identity = function.identity
        self._driver = function.driver
        with ExitStack() as stack:
            # Stands for this very function: in the folder of one that is gone there is nothing any more.
            self._folder = os.open(function.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, self._folder)
            self.interrupt_fd = self._open_uio(dev_root)
            stack.callback(os.close, self.interrupt_fd)
            # Registers only, for now: what an earlier driver has left in the device may not touch memory. See ``enable``.
            if not function.interrupt_pin:
                raise DriverUnavailable(
                    f"{function.address} has no interrupt pin (its register 0x3d is 0), and {function.driver} knows no other "
                    "interrupts: let the host give the balloon INTx"
                )
            function.set_command(on=Command.MEMORY, off=Command.BUS_MASTER | Command.INTX_DISABLE)
            found: Layout = layout(function.config())
            bars = {bar: stack.enter_context(self._map_bar(bar)) for bar in found.bars()}
            views = {bar: stack.enter_context(memoryview(mapped)) for bar, mapped in bars.items()}
            self.common = self._window(stack, views, found.common, "common configuration")
            self.notify = self._window(stack, views, found.notify, "notify region")
            self.isr = self._window(stack, views, found.isr, "interrupt status")
            self.device = self._window(stack, views, found.device, "device configuration")
            self.notify_multiplier = found.notify_multiplier
            pagemap = Pagemap(proc_root)
            stack.callback(pagemap.close)
            self.memory = DmaMemory(pagemap)
            stack.callback(self.memory.close)
            # The first to be undone: should the device not have been reset, it loses its access to memory here.
            stack.callback(self._disable_if_ours)
            self._stack = stack.pop_all()

    def _open_uio(self, dev_root: Path) -> int:
        names = sorted(path.name for path in (self._function.path / "uio").glob("uio*"))
        if not names:
            raise DeviceBusy(f"{self._function.address} has no uio device: its driver is {self._function.driver or 'none'}")
        path = dev_root / names[0]
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except PermissionError as error:
            raise NotPermitted(f"{path}: {error.strerror}; run as root") from error
        # When a process dies, Linux lets go of its files from the highest descriptor down. This one clears bus-master, and is
        # to go before the pins of the ring pages.
        try:
            return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH_DESCRIPTOR)
        finally:
            os.close(fd)

    def _map_bar(self, bar: int) -> mmap.mmap:
        path = self._function.path / f"resource{bar}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise DeviceMisbehaved(f"{self._function.address} names BAR {bar} in a capability but has none") from error
        try:
            return mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES):
                raise NotPermitted(f"mmap of {path}: {error.strerror}; is the kernel locked down (secure boot)?") from error
            raise
        finally:
            os.close(fd)

    def _window(self, stack: ExitStack, views: dict[int, memoryview], region: Region, name: str) -> Window:
        whole = views[region.bar]
        region.check(len(whole), name)
        piece = stack.enter_context(whole[region.offset : region.offset + region.length])
        window = Window(piece, name)
        stack.callback(window.release)
        return window

    def allocate_pages(self, count: int) -> list[DmaPage]:
        """Pinned pages that stay until ``close``."""
        return self.memory.allocate(count)

    def interrupts(self) -> int | None:
        """The count of interrupts so far, if one came since the last call. Does not block."""
        try:
            return int.from_bytes(os.read(self.interrupt_fd, 4), "little")
        except BlockingIOError:
            return None
        except OSError as error:
            # What uio says of a function that has been taken from it, for whatever reason.
            self.check_present()
            raise DeviceFailed(f"{self._function.address}: no interrupt can be waited for: {error.strerror}") from error

    def check_present(self) -> None:
        """DeviceGone unless the function is there: otherwise there is nothing behind its registers, and touching them kills.

        DeviceTaken if it is not with the driver any more that it was with: then it is not ours to touch.
        """
        # One look, for this is asked at every step; the rest is for who has to know more.
        try:
            if os.readlink("driver", dir_fd=self._folder).rpartition("/")[2] == self._driver:
                return
        except FileNotFoundError:
            pass
        if self._function.identity != self._identity:
            raise DeviceGone(f"{self._function.address} is not there any more: was it unplugged?")
        if (driver := self._function.driver) != self._driver:
            raise DeviceTaken(f"{self._function.address} is bound to {driver or 'no driver'} now, and was to {self._driver}")

    def _set_command(self, on: int = 0, off: int = 0) -> None:
        self.check_present()
        try:
            self._function.set_command(on, off)
        except OSError as error:
            raise DeviceFailed(f"{self._function.address}: its command register: {error.strerror}") from error

    def wait_interrupt(self, timeout: float) -> bool:
        """Whether an interrupt came within ``timeout`` seconds."""
        poller = select.poll()
        poller.register(self.interrupt_fd, select.POLLIN)
        return bool(poller.poll(timeout * 1000)) and self.interrupts() is not None

    def enable_interrupt(self) -> None:
        """Let the next interrupt through. Only after the device has been asked for its cause: reading that deasserts it."""
        self._set_command(off=Command.INTX_DISABLE)

    def enable(self) -> None:
        """Let the device address memory. Only once it has been reset."""
        self._set_command(on=Command.BUS_MASTER)

    def disable(self) -> None:
        """Take the device's access to memory away, also where it cannot be reset."""
        self._set_command(off=Command.BUS_MASTER)

    def _disable_if_ours(self) -> None:
        with suppress(DeviceFailed):
            self.disable()

    def close(self) -> None:
        self._stack.close()
