"""A function behind uio, as a tree that looks like sysfs and a FIFO in place of /dev/uio0."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from balloon_agent.access.pci import Command, PciFunction
from balloon_agent.access.uio import UioTransport
from balloon_agent.errors import (
    DeviceFailed,
    DeviceGone,
    DeviceTaken,
    DriverUnavailable,
)
from balloon_agent.virtio.spec import CommonConfiguration
from tests.device_model.config_space import COMMON, DEVICE, ISR, NOTIFY, Capability, config_space

ADDRESS = "0000:00:05.0"
STRUCTURES = [Capability(kind, 4, 0x1000 * place, 0x1000) for place, kind in enumerate((COMMON, ISR, DEVICE, NOTIFY))]
COMMAND, INTERRUPT_PIN = 0x04, 0x3D


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The function's folder, with everything switched on that a driver before us may have left so."""
    (tmp_path / "dev").mkdir()
    os.mkfifo(tmp_path / "dev/uio0")
    return make(tmp_path / "sys" / ADDRESS)


def make(folder: Path) -> Path:
    (folder / "uio/uio0").mkdir(parents=True)
    config = config_space(STRUCTURES)
    struct.pack_into("<H", config, COMMAND, Command.BUS_MASTER | Command.INTX_DISABLE)
    config[INTERRUPT_PIN] = 1
    (folder / "config").write_bytes(config)
    (folder / "resource4").write_bytes(bytes(range(64)) + bytes(0x4000 - 64))
    return folder


@pytest.fixture
def transport(folder: Path) -> Iterator[UioTransport]:
    transport = UioTransport(PciFunction(folder), folder.parents[1] / "dev")
    yield transport
    transport.close()


# In a process of its own, since it uses up all descriptors that there are: whatever else closes one meanwhile would disturb it.
ABOVE_ALL = """
import os, resource, sys
from pathlib import Path
from balloon_agent.access.descriptors import raise_above_all
from balloon_agent.access.pci import PciFunction
from balloon_agent.access.uio import UioTransport
resource.setrlimit(resource.RLIMIT_NOFILE, (1500, 1500))
folder = Path(sys.argv[1])
transport = UioTransport(PciFunction(folder), folder.parents[1] / "dev")
others = []
try:
    while True:
        others.append(os.dup(0))
except OSError:
    pass
print(max(others) < transport.interrupt_fd)
os.close(others.pop(0))
try:
    raise_above_all(os.dup(0))
except OSError as error:
    print(error.strerror)
"""


def test_no_descriptor_is_ever_above_the_devices(folder: Path) -> None:
    """With 300 holders a pin of ring pages can have any number; when the agent dies, the device must be closed before it."""
    argv = [sys.executable, "-c", ABOVE_ALL, str(folder)]
    out = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    assert out.splitlines() == ["True", "descriptors 1496 to 1499 are taken, and one is the device's"]


def test_as_many_descriptors_as_may_be_and_no_more() -> None:
    """In a process of its own: a limit that was lowered does not rise again by itself."""
    program = (
        "import resource\n"
        "from balloon_agent.access import descriptors\n"
        "for limits in ((1024, 20000), (20000, 20000), (64, 2000)):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, limits)\n"
        "    descriptors.set_limit()\n"
        "    print(*resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert out.splitlines() == ["16384 20000", "16384 20000", "2000 2000"]


def command(folder: Path) -> Command:
    return Command(struct.unpack_from("<H", (folder / "config").read_bytes(), COMMAND)[0])


def test_registers_are_found_and_memory_is_out_of_reach_until_it_is_enabled(folder: Path, transport: UioTransport) -> None:
    assert transport.common.get(CommonConfiguration.num_queues) == 0x1312
    assert transport.notify_multiplier == 4
    assert command(folder) == Command.MEMORY
    transport.enable()
    assert command(folder) == Command.MEMORY | Command.BUS_MASTER
    transport.disable()
    assert command(folder) == Command.MEMORY


def test_an_interrupt_is_taken_once_and_the_next_one_let_through(folder: Path, transport: UioTransport) -> None:
    assert transport.interrupts() is None
    assert not transport.wait_interrupt(0.001)
    os.write(transport.interrupt_fd, struct.pack("<I", 7))
    assert transport.wait_interrupt(10)
    assert transport.interrupts() is None
    # What the kernel's handler does, and what undoes it.
    PciFunction(folder).set_command(on=Command.INTX_DISABLE)
    transport.enable_interrupt()
    assert command(folder) == Command.MEMORY


def test_a_function_without_an_interrupt_is_refused(folder: Path) -> None:
    config = bytearray((folder / "config").read_bytes())
    config[INTERRUPT_PIN] = 0
    (folder / "config").write_bytes(config)
    with pytest.raises(
        DriverUnavailable, match=f"{ADDRESS} has no interrupt pin .its register 0x3d is 0.,.* give the balloon INTx"
    ):
        UioTransport(PciFunction(folder), folder.parents[1] / "dev")


@pytest.mark.parametrize("again", [False, True])
def test_a_function_that_is_gone_is_not_touched_even_if_another_one_is_in_its_place(
    folder: Path, transport: UioTransport, again: bool
) -> None:
    # Kept aside for a moment, so that the new one does not get the old one's inode.
    aside = shutil.move(folder, folder.with_name("aside"))
    if again:
        make(folder)
    shutil.rmtree(aside)
    before = (folder / "config").read_bytes() if again else None
    for call in (transport.check_present, transport.enable, transport.disable, transport.enable_interrupt):
        with pytest.raises(DeviceGone, match=rf"{ADDRESS} is not there any more: was it unplugged\?"):
            call()
    assert not again or (folder / "config").read_bytes() == before


def test_a_bound_function_is_looked_at_anew_each_time(folder: Path) -> None:
    link = folder / "driver"
    link.symlink_to("/sys/bus/pci/drivers/uio_pci_generic")
    transport = UioTransport(PciFunction(folder), folder.parents[1] / "dev")
    transport.check_present()
    link.unlink()
    link.symlink_to("/sys/bus/pci/drivers/virtio-pci")
    with pytest.raises(DeviceTaken, match="is bound to virtio-pci now, and was to uio_pci_generic"):
        transport.check_present()
    # Another one in its place, with the same driver.
    aside = shutil.move(folder, folder.with_name("aside"))
    make(folder)
    link.symlink_to("/sys/bus/pci/drivers/uio_pci_generic")
    shutil.rmtree(aside)
    with pytest.raises(DeviceGone, match="was it unplugged"):
        transport.check_present()
    transport.close()


def test_a_function_that_somebody_else_has_taken_is_not_touched(folder: Path, transport: UioTransport) -> None:
    (folder / "driver").symlink_to("/sys/bus/pci/drivers/virtio-pci")
    before = (folder / "config").read_bytes()
    for call in (transport.check_present, transport.enable, transport.disable, transport.enable_interrupt):
        with pytest.raises(DeviceTaken, match=f"{ADDRESS} is bound to virtio-pci now, and was to None"):
            call()
    assert (folder / "config").read_bytes() == before
    (folder / "driver").unlink()


def test_a_uio_device_that_cannot_be_read_is_a_failure(transport: UioTransport) -> None:
    # A directory cannot be read: an error that is none of those which mean "not yet".
    os.dup2(os.open("/", os.O_RDONLY), transport.interrupt_fd)
    with pytest.raises(DeviceFailed, match="no interrupt can be waited for: Is a directory"):
        transport.interrupts()
