"""Which way to a function is taken, vfio's files and calls in place of a kernel's, and what is done by hand."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from balloon_agent.access import vfio
from balloon_agent.access.binding import choose_driver, give_to_kernel, obstacle
from balloon_agent.access.host import group_of, lockdown
from balloon_agent.access.names import UIO_DRIVER, VFIO_DRIVER
from balloon_agent.access.pci import (
    CLASS_REGISTER,
    COMMAND_REGISTER,
    Command,
    PciFunction,
    find_balloon,
    functions,
)
from balloon_agent.access.plugging import PciPlugging
from balloon_agent.access.vfio import VfioTransport
from balloon_agent.errors import (
    BadInput,
    DeviceBusy,
    DeviceWanted,
    DriverUnavailable,
)
from balloon_agent.takeover import by_hand
from balloon_agent.virtio.spec import CommonConfiguration
from tests.device_model.config_space import COMMON, DEVICE, ISR, NOTIFY, Capability, config_space
from tests.unit.test_linux import add_function, sysfs

ADDRESS = "0000:00:05.0"
STRUCTURES = [Capability(kind, 4, 0x1000 * place, 0x1000) for place, kind in enumerate((COMMON, ISR, DEVICE, NOTIFY))]
sysfs = sysfs  # a fixture


def group(root: Path, *addresses: str, kind: str = "DMA-FQ") -> None:
    """Have these functions in IOMMU group 14."""
    folder = root / "kernel/iommu_groups/14"
    (folder / "devices").mkdir(parents=True)
    (folder / "type").write_text(f"{kind}\n")
    for address in addresses:
        function = root / "devices/pci0000:00" / address
        (folder / "devices" / address).symlink_to(function)
        (function / "iommu_group").symlink_to(folder)


def lock_down(root: Path, how: str) -> None:
    words = ("none", "integrity", "confidentiality")
    (root / "kernel/security").mkdir(parents=True)
    (root / "kernel/security/lockdown").write_text(" ".join(f"[{word}]" if word == how else word for word in words))


def balloon(root: Path) -> PciFunction:
    return find_balloon(None, functions(root))


def test_uio_without_an_iommu_and_vfio_with_one(sysfs: Path) -> None:
    assert choose_driver(balloon(sysfs), sysfs_root=sysfs) == UIO_DRIVER
    with pytest.raises(DriverUnavailable, match=r"not by vfio-pci, for there is no IOMMU; give the VM one .QEMU: "):
        choose_driver(balloon(sysfs), VFIO_DRIVER, sysfs)
    group(sysfs, ADDRESS)
    assert choose_driver(balloon(sysfs), sysfs_root=sysfs) == VFIO_DRIVER
    assert choose_driver(balloon(sysfs), UIO_DRIVER, sysfs) == UIO_DRIVER
    found = group_of(balloon(sysfs))
    assert found is not None
    assert (found.number, found.kind, [member.address for member in found.members]) == ("14", "DMA-FQ", [ADDRESS])


def test_what_it_is_bound_to_already_is_used(sysfs: Path) -> None:
    add_function(sysfs, "0000:00:07.0", 0x1AF4, 0x1045, UIO_DRIVER)
    group(sysfs, "0000:00:07.0")
    assert choose_driver(find_balloon("00:07.0", functions(sysfs)), sysfs_root=sysfs) == UIO_DRIVER


@pytest.mark.parametrize(("driver", "busy"), [("e1000e", True), ("pcieport", False), ("vfio-pci", False), (None, False)])
def test_a_group_with_others_in_it_is_not_taken_from_them(sysfs: Path, driver: str | None, busy: bool) -> None:
    (sysfs / "bus/pci/drivers" / str(driver)).mkdir(exist_ok=True)
    add_function(sysfs, "0000:00:08.0", 0x8086, 0x10D3, driver)
    group(sysfs, ADDRESS, "0000:00:08.0")
    assert choose_driver(balloon(sysfs), sysfs_root=sysfs) == (UIO_DRIVER if busy else VFIO_DRIVER)
    if busy:
        with pytest.raises(DriverUnavailable, match=r"IOMMU group 14 has others in use: 0000:00:08.0 .e1000e.; give the bal"):
            choose_driver(balloon(sysfs), VFIO_DRIVER, sysfs)


def test_a_kernel_that_is_locked_down_leaves_only_vfio(sysfs: Path) -> None:
    assert lockdown(sysfs) is None
    lock_down(sysfs, "integrity")
    assert lockdown(sysfs) == "integrity"
    with pytest.raises(DriverUnavailable) as caught:
        choose_driver(balloon(sysfs), sysfs_root=sysfs)
    assert "there is no IOMMU" in str(caught.value)
    assert "not by uio_pci_generic, for the kernel is locked down (integrity): it lets only vfio" in str(caught.value)
    assert "locked down" in str(obstacle(balloon(sysfs), VFIO_DRIVER, sysfs, noiommu=True))
    group(sysfs, ADDRESS)
    assert choose_driver(balloon(sysfs), sysfs_root=sysfs) == VFIO_DRIVER


def test_a_lockdown_that_is_off_is_none(sysfs: Path) -> None:
    lock_down(sysfs, "none")
    assert lockdown(sysfs) is None
    assert choose_driver(balloon(sysfs), sysfs_root=sysfs) == UIO_DRIVER


def test_without_an_iommu_vfio_is_for_who_says_so(sysfs: Path) -> None:
    assert choose_driver(balloon(sysfs), sysfs_root=sysfs, noiommu=True) == VFIO_DRIVER
    with pytest.raises(BadInput, match=r"--vfio-noiommu is for --driver vfio-pci, not uio_pci_generic"):
        choose_driver(balloon(sysfs), UIO_DRIVER, sysfs, noiommu=True)


def test_uio_is_used_where_the_kernel_has_no_vfio(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group(sysfs, ADDRESS)
    (sysfs / "bus/pci/drivers/vfio-pci").rmdir()
    # No modprobe of this machine's.
    monkeypatch.setenv("PATH", str(sysfs))
    assert choose_driver(balloon(sysfs), sysfs_root=sysfs) == UIO_DRIVER
    with pytest.raises(DriverUnavailable, match=r"the kernel has no driver vfio-pci .*CONFIG_VFIO_PCI"):
        choose_driver(balloon(sysfs), VFIO_DRIVER, sysfs)


# -- vfio ------------------------------------------------------------------------------------------------------------


class FakeKernel:
    """Answers vfio's calls: the container and the group are empty files, and the device is one with its regions in it."""

    SPACING = 1 << 16

    def __init__(self, folder: Path, *, viable: bool = True, extensions: tuple[int, ...] = (3,), intx: int = 1) -> None:
        (folder / "vfio").mkdir()
        for name in ("vfio", "14", "noiommu-14"):
            (folder / "vfio" / name).touch()
        config = config_space(STRUCTURES)
        struct.pack_into("<H", config, COMMAND_REGISTER, Command.BUS_MASTER | Command.INTX_DISABLE)
        self.path = folder / "device"
        with self.path.open("wb") as file:
            file.truncate(8 * self.SPACING)
            file.seek(7 * self.SPACING)
            file.write(config)
            file.seek(4 * self.SPACING)
            file.write(bytes(range(64)) + bytes(0x4000 - 64))
        self._viable = viable
        self._extensions = extensions
        self._intx = intx
        self.said: list[tuple[int, Any]] = []
        self.mapped: dict[int, int] = {}
        self.irqs: list[tuple[int, int]] = []

    def __call__(self, fd: int, request: int, argument: Any) -> int:
        match request:
            case vfio.CHECK_EXTENSION:
                return int(argument in self._extensions)
            case vfio.SET_IOMMU:
                self.said.append((request, argument))
            case vfio.GROUP_GET_STATUS:
                argument.flags = int(self._viable)
            case vfio.GROUP_GET_DEVICE_FD:
                assert bytes(argument) == ADDRESS.encode() + b"\0"
                return os.open(self.path, os.O_RDWR)
            case vfio.DEVICE_GET_REGION_INFO:
                argument.offset = argument.index * self.SPACING
                argument.size, argument.flags = (0x4000, 7) if argument.index == 4 else (256, 3)
            case vfio.DEVICE_GET_IRQ_INFO:
                argument.count = self._intx
            case vfio.DEVICE_SET_IRQS:
                _, flags, index, _, _ = struct.unpack_from("IIIII", argument)
                self.irqs.append((index, flags))
                if flags == 36:
                    self.eventfds = {**getattr(self, "eventfds", {}), index: struct.unpack_from("i", argument, 20)[0]}
            case vfio.IOMMU_MAP_DMA:
                self.mapped[argument.iova] = argument.vaddr
            case vfio.IOMMU_UNMAP_DMA:
                del self.mapped[argument.iova]
        return 0

    @property
    def command(self) -> int:
        return int.from_bytes(self.path.read_bytes()[7 * self.SPACING + COMMAND_REGISTER :][:2], "little")


