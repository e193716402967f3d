"""A virtio device behind any transport: reset, features, queues, configuration (spec 3.1 and 4.1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from balloon_agent.errors import (
    ConfigurationInvalid,
    DeviceGone,
    DeviceNeedsReset,
    DeviceTimeout,
    DeviceWasReset,
    FeatureMissing,
)

from .queue import DevicePage, SplitQueue
from .registers import Window
from .spec import CommonConfiguration as Common
from .spec import InterruptStatus, Status, TransportFeature

RESET_DEADLINE = 5.0  # seconds
RESET_INTERVAL = 0.001  # between two looks at a reset that takes its time
GENERATION_TRIES = 16
# Far more than any known device has, and few enough to look at each.
MOST_QUEUES = 64
# What every register of a function reads that is not there any more.
_NO_DEVICE = 0xFF


class Transport(Protocol):
    """What the layer below gives: register windows, and pages that the device may address."""

    @property
    def common(self) -> Window: ...

    @property
    def notify(self) -> Window: ...

    @property
    def notify_multiplier(self) -> int: ...

    @property
    def isr(self) -> Window: ...

    @property
    def device(self) -> Window: ...

    def allocate_pages(self, count: int) -> Sequence[DevicePage]:
        """Pages that stay pinned until the transport is closed."""
        ...


class InterruptingTransport(Transport, Protocol):
    """A transport whose interrupt can be waited for.

    ``translated`` says that a device which takes part in that (ACCESS_PLATFORM) reaches the transport's pages and no others,
    and ``unreachable``, if not None, why it would not even reach those.
    """

    @property
    def translated(self) -> bool: ...

    @property
    def unreachable(self) -> str | None: ...

    def wait_interrupt(self, timeout: float) -> bool:
        """True if an interrupt came within ``timeout`` seconds."""
        ...

    def enable_interrupt(self) -> None: ...

    def enable(self) -> None:
        """Let the device address memory."""
        ...

    def disable(self) -> None:
        """Take the device's access to memory away."""
        ...

    def check_present(self) -> None:
        """DeviceGone unless there is a device behind the registers, DeviceTaken unless it is ours."""
        ...

    def answers(self) -> bool:
        """True if there is a device that could act on memory: one that was pulled out cannot."""
        ...


