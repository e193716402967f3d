"""The other side of the ring: a virtio balloon device with CONT_PAGES, over memory that driver and device share.

Written from the specification (virtio 1.3, sections cited) and the proposal's wire format, not from the driver. It knows
memory by "physical" address only, and those are unlike the driver's own, so that a driver which mixed them up would not work.
A breach of a MUST raises ``Breach`` in the driver's call, which fails the test.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from balloon_agent.virtio.registers import Window

PAGE = 4096
MODERN, REPORTING, HINT, STATS, CONT = 1 << 32, 1 << 5, 1 << 3, 1 << 1, 1 << 6
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
NEXT, WRITE = 1, 2
# struct virtio_pci_common_cfg, 4.1.4.3: name, offset, width.
COMMON = {
    0: ("device_feature_select", 4),
    4: ("device_feature", 4),
    8: ("driver_feature_select", 4),
    12: ("driver_feature", 4),
    16: ("config_msix_vector", 2),
    18: ("num_queues", 2),
    20: ("device_status", 1),
    21: ("config_generation", 1),
    22: ("queue_select", 2),
    24: ("queue_size", 2),
    26: ("queue_msix_vector", 2),
    28: ("queue_enable", 2),
    30: ("queue_notify_off", 2),
    32: ("queue_desc_lo", 4),
    36: ("queue_desc_hi", 4),
    40: ("queue_driver_lo", 4),
    44: ("queue_driver_hi", 4),
    48: ("queue_device_lo", 4),
    52: ("queue_device_hi", 4),
}
COMMON_SIZE = 56
READ_ONLY = {"device_feature", "num_queues", "config_generation", "queue_notify_off"}


class Breach(AssertionError):
    """The driver did what the specification forbids."""


def must(condition: object, section: str, what: str) -> None:
    if not condition:
        raise Breach(f"{section}: {what}")


class Registers(Window):
    """A window whose reads and writes are calls."""

    def __init__(self, name: str, size: int, read: Callable[[int, int], int], write: Callable[[int, int, int], None]) -> None:
        super().__init__(memoryview(bytearray(size)), name)
        self._on_read = read
        self._on_write = write

    def read(self, offset: int, width: int) -> int:
        self._index(offset, width)
        return self._on_read(offset, width)

    def write(self, offset: int, width: int, value: int) -> None:
        self._index(offset, width)
        if value >> (8 * width):
            raise ValueError(f"{value:#x} does not fit {width} bytes")
        self._on_write(offset, width, value)


class Page(NamedTuple):
    """A shared page: where the device finds it, and the driver's view."""

    address: int
    view: memoryview


@dataclass
class Queue:
    """A virtqueue as the device keeps it."""

    size: int
    largest: int
    enabled: bool = False
    descriptors: int = 0
    available: int = 0
    used: int = 0
    next_available: int = 0
    next_used: int = 0
    pending: list[int] = field(default_factory=list)


@dataclass
class Quirks:
    """How this device differs from a plain one."""

    late: bool = False  # completions come only with the interrupt that the driver waits for
    silent: bool = False  # completions never come
    wrong_id: bool = False  # a used id that was not given out
    index_jump: int = 0  # the used index goes that much too far
    stuck_reset: bool = False  # device_status never reads 0 again
    refuse_features: bool = False
    restless: bool = False  # config_generation changes all the time