def transport_of(root: Path, kernel: FakeKernel, **options: Any) -> VfioTransport:
    return VfioTransport(balloon(root), kernel.path.parent, ioctl=kernel, **options)


@pytest.fixture
def kernel(sysfs: Path, tmp_path: Path) -> FakeKernel:
    group(sysfs, ADDRESS)
    return FakeKernel(tmp_path)


def test_vfio_gives_registers_and_no_memory_until_it_is_enabled(sysfs: Path, kernel: FakeKernel) -> None:
    before = set(os.listdir("/proc/self/fd"))
    transport = transport_of(sysfs, kernel)
    assert transport.common.get(CommonConfiguration.num_queues) == 0x1312
    assert transport.notify_multiplier == 4
    assert transport.translated
    assert kernel.command == Command.MEMORY
    transport.enable()
    assert kernel.command == Command.MEMORY | Command.BUS_MASTER
    transport.close()
    assert kernel.command == Command.MEMORY
    assert set(os.listdir("/proc/self/fd")) == before


def test_an_interrupt_by_vfio_is_taken_once_and_unmasked(sysfs: Path, kernel: FakeKernel) -> None:
    transport = transport_of(sysfs, kernel)
    assert not transport.wait_interrupt(0.001)
    os.eventfd_write(kernel.eventfds[0], 1)
    assert transport.wait_interrupt(10)
    assert transport.interrupts() is None
    assert kernel.irqs == [(0, 36), (4, 36)]
    transport.enable_interrupt()
    assert kernel.irqs[-1] == (0, 1 | 16)
    # The kernel asks for the device: whoever waits hears of it.
    os.eventfd_write(kernel.eventfds[4], 1)
    with pytest.raises(DeviceWanted, match=f"{ADDRESS} is being unplugged, or taken from vfio-pci"):
        transport.wait_interrupt(10)
    transport.close()


