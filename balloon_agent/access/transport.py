"""A virtio PCI function as the device layer wants it: registers, an interrupt to wait for, memory that it may address.

What the ways to a function have in common; each way (uio.py, vfio.py) has its own files, interrupts and command register.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
from collections.abc import Callable
from contextlib import ExitStack, suppress

from balloon_agent.errors import DeviceFailed, DeviceGone, DeviceTaken
from balloon_agent.virtio.capabilities import Region, layout
from balloon_agent.virtio.registers import Window

from .dma import DmaMemory, DmaPage
from .pci import Command, PciFunction

# What the kernel says of files of what is not there any more.
_GONE = (errno.ENOENT, errno.ENODEV, errno.ENXIO)


class PciTransport:
    """Registers, interrupt and memory of one function. Close only after the device has been reset.

    ``driver`` is the kernel's driver that it goes through. ``translated`` says that what the device addresses goes through
    an IOMMU, if it takes part in that (ACCESS_PLATFORM): then it reaches our pages and no others. ``unreachable``, if not
    None, says why such a device would not even reach those.
    """

    driver: str
    interrupt_fd: int
    # Readable, as ``interrupt_fd`` is then, when the kernel wants the device back. None where it just takes it.
    request_fd: int | None = None
    memory: DmaMemory
    translated = False
    unreachable: str | None = None

    def __init__(self, function: PciFunction) -> None:
        self.function = function
        self._identity = function.identity
        self._bound_to = function.driver
        with ExitStack() as stack:
            # Stands for this very function: in the folder of one that is gone there is nothing any more.
            self._folder = os.open(function.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, self._folder)
            self._open(stack)
            # The first to be undone: should the device not have been reset, it loses its access to memory here.
            stack.callback(self._disable_if_ours)
            self._stack = stack.pop_all()

    def _open(self, stack: ExitStack) -> None:
        """Open everything; the stack closes it."""
        raise NotImplementedError

    def _change_command(self, on: int = 0, off: int = 0) -> None:
        """Set and clear bits of the command register. OSError if the function does not let us."""
        raise NotImplementedError

    def interrupts(self) -> int | None:
        """How many interrupts there were, if one came since the last call. Does not block."""
        raise NotImplementedError

    def enable_interrupt(self) -> None:
        """Let the next interrupt through. Only after the device has been asked for its cause: reading that deasserts it."""
        raise NotImplementedError

    def _find_registers(self, stack: ExitStack, config: bytes, map_bar: Callable[[int], mmap.mmap]) -> None:
        found = layout(config)
        bars = {bar: stack.enter_context(map_bar(bar)) for bar in found.bars()}
        views = {bar: stack.enter_context(memoryview(mapped)) for bar, mapped in bars.items()}
        self.common = self._window(stack, views, found.common, "common configuration")
        self.notify = self._window(stack, views, found.notify, "notify region")
        self.isr = self._window(stack, views, found.isr, "interrupt status")
        self.device = self._window(stack, views, found.device, "device configuration")
        self.notify_multiplier = found.notify_multiplier

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

    def check_present(self) -> None:
        """DeviceGone unless the function is there: otherwise there is nothing behind its registers, and touching them kills.

        DeviceTaken if it is not with the driver any more that it was with: then it is not ours to touch.
        """
        # One look, for this is asked at every step; the rest is for who has to know more.
        try:
            if os.readlink("driver", dir_fd=self._folder).rpartition("/")[2] == self._bound_to:
                return
        except FileNotFoundError:
            pass
        if self.function.identity != self._identity:
            raise DeviceGone(f"{self.function.address} is not there any more: was it unplugged?")
        if (driver := self.function.driver) != self._bound_to:
            raise DeviceTaken(f"{self.function.address} is bound to {driver or 'no driver'} now, and was to {self._bound_to}")

    def answers(self) -> bool:
        """Whether there is anything: all registers of a function that was pulled out read as ones."""
        try:
            return self._class() != b"\xff" * 4
        except OSError as error:
            return error.errno not in _GONE

    def _class(self) -> bytes:
        """Revision and class in its configuration space, as the device has them. OSError if there is none."""
        raise NotImplementedError

    def wait_interrupt(self, timeout: float) -> bool:
        """Whether an interrupt came within ``timeout`` seconds."""
        poller = select.poll()
        poller.register(self.interrupt_fd, select.POLLIN)
        return bool(poller.poll(timeout * 1000)) and self.interrupts() is not None

    def _set_command(self, on: int = 0, off: int = 0) -> None:
        self.check_present()
        try:
            self._change_command(on, off)
        except OSError as error:
            raise DeviceFailed(f"{self.function.address}: its command register: {error.strerror}") from error

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