class BalloonModel:
    """The device, and a transport to it as the driver's layer below would give it."""

    notify_multiplier = 4
    interrupt_fd = -1

    def __init__(
        self, features: int = MODERN | CONT | STATS, sizes: tuple[int, ...] = (128,) * 5, quirks: Quirks | None = None
    ) -> None:
        self.features = features
        self.quirks = quirks or Quirks()
        self.queues = [Queue(size, size) for size in sizes]
        self.memory: dict[int, memoryview] = {}
        self.inflated: set[int] = set()
        self.num_pages = 0
        self.actual = 0
        self.actual_history: list[int] = []
        self.accepted = 0
        self.status = 0
        self.interrupt_cause = 0
        self.interrupts_enabled = 0
        self.notifications: list[int] = []
        self._values: dict[str, int] = {}
        self._generation = 0
        self._next_address = 0x7_0000_0000
        self.common = Registers("common", COMMON_SIZE, self._read_common, self._write_common)
        self.notify = Registers("notify", 4 * len(sizes), self._no_read, self._write_notify)
        self.isr = Registers("isr", 1, self._read_isr, self._no_write)
        self.device = Registers("device", 8, self._read_device, self._write_device)

    # -- what the driver's lower layer offers --------------------------------------------------------------------

    def allocate_pages(self, count: int) -> list[Page]:
        pages = []
        for _ in range(count):
            # Never next to each other, never where the driver has them: a driver that assumes either will fail.
            self._next_address += 3 * PAGE
            view = memoryview(bytearray(b"\xa5" * PAGE))
            self.memory[self._next_address] = view
            pages.append(Page(self._next_address, view))
        return pages

    def wait_interrupt(self, timeout: float) -> bool:
        if self.quirks.silent or timeout <= 0:
            return False
        for number, queue in enumerate(self.queues):
            for head in queue.pending:
                self._complete(number, head)
            queue.pending.clear()
        return bool(self.interrupt_cause)

    def enable_interrupt(self) -> None:
        self.interrupts_enabled += 1

    def enable(self) -> None:
        must(self.status == 0, "3.1.1", "memory access was enabled before a reset")

    def ask_for(self, frames: int) -> None:
        """The host sets a new target."""
        self.num_pages = frames
        self._generation += 1
        self.interrupt_cause |= 2

    # -- registers -------------------------------------------------------------------------------------------------

    def _no_read(self, offset: int, width: int) -> int:
        raise Breach(f"4.1.4.4: the notify region was read at {offset:#x} ({width} bytes)")

    def _no_write(self, offset: int, width: int, value: int) -> None:
        raise Breach(f"4.1.4.5: the interrupt status was written at {offset:#x} ({width} bytes, {value:#x})")

    def _field(self, offset: int, width: int) -> str:
        must(offset in COMMON, "4.1.3.1", f"common configuration accessed at {offset:#x}, inside a field")
        name, size = COMMON[offset]
        must(width == size, "4.1.3.1", f"{name} accessed with {width} bytes, not {size}")
        return name

    @property
    def _queue(self) -> Queue | None:
        number = self._values.get("queue_select", 0)
        return self.queues[number] if number < len(self.queues) else None

    def _read_common(self, offset: int, width: int) -> int:
        name = self._field(offset, width)
        queue = self._queue
        match name:
            case "device_feature":
                return (self.features >> (32 * self._values.get("device_feature_select", 0))) & 0xFFFFFFFF
            case "num_queues":
                return len(self.queues)
            case "device_status":
                return self.status | (FAILED if self.quirks.stuck_reset else 0)
            case "config_generation":
                self._generation += self.quirks.restless
                return self._generation & 0xFF
            case "queue_size":
                return queue.size if queue else 0
            case "queue_enable":
                return int(queue.enabled) if queue else 0
            case "queue_notify_off":
                return self._values.get("queue_select", 0)
        return self._values.get(name, 0)

    def _write_common(self, offset: int, width: int, value: int) -> None:
        name = self._field(offset, width)
        must(name not in READ_ONLY, "4.1.4.3", f"{name} is read-only")
        if name == "device_status":
            self._set_status(value)
            return
        if name == "driver_feature":
            must(self.status & DRIVER, "3.1.1", "features written before DRIVER was set")
            must(not self.status & FEATURES_OK, "3.1.1", "features written after FEATURES_OK")
            shift = 32 * self._values.get("driver_feature_select", 0)
            self.accepted = self.accepted & ~(0xFFFFFFFF << shift) | value << shift
            return
        if name.startswith("queue_") and name != "queue_select":
            self._set_queue(name, value)
            return
        self._values[name] = value

    def _set_status(self, value: int) -> None:
        if value == 0:
            self._reset()
            return
        must(value & self.status == self.status, "2.1.1", f"status went from {self.status:#x} to {value:#x}: bits cleared")
        added = value & ~self.status
        if added & DRIVER:
            must(self.status & ACKNOWLEDGE, "3.1.1", "DRIVER before ACKNOWLEDGE")
        if added & FEATURES_OK:
            must(self.status & DRIVER, "3.1.1", "FEATURES_OK before DRIVER")
            must(not self.accepted & ~self.features, "2.2.1", f"accepted {self.accepted:#x} of {self.features:#x}")
            must(self.accepted & MODERN, "6.1", "VERSION_1 was offered and not accepted")
            if self.quirks.refuse_features:
                value &= ~FEATURES_OK
        if added & DRIVER_OK:
            must(self.status & FEATURES_OK, "3.1.1", "DRIVER_OK before FEATURES_OK")
        self.status = value

    def _set_queue(self, name: str, value: int) -> None:
        queue = self._queue
        assert queue is not None
        must(self.status & FEATURES_OK, "3.1.1", f"{name} written before FEATURES_OK")
        must(not self.status & DRIVER_OK, "3.1.1", f"{name} written after DRIVER_OK")
        must(not queue.enabled, "4.1.4.3.2", f"{name} written after the queue was enabled")
        if name == "queue_size":
            must(value and not value & (value - 1), "4.1.4.3.2", f"queue size {value} is no power of two")
            must(value <= queue.largest, "4.1.5.1.3", f"queue size {value} is more than {queue.largest}")
            queue.size = value
        elif name == "queue_enable":
            must(value == 1, "4.1.4.3.2", f"queue_enable set to {value}")
            for what, address, align, size in (
                ("descriptor table", queue.descriptors, 16, 16 * queue.size),
                ("available ring", queue.available, 2, 6 + 2 * queue.size),
                ("used ring", queue.used, 4, 6 + 8 * queue.size),
            ):
                must(address % align == 0, "2.7", f"{what} at {address:#x} is not aligned to {align}")
                self._bytes(address, size, what)
            queue.enabled = True
        else:
            part, _, half = name.removeprefix("queue_").rpartition("_")
            attribute = {"desc": "descriptors", "driver": "available", "device": "used"}[part]
            shift = 32 if half == "hi" else 0
            old = getattr(queue, attribute)
            setattr(queue, attribute, old & ~(0xFFFFFFFF << shift) | value << shift)

    def _reset(self) -> None:
        self.status = self.accepted = self.interrupt_cause = 0
        self._values.clear()
        self.queues = [Queue(queue.largest, queue.largest) for queue in self.queues]

    def _read_isr(self, _offset: int, _width: int) -> int:
        cause, self.interrupt_cause = self.interrupt_cause, 0
        return cause

    def _read_device(self, offset: int, width: int) -> int:
        must(width == 4, "5.5.4", f"configuration read with {width} bytes")
        return {0: self.num_pages, 4: self.actual}[offset]

    def _write_device(self, offset: int, width: int, value: int) -> None:
        must(offset == 4, "5.5.4", f"configuration written at {offset}: only actual is the driver's")
        must(width == 4, "5.5.4", f"actual written with {width} bytes")
        must(self.status & DRIVER_OK, "3.1.1", "actual written before DRIVER_OK")
        self.actual = value
        self.actual_history.append(value)

    # -- queues ------------------------------------------------------------------------------------------------------

    def _write_notify(self, offset: int, width: int, value: int) -> None:
        must(width == 2, "4.1.5.2", f"notification with {width} bytes")
        must(offset == value * self.notify_multiplier, "4.1.4.4", f"queue {value} notified at {offset:#x}")
        must(self.status & DRIVER_OK, "3.1.1", "notification before DRIVER_OK")
        must(not self.status & NEEDS_RESET, "2.1.1", "notification of a device that needs a reset")
        self.notifications.append(value)
        queue = self.queues[value]
        must(queue.enabled, "4.1.4.3.2", f"queue {value} notified before it was enabled")
        (index,) = struct.unpack("<H", self._bytes(queue.available + 2, 2, "available index"))
        while queue.next_available != index:
            at = queue.available + 4 + 2 * (queue.next_available % queue.size)
            (head,) = struct.unpack("<H", self._bytes(at, 2, "available ring"))
            queue.next_available = (queue.next_available + 1) % 0x10000
            self._serve(value, self._chain(queue, head))
            if self.quirks.late:
                queue.pending.append(head)
            elif not self.quirks.silent:
                self._complete(value, head)

    def _bytes(self, address: int, size: int, what: str) -> memoryview:
        page = self.memory.get(address // PAGE * PAGE)
        must(page is not None, "2.7", f"{what} at {address:#x} is not memory that was shared")
        assert page is not None
        offset = address % PAGE
        must(offset + size <= PAGE, "2.7", f"{what} at {address:#x} runs {size} bytes, over the end of what was shared")
        return page[offset : offset + size]

    def _chain(self, queue: Queue, head: int) -> bytes:
        """What the driver has put into the chain's device-readable buffers."""
        data = b""
        number, seen = head, 0
        while True:
            must(number < queue.size, "2.7.5", f"descriptor {number} of {queue.size}")
            must(seen < queue.size, "2.7.5.1", "a chain with a loop")
            raw = self._bytes(queue.descriptors + 16 * number, 16, "descriptor")
            address, length, flags, following = struct.unpack("<QIHH", raw)
            must(length > 0, "2.7.5", "a buffer of no bytes")
            must(not flags & WRITE, "5.5", "a device-writable buffer on a queue for reading")
            data += bytes(self._bytes(address, length, "buffer"))
            if not flags & NEXT:
                return data
            number, seen = following, seen + 1

    def _serve(self, number: int, data: bytes) -> None:
        inflate, deflate = len(self.queues) - 2, len(self.queues) - 1
        must(number in (inflate, deflate), "RFC", f"queue {number} was used, which is not negotiated")
        must(len(data) % 8 == 0, "RFC", f"{len(data)} bytes are no whole number of entries")
        for frame, size in struct.iter_unpack("<II", data):
            must(size and size % PAGE == 0, "RFC", f"an entry of {size} bytes")
            frames = set(range(frame, frame + size // PAGE))
            if number == inflate:
                must(not frames & self.inflated, "5.5.6.1", "a frame was inflated that is in the balloon")
                self.inflated |= frames
            else:
                must(frames <= self.inflated, "5.5.6.1", "a frame was deflated that is not in the balloon")
                self.inflated -= frames

    def _complete(self, number: int, head: int) -> None:
        queue = self.queues[number]
        identifier = queue.size + 7 if self.quirks.wrong_id else head
        slot = queue.used + 4 + 8 * (queue.next_used % queue.size)
        self._bytes(slot, 8, "used ring")[:] = struct.pack("<II", identifier, 0xDEAD)
        queue.next_used = (queue.next_used + 1 + self.quirks.index_jump) % 0x10000
        self._bytes(queue.used + 2, 2, "used index")[:] = struct.pack("<H", queue.next_used)
        (flags,) = struct.unpack("<H", self._bytes(queue.available, 2, "available flags"))
        if not flags & 1:
            self.interrupt_cause |= 1