def test_what_vfio_lacks_is_named_and_nothing_stays_open(sysfs: Path, kernel: FakeKernel, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "third").mkdir()
    before = set(os.listdir("/proc/self/fd"))
    for flaw, remedy in (
        (FakeKernel(tmp_path / "other", viable=False), "IOMMU group 14 is in use: .*unbind the others, or use"),
        (FakeKernel(tmp_path / "third", intx=0), "has no INTx: let the host give"),
    ):
        with pytest.raises((DriverUnavailable, DeviceBusy), match=remedy):
            transport_of(sysfs, flaw)
    with pytest.raises(DriverUnavailable, match="has no noiommu mode: that takes CONFIG_VFIO_NOIOMMU"):
        transport_of(sysfs, kernel, noiommu=True)
    (tmp_path / "vfio/14").unlink()
    with pytest.raises(DriverUnavailable, match=r"has .*vfio/noiommu-14, not 14: see --vfio-noiommu"):
        transport_of(sysfs, kernel)
    (tmp_path / "vfio/noiommu-14").unlink()
    with pytest.raises(DriverUnavailable, match=r"there is no .*vfio/14: modprobe vfio-pci"):
        transport_of(sysfs, kernel)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_device_that_was_pulled_out_answers_with_ones(sysfs: Path, kernel: FakeKernel) -> None:
    transport = transport_of(sysfs, kernel)
    assert transport.answers()
    with kernel.path.open("r+b") as file:
        file.seek(7 * kernel.SPACING + CLASS_REGISTER)
        file.write(b"\xff" * 4)
    assert not transport.answers()
    transport.close()


