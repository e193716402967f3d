"""A virtio PCI function through vfio-pci: registers, interrupts and configuration from the device's own descriptor.

The kernel gives a function to userspace this way if an IOMMU keeps it, and all that shares its group, from the rest of memory:
a container says what the group may address, and only our pages are in it, each at its guest-physical address. The function is
reset when its descriptor is opened, and again when that is closed, however this process ends.
Source: include/uapi/linux/vfio.h, Documentation/driver-api/vfio.rst.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import struct
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from balloon_agent.errors import (
    DeviceBusy,
    DeviceFailed,
    DeviceGone,
    DeviceMisbehaved,
    DeviceWanted,
    DriverUnavailable,
    NotPermitted,
)
from balloon_agent.frames import FRAME
from balloon_agent.linux.pagemap import Pagemap

from .descriptors import raise_above_all
from .dma import DmaMemory
from .host import group_of
from .names import UIO_DRIVER, VFIO_DRIVER
from .pci import (
    CLASS_REGISTER,
    COMMAND_REGISTER,
    Command,
    PciFunction,
)
from .transport import PciTransport

_API_VERSION = 0
_TYPE1_V2, _NO_IOMMU = 3, 8
_BASE = ord(";") << 8 | 100
(
    GET_API_VERSION,
    CHECK_EXTENSION,
    SET_IOMMU,
    GROUP_GET_STATUS,
    GROUP_SET_CONTAINER,
    _,
    GROUP_GET_DEVICE_FD,
    _,
    DEVICE_GET_REGION_INFO,
    DEVICE_GET_IRQ_INFO,
    DEVICE_SET_IRQS,
    _,
    _,
    IOMMU_MAP_DMA,
    IOMMU_UNMAP_DMA,
) = range(_BASE, _BASE + 15)
_GROUP_VIABLE = 1
_CONFIG_REGION = 7
_REGION_MAPPABLE = 4
_INTX, _REQUEST = 0, 4
_DATA_NONE, _DATA_EVENTFD = 1, 4
_UNMASK, _TRIGGER = 16, 32
_MAP_READ_WRITE = 3

Ioctl = Callable[[int, int, Any], int]


class GroupStatus(ctypes.Structure):
    _fields_ = (("argsz", ctypes.c_uint32), ("flags", ctypes.c_uint32))


class RegionInfo(ctypes.Structure):
    _fields_ = (
        ("argsz", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("index", ctypes.c_uint32),
        ("cap_offset", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
    )


class IrqInfo(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("argsz", "flags", "index", "count"))


class DmaMap(ctypes.Structure):
    _fields_ = (
        ("argsz", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("vaddr", ctypes.c_uint64),
        ("iova", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    )


class DmaUnmap(ctypes.Structure):
    _fields_ = (
        ("argsz", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("iova", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    )


def _count(eventfd: int) -> int | None:
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return None


def _ioctl(fd: int, request: int, argument: Any) -> int:
    # The answer is a number only where the argument is one, or may be written to.
    return int(fcntl.ioctl(fd, request, argument))


class VfioTransport(PciTransport):
    """One function that vfio-pci has. With ``noiommu`` nothing keeps it from any of the guest's memory, as with uio."""

    driver = VFIO_DRIVER

    def __init__(
        self,
        function: PciFunction,
        dev_root: Path = Path("/dev"),
        proc_root: str = "/proc",
        *,
        noiommu: bool = False,
        ioctl: Ioctl = _ioctl,
    ) -> None:
        self._folder_of_groups = dev_root / "vfio"
        self._proc_root = proc_root
        self._noiommu = noiommu
        self._ioctl = ioctl
        self.translated = not noiommu
        super().__init__(function)

    def _open(self, stack: ExitStack) -> None:
        address = self.function.address
        self._container = self._open_file("vfio", stack)
        if (version := self._ioctl(self._container, GET_API_VERSION, 0)) != _API_VERSION:
            raise DriverUnavailable(f"/dev/vfio/vfio is of version {version}, not {_API_VERSION}: use --driver {UIO_DRIVER}")
        kind = _NO_IOMMU if self._noiommu else _TYPE1_V2
        if not self._ioctl(self._container, CHECK_EXTENSION, kind):
            raise DriverUnavailable(
                "the kernel's vfio has no noiommu mode: that takes CONFIG_VFIO_NOIOMMU, and enable_unsafe_noiommu_mode=1 of "
                "module vfio"
                if self._noiommu
                else "the kernel's vfio has no IOMMU of type 1: modprobe vfio_iommu_type1"
            )
        group = group_of(self.function)
        if group is None:
            raise DriverUnavailable(f"{address} is in no IOMMU group: give the VM an IOMMU, or use --driver {UIO_DRIVER}")
        name = f"noiommu-{group.number}" if self._noiommu else group.number
        for other, remedy in ((group.number, "leave --vfio-noiommu out"), (f"noiommu-{group.number}", "see --vfio-noiommu")):
            if other != name and (self._folder_of_groups / other).exists() and not (self._folder_of_groups / name).exists():
                raise DriverUnavailable(f"{address} has {self._folder_of_groups / other}, not {name}: {remedy}")
        self._group = self._open_file(name, stack)
        status = GroupStatus(argsz=ctypes.sizeof(GroupStatus))
        self._ioctl(self._group, GROUP_GET_STATUS, status)
        if not status.flags & _GROUP_VIABLE:
            others = ", ".join(f"{each.address} ({each.driver or 'no driver'})" for each in group.members)
            raise DeviceBusy(f"IOMMU group {group.number} is in use: {others}; unbind the others, or use --driver {UIO_DRIVER}")
        self._ask(self._group, GROUP_SET_CONTAINER, ctypes.c_int(self._container), "the group does not go into a container")
        # Without interrupts that are remapped a device could raise any (drivers/vfio/vfio_iommu_type1.c).
        self._ask(
            self._container,
            SET_IOMMU,
            kind,
            "the IOMMU is not given to userspace; does it remap interrupts? (QEMU: -machine q35,kernel-irqchip=split -device "
            "intel-iommu,intremap=on; or allow_unsafe_interrupts=1 of module vfio_iommu_type1)",
        )
        pagemap = Pagemap(self._proc_root)
        stack.callback(pagemap.close)
        self.memory = DmaMemory(pagemap) if self._noiommu else DmaMemory(pagemap, self._admit, self._expel)
        stack.callback(self.memory.close)
        self._open_device(stack)

    def _open_file(self, name: str, stack: ExitStack) -> int:
        path = self._folder_of_groups / name
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except PermissionError as error:
            raise NotPermitted(f"{path}: {error.strerror}; run as root") from error
        except FileNotFoundError as error:
            raise DriverUnavailable(f"there is no {path}: modprobe vfio-pci") from error
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise DeviceBusy(f"{path} is open already: another program has a function of this group") from error
        stack.callback(os.close, fd)
        return fd

    def _open_device(self, stack: ExitStack) -> None:
        # It is reset when it is closed.
        address = self.function.address
        name = bytearray(f"{address}\0", "ascii")
        self._fd = raise_above_all(self._ask(self._group, GROUP_GET_DEVICE_FD, name, "the device does not open; see dmesg"))
        stack.callback(os.close, self._fd)
        self._config = self._region(_CONFIG_REGION)
        irq = IrqInfo(argsz=ctypes.sizeof(IrqInfo), index=_INTX)
        self._ioctl(self._fd, DEVICE_GET_IRQ_INFO, irq)
        if not irq.count:
            raise DriverUnavailable(f"{address} has no INTx: let the host give the balloon an interrupt pin")
        # Registers only, for now: see ``enable``.
        self._change_command(on=Command.MEMORY, off=Command.BUS_MASTER | Command.INTX_DISABLE)
        config = os.pread(self._fd, min(self._config.size, 256), self._config.offset)
        self._find_registers(stack, config, self._map_bar)
        poller = select.epoll()
        stack.callback(poller.close)
        self._interrupt, self._request = (self._eventfd(stack) for _ in range(2))
        for eventfd, index in ((self._interrupt, _INTX), (self._request, _REQUEST)):
            poller.register(eventfd, select.EPOLLIN)
            data = struct.pack("iiiiii", 24, _DATA_EVENTFD | _TRIGGER, index, 0, 1, eventfd)
            self._ask(self._fd, DEVICE_SET_IRQS, bytearray(data), "its interrupt cannot be had; see dmesg")
        self.interrupt_fd, self.request_fd = poller.fileno(), self._request

    @staticmethod
    def _eventfd(stack: ExitStack) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stack.callback(os.close, fd)
        return fd

    def _ask(self, fd: int, request: int, argument: Any, problem: str) -> int:
        """DriverUnavailable, with what this means, if the kernel refuses."""
        try:
            return self._ioctl(fd, request, argument)
        except OSError as error:
            raise DriverUnavailable(f"{self.function.address} by {VFIO_DRIVER}: {error.strerror}: {problem}") from error

    def _region(self, index: int) -> RegionInfo:
        info = RegionInfo(argsz=ctypes.sizeof(RegionInfo), index=index)
        self._ioctl(self._fd, DEVICE_GET_REGION_INFO, info)
        return info

    def _map_bar(self, bar: int) -> mmap.mmap:
        info = self._region(bar)
        if not info.flags & _REGION_MAPPABLE or not info.size:
            raise DeviceMisbehaved(f"{self.function.address} names BAR {bar} in a capability, and has none that can be mapped")
        return mmap.mmap(self._fd, info.size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=info.offset)

    def _admit(self, physical: int, address: int) -> None:
        request = DmaMap(argsz=ctypes.sizeof(DmaMap), flags=_MAP_READ_WRITE, vaddr=address, iova=physical, size=FRAME)
        try:
            self._ioctl(self._container, IOMMU_MAP_DMA, request)
        except OSError as error:
            raise NotPermitted(
                f"the IOMMU does not take a page at {physical:#x}: {error.strerror} (CAP_IPC_LOCK, or a wider address in QEMU: "
                "-device intel-iommu,aw-bits=48)"
            ) from error

    def _expel(self, physical: int) -> None:
        with suppress(OSError):
            self._ioctl(
                self._container,
                IOMMU_UNMAP_DMA,
                DmaUnmap(argsz=ctypes.sizeof(DmaUnmap), iova=physical, size=FRAME),
            )

    def check_present(self) -> None:
        """DeviceGone unless the function is there. Nobody takes it from us: whoever wants it waits until we close it.

        Its link to the driver is no sign: that goes before the kernel asks for it (drivers/base/dd.c).
        """
        try:
            os.stat("config", dir_fd=self._folder)
        except FileNotFoundError as error:
            raise DeviceGone(f"{self.function.address} is not there any more: was it unplugged?") from error

    def interrupts(self) -> int | None:
        """How many interrupts there were, if one came since the last call. DeviceWanted if the kernel waits for the device."""
        if _count(self._request):
            raise DeviceWanted(f"{self.function.address} is being unplugged, or taken from {VFIO_DRIVER}")
        return _count(self._interrupt)

    def enable_interrupt(self) -> None:
        """Let the next interrupt through: the kernel has masked it (irq_info AUTOMASKED)."""
        self.check_present()
        try:
            self._ioctl(self._fd, DEVICE_SET_IRQS, bytearray(struct.pack("iiiii", 20, _DATA_NONE | _UNMASK, _INTX, 0, 1)))
        except OSError as error:
            raise DeviceFailed(f"{self.function.address}: its interrupt: {error.strerror}") from error

    def _class(self) -> bytes:
        # Of what vfio does not make up itself (drivers/vfio/pci/vfio_pci_config.c).
        return os.pread(self._fd, 4, self._config.offset + CLASS_REGISTER)

    def _change_command(self, on: int = 0, off: int = 0) -> None:
        place = self._config.offset + COMMAND_REGISTER
        (before,) = struct.unpack("<H", os.pread(self._fd, 2, place))
        if (after := (before | on) & ~off) != before:
            os.pwrite(self._fd, struct.pack("<H", after), place)