class VirtioDevice:
    """Drives the common configuration. The transport stays the caller's, and outlives this object.

    Pages that the device may address are lent by the transport and kept: after a reset they are used again.
    """

    def __init__(
        self,
        transport: Transport,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._transport = transport
        self._common = transport.common
        self._clock = clock
        self._sleep = sleep
        self._notifiers: dict[int, int] = {}
        self._free_pages: list[DevicePage] = []
        self._pages_in_use: list[DevicePage] = []
        self.negotiated = 0

    # -- initialisation, in the order of spec 3.1.1 ----------------------------------------------------------------

    def reset(self) -> None:
        """Write 0 and wait until the device says 0: only then does it leave memory alone (spec 4.1.4.3.2)."""
        self._common.set(Common.device_status, 0)
        deadline = self._clock() + RESET_DEADLINE
        while (status := self._common.get(Common.device_status)) != 0:
            if status == _NO_DEVICE:
                raise _gone()
            if self._clock() > deadline:
                raise DeviceTimeout(f"device_status is still {status:#x} {RESET_DEADLINE:g} s after a reset, not 0")
            self._sleep(RESET_INTERVAL)
        self.negotiated = 0
        self._notifiers.clear()
        self._free_pages += self._pages_in_use
        self._pages_in_use.clear()

    def offered(self) -> int:
        """The feature bits that the device offers."""
        bits = 0
        for select in (0, 1):
            self._common.set(Common.device_feature_select, select)
            bits |= self._common.get(Common.device_feature) << (32 * select)
        return bits

    def negotiate(self, wanted: int, required: int) -> int:
        """Steps 2 to 6: accept what is both offered and wanted. FeatureMissing if something required is not offered."""
        self.add_status(Status.ACKNOWLEDGE)
        self.add_status(Status.DRIVER)
        offered = self.offered()
        required |= TransportFeature.VERSION_1
        if missing := required & ~offered:
            raise FeatureMissing(
                f"the device does not offer feature bits {bit_names(missing)} (it offers {offered:#x}); "
                "bit 32 is VERSION_1, which a host offers for modern devices (QEMU: disable-modern=off)"
            )
        accepted = offered & (wanted | required | TransportFeature.ACCESS_PLATFORM)
        for select in (0, 1):
            self._common.set(Common.driver_feature_select, select)
            self._common.set(Common.driver_feature, (accepted >> (32 * select)) & 0xFFFFFFFF)
        self.add_status(Status.FEATURES_OK)
        # Spec 3.1.1 step 6: re-read, the device may refuse the subset.
        if not self.status() & Status.FEATURES_OK:
            raise FeatureMissing(f"the device refused the feature bits {accepted:#x} of {offered:#x} that it offers")
        self.negotiated = accepted
        return accepted

    def queue_sizes(self) -> list[int]:
        """The largest size of each queue that the device has; 0 means that it is not there."""
        count = self._common.get(Common.num_queues)
        if count > MOST_QUEUES:
            raise ConfigurationInvalid(f"num_queues is {count}, more than the {MOST_QUEUES} that any known device has")
        sizes = []
        for index in range(count):
            self._common.set(Common.queue_select, index)
            sizes.append(self._common.get(Common.queue_size))
        return sizes

    def set_up_queue(self, index: int, size: int, *, interrupts: bool = True) -> SplitQueue:
        """Step 7 for one queue, with ``size`` entries, at most what the device has."""
        self._common.set(Common.queue_select, index)
        if (largest := self._common.get(Common.queue_size)) < size:
            raise ConfigurationInvalid(f"queue_size of queue {index} is {largest} now, and was {size} or more before")
        if self._common.get(Common.queue_enable):
            raise ConfigurationInvalid(f"queue_enable of queue {index} is 1 after a reset, not 0")
        queue = SplitQueue(index, size, self.allocate_pages(3), interrupts=interrupts)
        self._common.set(Common.queue_size, size)
        self._common.set(Common.queue_desc, queue.descriptors.address)
        self._common.set(Common.queue_driver, queue.available.address)
        self._common.set(Common.queue_device, queue.used.address)
        offset = self._common.get(Common.queue_notify_off) * self._transport.notify_multiplier
        if offset + 2 > self._transport.notify.size:
            raise ConfigurationInvalid(
                f"queue {index} is notified at {offset:#x}, outside the notify region of {self._transport.notify.size:#x} bytes"
            )
        self._notifiers[index] = offset
        self._common.set(Common.queue_enable, 1)
        return queue

    def driver_ok(self) -> None:
        self.add_status(Status.DRIVER_OK)

    # -- operation -------------------------------------------------------------------------------------------------

    def notify(self, queue: SplitQueue) -> None:
        """Tell the device to look at a queue. With a synchronous host all its work is done when this returns."""
        self._transport.notify.write(self._notifiers[queue.index], 2, queue.index)

    def status(self) -> Status:
        return Status(self._common.get(Common.device_status))

    def add_status(self, bit: Status) -> None:
        self._common.set(Common.device_status, self.status() | bit)

    def check_status(self) -> None:
        """DeviceFailed, of the kind that fits, unless the device is as ``driver_ok`` left it."""
        status = self.status()
        expected = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
        if status == expected:
            return
        if status == _NO_DEVICE:
            raise _gone()
        seen = f"device_status is {int(status):#x}, not {int(expected):#x}"
        if status & Status.NEEDS_RESET:
            raise DeviceNeedsReset(f"{seen}: it needs a reset")
        if not status & Status.DRIVER_OK:
            raise DeviceWasReset(f"{seen}: it was reset by somebody else")
        raise ConfigurationInvalid(seen)

    def fail(self) -> None:
        """Give up on the device, and let it know (spec 2.1.2)."""
        self.add_status(Status.FAILED)

    def interrupt_status(self) -> InterruptStatus:
        """Read, and thereby acknowledge, the interrupt."""
        return InterruptStatus(self._transport.isr.read(0, 1) & 3)

    def read_configuration(self, *fields: object) -> list[int]:
        """Device-specific registers, all from one generation of the configuration (spec 4.1.4.3.1)."""
        for _ in range(GENERATION_TRIES):
            before = self._common.get(Common.config_generation)
            values = [self._transport.device.get(field) for field in fields]
            if self._common.get(Common.config_generation) == before:
                return values
        raise ConfigurationInvalid(f"config_generation did not stay the same over a read, {GENERATION_TRIES} times")

    def write_configuration(self, field: object, value: int) -> None:
        """One store of the register's width."""
        self._transport.device.set(field, value)

    def allocate_pages(self, count: int) -> list[DevicePage]:
        """Pages for rings and buffers. They stay the device's until it has been reset."""
        if (missing := count - len(self._free_pages)) > 0:
            self._free_pages += self._transport.allocate_pages(missing)
        pages = [self._free_pages.pop() for _ in range(count)]
        self._pages_in_use += pages
        return pages


def bit_names(bits: int) -> str:
    """The numbers of the bits set in a mask, as text."""
    return ", ".join(str(number) for number in range(bits.bit_length()) if bits >> number & 1)


def _gone() -> DeviceGone:
    return DeviceGone(f"device_status is {_NO_DEVICE:#x}: the device does not answer; was it unplugged?")