@pytest.mark.parametrize(
    ("number", "answers"), [(errno.ENODEV, False), (errno.ENOENT, False), (errno.EMFILE, True), (errno.EPERM, True)]
)
def test_only_what_is_gone_does_not_answer(
    sysfs: Path, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, number: int, answers: bool
) -> None:
    """What cannot be asked may act on memory yet."""
    transport = transport_of(sysfs, kernel)

    def fail() -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(transport, "_class", fail)
    assert transport.answers() is answers
    transport.close()


def test_more_news_than_there_is_room_for_is_news(monkeypatch: pytest.MonkeyPatch) -> None:
    plugging = PciPlugging()
    assert not plugging.drain()
    said: list[Exception | None] = [OSError(errno.ENOBUFS, "full"), None]

    def poll(timeout: int) -> None:
        if (problem := said.pop(0)) is not None:
            raise problem

    monkeypatch.setattr(plugging._events._monitor, "poll", poll)
    assert plugging.drain()
    assert not said
    plugging.close()


def test_noiommu_is_its_own_kind_of_group(sysfs: Path, tmp_path: Path) -> None:
    group(sysfs, ADDRESS)
    kernel = FakeKernel(tmp_path, extensions=(8,))
    transport = transport_of(sysfs, kernel, noiommu=True)
    assert not transport.translated
    assert kernel.said == [(vfio.SET_IOMMU, 8)]
    transport.close()


def test_the_structures_are_as_large_as_the_kernels() -> None:
    sizes = [ctypes.sizeof(kind) for kind in (vfio.GroupStatus, vfio.RegionInfo, vfio.IrqInfo, vfio.DmaMap, vfio.DmaUnmap)]
    assert sizes == [8, 32, 16, 32, 24]


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_balloons_are_listed_with_what_keeps_each_from_being_taken(sysfs: Path, tmp_path: Path) -> None:
    add_function(sysfs, "0000:00:06.0", 0x1AF4, 0x1002)
    group(sysfs, "0000:00:06.0")
    first, second = json.loads(by_hand.devices(as_json=True, sysfs_root=sysfs, locks=tmp_path))
    assert (first["address"], first["driver"], first["iommu_group"]) == (ADDRESS, "virtio-pci", None)
    assert first["obstacles"][UIO_DRIVER] is None
    assert "no IOMMU" in first["obstacles"][VFIO_DRIVER]
    assert (second["address"], second["driver"], second["iommu_group"]) == ("0000:00:06.0", None, "14")
    assert second["obstacles"][VFIO_DRIVER] is None
    text = by_hand.devices(sysfs_root=sysfs, locks=tmp_path)
    assert "0000:00:05.0  virtio-pci; no IOMMU\n  vfio-pci: not by vfio-pci, for there" in text
    assert "0000:00:06.0  no driver; IOMMU group 14\n  vfio-pci: possible" in text


def test_a_machine_without_balloons_says_so(sysfs: Path, tmp_path: Path) -> None:
    (sysfs / "bus/pci/devices/0000:00:05.0").unlink()
    assert by_hand.devices(sysfs_root=sysfs, locks=tmp_path) == "there is no virtio balloon on the PCI bus"
    assert json.loads(by_hand.devices(as_json=True, sysfs_root=sysfs, locks=tmp_path)) == []


def test_what_the_kernels_driver_does_not_take_stays_where_it_was(sysfs: Path) -> None:
    add_function(sysfs, "0000:00:07.0", 0x1AF4, 0x1045, UIO_DRIVER)
    function = find_balloon("00:07.0", functions(sysfs))
    # Nobody acts on what is written to this tree.
    with pytest.raises(DriverUnavailable, match=r"virtio-pci did not take 0000:00:07\.0"):
        give_to_kernel(function, sysfs / "bus/pci")
    assert function.driver == UIO_DRIVER
    assert (function.path / "driver_override").read_text() == "\n"
    give_to_kernel(balloon_of(sysfs), sysfs / "bus/pci")


def balloon_of(root: Path) -> PciFunction:
    """The one that the kernel's driver has already."""
    return find_balloon(ADDRESS, functions(root))
