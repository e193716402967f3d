"""The device in hand, over a tree that looks like sysfs and a bus that binds as the kernel does; behind it the device model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from balloon_agent.access import binding
from balloon_agent.access.names import UIO_DRIVER, VFIO_DRIVER
from balloon_agent.access.pci import PciFunction, functions
from balloon_agent.errors import (
    DeviceBusy,
    DeviceNotFound,
    DeviceNotReady,
    DeviceTimeout,
    DriverUnavailable,
)
from balloon_agent.options import Options
from balloon_agent.takeover import device_slot as module
from balloon_agent.takeover.device_slot import SETTLING, Seat
from balloon_agent.takeover.lock import lock_device
from balloon_agent.takeover.release import Succession
from balloon_agent.takeover.state import StateFile
from tests.device_model.model import BalloonModel
from tests.device_model.world import World
from tests.unit.test_access import ADDRESS, group
from tests.unit.test_linux import add_function, sysfs

sysfs = sysfs  # a fixture
KERNEL = "virtio-pci"


class Pages(dict[int, memoryview]):
    """The model's memory, of which a real transport knows the frames."""

    frames: frozenset[int] = frozenset()


class Transport(BalloonModel):
    """The model, as a transport that is opened and closed."""

    request_fd = None
    opened = 0

    def __init__(self, function: PciFunction, **_: object) -> None:
        assert function.driver == self.driver
        super().__init__()
        self.memory = Pages()
        type(self).opened += 1

    driver = UIO_DRIVER

    def close(self) -> None:
        type(self).opened -= 1


class VfioLike(Transport):
    driver = VFIO_DRIVER


class Machine:
    """A seat, and what it is on. ``fails`` is what opening a device by a driver ends with; ``stuck`` if it cannot be reset.

    ``bound`` are all drivers that had a device since, and ``refuse`` those that do not take one.
    """

    def __init__(self, root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.now = 0.0
        self.fails: dict[str, Exception] = {}
        self.stuck = False
        self.held: str | None = None
        self.bound: list[str] = []
        self.refuse: set[str] = set()
        self.state = StateFile(folder / "state.json")
        self.by_driver: dict[str, type[Transport]] = {UIO_DRIVER: Transport, VFIO_DRIVER: VfioLike}
        for each in self.by_driver.values():
            each.opened = 0
        monkeypatch.setattr(binding, "_write", self._write)
        monkeypatch.setattr(module, "lock_device", partial(lock_device, folder=folder))
        monkeypatch.setattr(module, "VfioTransport", partial(self._open, VFIO_DRIVER))
        monkeypatch.setattr(module, "UioTransport", partial(self._open, UIO_DRIVER))
        self.seat = self.make(Options())

    def make(self, options: Options) -> Seat:
        return Seat(options, self.state, lambda: self.held, lambda: functions(self.root), lambda: self.now, self.root)

    def _write(self, path: Path, text: str) -> None:
        """What the kernel does with it."""
        bus = self.root / "bus/pci"
        if path.name == "driver_override":
            path.write_text(text)
        elif path.name == "unbind":
            (bus / "devices" / text / "driver").unlink()
        else:
            folder = bus / "devices" / text
            wanted = (folder / "driver_override").read_text().strip() or KERNEL
            if not (folder / "driver").exists() and wanted not in self.refuse:
                self.bound.append(wanted)
                (folder / "driver").symlink_to(bus / "drivers" / wanted)

    def had_by(self, driver: str | None) -> None:
        """An agent has died, and left it with nobody or with a driver of ours; or it is the kernel's."""
        if driver == KERNEL:
            return
        self.state.record_driver(ADDRESS, KERNEL)
        self._write(self.root / "driver/unbind", ADDRESS)
        if driver is not None:
            (self.root / "bus/pci/devices" / ADDRESS / "driver").symlink_to(self.root / "bus/pci/drivers" / driver)

    def _open(self, driver: str, function: PciFunction, **_: object) -> Transport:
        if driver in self.fails:
            raise self.fails[driver]
        transport = self.by_driver[driver](function)
        transport.quirks.stuck_reset = self.stuck
        return transport

    @property
    def open(self) -> int:
        return sum(each.opened for each in self.by_driver.values())

    def driver(self, address: str = ADDRESS) -> str | None:
        return PciFunction(self.root / "bus/pci/devices" / address).driver

    def unplug(self, address: str = ADDRESS) -> None:
        (self.root / "bus/pci/devices" / address).unlink()
        # Kept aside, so that what comes after it does not get its inode.
        shutil.move(self.root / "devices/pci0000:00" / address, self.root / "aside")


@pytest.fixture
def machine(sysfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine(sysfs, tmp_path, monkeypatch)
    yield machine
    machine.seat.close()
    # Whatever happened, a lock is not left behind.
    lock_device(ADDRESS, tmp_path).close()


def test_it_is_taken_and_given_back_and_on_record_meanwhile(machine: Machine) -> None:
    device = machine.seat.take()
    assert (machine.seat.address, machine.seat.driver, machine.driver()) == (ADDRESS, UIO_DRIVER, UIO_DRIVER)
    assert machine.state.previous_drivers == {ADDRESS: KERNEL}
    assert device.quiet
    machine.seat.close()
    assert (machine.driver(), machine.open, machine.state.empty) == (KERNEL, 0, True)
    # Idempotent.
    machine.seat.close()
    assert machine.seat.interrupt_fd is machine.seat.request_fd is None


def test_what_vfio_cannot_open_is_had_by_uio(machine: Machine) -> None:
    group(machine.root, ADDRESS)
    machine.fails[VFIO_DRIVER] = DriverUnavailable("no interrupts are remapped")
    machine.seat.take()
    assert machine.seat.driver == UIO_DRIVER
    machine.seat.close()
    assert (machine.driver(), machine.state.empty) == (KERNEL, True)


@pytest.mark.parametrize("chosen", [VFIO_DRIVER, "auto"])
def test_what_can_be_had_by_no_driver_stays_where_it_was(machine: Machine, chosen: str) -> None:
    group(machine.root, ADDRESS)
    machine.fails = {VFIO_DRIVER: DriverUnavailable("first"), UIO_DRIVER: DriverUnavailable("second")}
    seat = machine.make(Options(driver=chosen))
    with pytest.raises(DriverUnavailable, match="first" if chosen == VFIO_DRIVER else "second"):
        seat.take()
    assert (machine.driver(), machine.state.empty, machine.open) == (KERNEL, True, 0)


@pytest.mark.parametrize("first", [KERNEL, None, UIO_DRIVER])
def test_while_anything_is_held_the_kernels_driver_does_not_get_it(machine: Machine, first: str | None) -> None:
    """Whoever had it before, and whether this agent knows of what is held: a start may fail before it could."""
    machine.had_by(first)
    machine.held = "memory blocks: 3"
    machine.seat.take()
    machine.seat.close()
    assert (machine.driver(), machine.open, KERNEL in machine.bound) == (UIO_DRIVER, 0, False)
    assert machine.state.previous_drivers == {ADDRESS: KERNEL}
    # The next one gives it back when nothing is held any more.
    machine.seat = machine.make(Options())
    machine.seat.take()
    machine.held = None
    machine.seat.close()
    assert (machine.driver(), machine.state.empty) == (KERNEL, True)


@pytest.mark.parametrize("first", [KERNEL, None])
@pytest.mark.parametrize("also_fails", [(), (UIO_DRIVER,)])
def test_while_anything_is_held_one_that_vfio_cannot_open_goes_to_uio_at_once(
    machine: Machine, first: str | None, also_fails: tuple[str, ...]
) -> None:
    group(machine.root, ADDRESS)
    machine.had_by(first)
    machine.held = "holder processes: 1"
    machine.fails = {driver: DriverUnavailable("no interrupts are remapped") for driver in (VFIO_DRIVER, *also_fails)}
    with pytest.raises(DriverUnavailable) if also_fails else nullcontext():
        machine.seat.take()
    machine.seat.close()
    assert (machine.bound, machine.driver(), machine.open) == ([VFIO_DRIVER, UIO_DRIVER], UIO_DRIVER, 0)
    assert machine.state.previous_drivers == {ADDRESS: KERNEL}


def test_while_anything_is_held_one_that_cannot_be_bound_stays_nobodys(machine: Machine) -> None:
    machine.had_by(None)
    machine.held = "holder processes: 1"
    machine.refuse = {UIO_DRIVER}
    with pytest.raises(DriverUnavailable):
        machine.seat.take()
    assert (machine.bound, machine.driver()) == ([], None)
    assert machine.state.previous_drivers == {ADDRESS: KERNEL}


def test_one_that_was_bound_by_hand_and_does_not_open_is_on_no_record(machine: Machine) -> None:
    machine._write(machine.root / "devices/pci0000:00" / ADDRESS / "driver/unbind", ADDRESS)
    machine._write(machine.root / "devices/pci0000:00" / ADDRESS / "driver_override", UIO_DRIVER)
    machine._write(machine.root / "bus/pci/drivers_probe", ADDRESS)
    machine.fails[UIO_DRIVER] = DeviceBusy("somebody has it open")
    with pytest.raises(DeviceBusy):
        machine.seat.take()
    assert (machine.driver(), machine.state.empty) == (UIO_DRIVER, True)


@pytest.mark.slow
def test_one_that_cannot_be_reset_is_left_with_the_driver_for_userspace(machine: Machine) -> None:
    machine.stuck = True
    with pytest.raises(DeviceTimeout):
        machine.seat.take()
    # The kernel's driver would wait for its reset for ever; and nothing of it is open, for it was never given a ring.
    assert (machine.driver(), machine.open) == (UIO_DRIVER, 0)
    assert machine.state.previous_drivers == {ADDRESS: KERNEL}
    # The next one knows whose it was.
    machine.stuck = False
    machine.seat = machine.make(Options())
    machine.seat.take()
    machine.seat.close()
    assert (machine.driver(), machine.state.empty) == (KERNEL, True)


def test_another_one_takes_the_place_of_one_that_was_unplugged(machine: Machine) -> None:
    device = machine.seat.take()
    machine.held = "a block"
    machine.unplug()
    device._transport.quirks.removed = True  # type: ignore[attr-defined]
    assert machine.seat.vacate()
    machine.seat.leave()
    # What is to stay stays with a device that is there; this one is not.
    assert (machine.seat.address, machine.seat.driver, machine.open, machine.state.empty) == ("", "", 0, True)
    assert machine.seat.vacate()
    with pytest.raises(DeviceNotFound, match="no virtio balloon on the PCI bus"):
        machine.seat.take()
    machine.held = None
    # The kernel tells of it before its own driver has it.
    other = add_function(machine.root, "0000:00:09.0", 0x1AF4, 0x1045)
    for passed in (0.0, SETTLING / 2):
        machine.now = passed
        with pytest.raises(DeviceNotReady, match="has just been plugged in"):
            machine.seat.take()
    assert other.joinpath("driver_override").read_text() == "(null)\n"
    machine.now = SETTLING
    assert machine.seat.take() is device
    assert (machine.seat.address, machine.driver("0000:00:09.0")) == ("0000:00:09.0", UIO_DRIVER)
    machine.seat.close()
    # It would have been the kernel's.
    assert (machine.driver("0000:00:09.0"), machine.state.empty) == (KERNEL, True)


def test_one_that_the_kernel_took_is_not_taken_from_it_again(machine: Machine) -> None:
    device = machine.seat.take()
    assert machine.seat.vacate()
    machine.seat.leave()
    assert machine.driver() == UIO_DRIVER  # whoever asked for it decides
    with pytest.raises(
        DeviceNotFound, match=f"{ADDRESS} was taken from the agent .it has uio_pci_generic now., and is left alone"
    ):
        machine.seat.take()
    machine.unplug()
    add_function(machine.root, "0000:00:09.0", 0x1AF4, 0x1045, KERNEL)
    assert machine.seat.take() is device
    assert machine.driver("0000:00:09.0") == UIO_DRIVER


def test_records_of_devices_that_are_not_there_are_struck_out(machine: Machine) -> None:
    machine.state.record_driver("0000:00:1e.0", KERNEL)
    machine.state.record_driver(ADDRESS, KERNEL)
    machine.seat.forget_absent()
    assert machine.state.previous_drivers == {ADDRESS: KERNEL}
    machine.state.forget_driver(ADDRESS)


class News:
    """Counts how often it was thrown away."""

    drained = 0

    def drain(self) -> bool:
        self.drained += 1
        return True


def test_what_is_heard_while_there_is_no_device_is_not_thrown_away(machine: Machine) -> None:
    """But for the news of what the agent itself has bound and given back: or it would do that without end."""
    world, news = World(), News()
    succession = Succession(machine.seat, [], world.balloon, lambda: None, news)
    machine.fails[UIO_DRIVER] = DriverUnavailable("it does not open")
    with pytest.raises(DriverUnavailable):
        succession.find()
    assert news.drained == 1
    machine.unplug()
    with pytest.raises(DeviceNotFound):
        succession.find()
    assert news.drained == 1
