"""The other side of the ring: a virtio balloon device, over memory that driver and device share.

Written from the specification (virtio 1.3, see musts.py) and the proposal's wire format, not from the driver. It knows
memory by "physical" address only, and those are unlike the driver's own, so that a driver which mixed them up would not work.
A breach of a MUST raises ``Breach`` in the driver's call, which fails the test. How it may differ from a plain device,
and misbehave, is in ``Quirks``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from balloon_agent.errors import DeviceGone

from .buffers import PAGE, read_frames, read_report, read_runs, read_statistics
from .musts import must
from .numbering import CONT, DEFLATE_ON_OOM, FEATURE_OF, MUST_TELL_HOST, STATS, qemu
from .parts import Chain, Clock, Page, Queue, Quirks
from .registers import COMMON_SIZE, READ_ONLY, Registers, common_field

MODERN = 1 << 32
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
NEXT, WRITE = 1, 2
QUEUE_CAUSE, CONFIGURATION_CAUSE = 1, 2
# Whose a frame is, as far as the device has been told.
GUEST, INFLATING, BALLOON, DEFLATING, REPORTING_NOW = range(5)
FIRST_SHARED_PAGE = 0x7_0000_0000


class Guest(Protocol):
    """Whoever knows which frames are in use."""

    def uses(self, first: int, count: int) -> bool: ...


class BalloonModel:
    """The device, and a transport to it as the driver's layer below would give it.

    ``roles`` says which queue is which, ``sizes`` how large each is; ``frames`` is the size of the guest, and ``guest`` knows
    what is in use there. ``check_floor`` is for drivers that follow the host's target.
    """

    interrupt_fd = -1
    translated = False
    unreachable: str | None = None

    def __init__(
        self,
        features: int = MODERN | CONT | STATS,
        roles: Sequence[str | None] | None = None,
        sizes: Sequence[int] | None = None,
        quirks: Quirks | None = None,
        frames: int = 1 << 18,
        guest: Guest | None = None,
        check_floor: bool = False,
        notify_multiplier: int = 4,
    ) -> None:
        self.features = features
        self.quirks = quirks or Quirks()
        chosen = list(roles) if roles is not None else qemu(features)
        given = list(sizes) if sizes is not None else [128 if role else 0 for role in chosen]
        self.queues = [Queue(role, size, size) for role, size in zip(chosen, given, strict=True)]
        self.memory: dict[int, memoryview] = {}
        self.state = bytearray(frames)
        self.guest = guest
        self.check_floor = check_floor
        self.notify_multiplier = notify_multiplier
        self.clock = Clock()
        self.num_pages = 0
        self.actual = 0
        self.actual_history: list[int] = []
        self.reported_frames = 0
        self.largest_buffer = 0
        self.accepted = 0
        self.status = 0
        self.interrupt_cause = 0
        self.interrupts_enabled = 0
        self.notifications: list[int] = []
        self.statistics: dict[int, int] | None = None
        # Called at each notification, before the device looks at the queue: where a test makes it fail.
        self.on_notification: Callable[[BalloonModel], None] = lambda model: None
        # Called when the interrupt line goes up.
        self.on_interrupt: Callable[[], None] = lambda: None
        self.bus_master = False
        self._masked = True
        self._pulse = False
        self._tags: set[int] | None = None
        self._stats_given = False
        # The device has failed by itself: what the driver does until its reset proves nothing about it.
        self._out_of_order = False
        self._seen_broken = False
        self._awaiting_zero = False
        self._reads_to_zero = 0
        self._features_ok_read = False
        self._reborn: tuple[int, list[Queue]] | None = None
        self._values: dict[str, int] = {}
        self._generation = 0
        self._next_address = FIRST_SHARED_PAGE
        self.common = Registers("common", COMMON_SIZE, self._read_common, self._write_common)
        self.notify = Registers("notify", max(4, notify_multiplier * len(chosen) + 2), self._no_read, self._write_notify)
        self.isr = Registers("isr", 1, self._read_isr, self._no_write)
        self.device = Registers("device", 16, self._read_device, self._write_device)

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
        if timeout <= 0:
            return False
        for queue in self.queues:
            pending = queue.pending if queue.role != "stats" and not self.quirks.silent else []
            while pending:
                self._complete(queue, pending.pop(-1 if self.quirks.backwards else 0))
        if self._pulse:
            self._pulse = False
            return True
        self.clock.now += timeout
        return False

    def interrupts(self) -> int | None:
        pulse, self._pulse = self._pulse, False
        return 1 if pulse else None

    def enable_interrupt(self) -> None:
        self.interrupts_enabled += 1
        self._masked = False
        self._raise(0)

    def _raise(self, cause: int) -> None:
        self.interrupt_cause |= cause
        # A level, masked when it was delivered until the driver lets the next one through.
        if self.interrupt_cause and not self._masked:
            self._masked = self._pulse = True
            self.on_interrupt()

    def enable(self) -> None:
        must(self.status == 0, "3.1.1 bus master", f"device_status is {self.status:#x}")
        self.bus_master = True

    def disable(self) -> None:
        """Nothing reaches memory any more."""
        self.bus_master = False

    def answers(self) -> bool:
        return True

    def check_present(self) -> None:
        if self.quirks.removed:
            raise DeviceGone("the device was removed")

    # -- what the host does ------------------------------------------------------------------------------------------

    def ask_for(self, frames: int) -> None:
        """The host sets a new target."""
        self.num_pages = frames
        self._generation += 1
        self._raise(CONFIGURATION_CAUSE)

    def ask_for_stats(self) -> bool:
        """The host wants statistics: it uses the buffer that it has. Whether it had one."""
        queue = self.queue_of("stats")
        if queue is None or not queue.pending:
            return False
        self._complete(queue, queue.pending.pop())
        return True

    def break_down(self) -> None:
        """The device needs a reset (2.1.2)."""
        self._out_of_order = True
        self.status |= NEEDS_RESET
        self._generation += 1
        self._raise(CONFIGURATION_CAUSE)

    def reset_by_host(self) -> None:
        """The device forgets the driver. It says nothing about it: there is nobody that it would have to tell."""
        self._out_of_order = True
        self.status = self.accepted = 0
        self._fresh_queues()

    def remove(self) -> None:
        """The function is unplugged: what is not there can do nothing to memory."""
        self.quirks.removed = True
        self._out_of_order = True
        self.state = bytearray(len(self.state))
        self.on_interrupt()

    def queue_of(self, role: str) -> Queue | None:
        return next((queue for queue in self.queues if queue.role == role), None)

    # -- what a test asks --------------------------------------------------------------------------------------------

    @property
    def inflated(self) -> set[int]:
        """The frames in the balloon, acknowledged or on their way."""
        return {frame for frame, state in enumerate(self.state) if state not in (GUEST, REPORTING_NOW)}

    @property
    def busy(self) -> bool:
        """Whether anything is on its way."""
        return any(state in self.state for state in (INFLATING, DEFLATING, REPORTING_NOW))

    def guest_uses(self, first: int, count: int) -> None:
        """The guest begins to use frames."""
        states = self.state[first : first + count]
        where = f"frames {first:#x}+{count}"
        must(INFLATING not in states, "5.5.6.1 use before inflate ack", where)
        must(REPORTING_NOW not in states, "5.5.6.7.1 use before ack", where)
        must(BALLOON not in states, "5.5.6.1 deflate queue", where)
        must(DEFLATING not in states or not self.accepted & MUST_TELL_HOST, "5.5.6.1 tell host", where)

    def guest_seizes(self, first: int, count: int) -> None:
        """The guest has frames back from a holder that died: nobody may have let it come to that while they were in flight."""
        states = self.state[first : first + count]
        must(INFLATING not in states, "5.5.6.1 use before inflate ack", f"frames {first:#x}+{count} of a dead holder")
        must(REPORTING_NOW not in states, "5.5.6.7.1 use before ack", f"frames {first:#x}+{count} of a dead holder")

    def at_rest(self, held: int) -> None:
        """The driver has nothing to do, and holds so many frames for the balloon."""
        must(self.actual == held, "5.5.6.1 actual", f"actual is {self.actual}, and {held} frames are held")
        queue = self.queue_of("stats")
        if queue is not None and self.accepted & STATS and self.status & DRIVER_OK:
            name = "another" if self._stats_given else "first"
            must(queue.pending, f"5.5.6.3.1 {name} buffer", "there is none")

    # -- registers -------------------------------------------------------------------------------------------------

    def _no_read(self, offset: int, width: int) -> int:
        must(False, "4.1.5.2 notification", f"the notify region was read at {offset:#x} ({width} bytes)")
        return 0

    def _no_write(self, offset: int, width: int, value: int) -> None:
        must(False, "4.1.4.3.2 read-only", f"the interrupt status was written at {offset:#x} ({width} bytes, {value:#x})")

    @property
    def _queue(self) -> Queue | None:
        number = self._values.get("queue_select", 0)
        return self.queues[number] if number < len(self.queues) else None

    def _read_common(self, offset: int, width: int) -> int:
        assert not self.quirks.removed, "a register was touched that is not there"
        name = common_field(offset, width)
        if self.quirks.unplugged:
            return (1 << 8 * width) - 1
        queue = self._queue
        match name:
            case "device_feature":
                return (self.features >> (32 * self._values.get("device_feature_select", 0))) & 0xFFFFFFFF
            case "num_queues":
                return len(self.queues)
            case "device_status":
                return self._read_status()
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

    def _read_status(self) -> int:
        status = self.status | (FAILED if self.quirks.stuck_reset else 0)
        if self._awaiting_zero and self._reads_to_zero:
            self._reads_to_zero -= 1
            status |= FAILED
        if status == 0:
            self._awaiting_zero = False
        self._features_ok_read = bool(status & FEATURES_OK)
        self._seen_broken = self._seen_broken or bool(status & NEEDS_RESET)
        return status

    def _write_common(self, offset: int, width: int, value: int) -> None:
        assert not self.quirks.removed, "a register was touched that is not there"
        name = common_field(offset, width)
        must(name not in READ_ONLY, "4.1.4.3.2 read-only", name)
        if name == "device_status":
            self._set_status(value)
        elif name == "driver_feature":
            must(self.status & DRIVER, "3.1.1 order", "features before DRIVER")
            must(not self.status & FEATURES_OK, "3.1.1 late features", f"{value:#x}")
            shift = 32 * self._values.get("driver_feature_select", 0)
            self.accepted = self.accepted & ~(0xFFFFFFFF << shift) | value << shift
        elif name.startswith("queue_") and name != "queue_select":
            self._set_queue(name, value)
        else:
            self._values[name] = value

    def _set_status(self, value: int) -> None:
        if value == 0:
            self._reset()
            return
        if self._out_of_order:
            return
        must(not self._awaiting_zero, "4.1.4.3.2 reset", f"device_status {value:#x} was written before")
        must(value & self.status == self.status, "2.1.1 status", f"from {self.status:#x} to {value:#x}")
        added = value & ~self.status
        if added & DRIVER:
            must(self.status & ACKNOWLEDGE, "3.1.1 order", "DRIVER before ACKNOWLEDGE")
        if added & FEATURES_OK:
            must(self.status & DRIVER, "3.1.1 order", "FEATURES_OK before DRIVER")
            must(not self.accepted & ~self.features, "2.2.1 features", f"{self.accepted:#x} of {self.features:#x}")
            must(self.accepted & MODERN or not self.features & MODERN, "6.1 version 1", f"{self.accepted:#x}")
            self._features_ok_read = False
            if self.quirks.refuse_features:
                value &= ~FEATURES_OK
        if added & DRIVER_OK:
            must(self.status & FEATURES_OK, "3.1.1 order", "DRIVER_OK before FEATURES_OK")
        self.status = value

    def _set_queue(self, name: str, value: int) -> None:
        queue = self._queue
        if self._out_of_order or queue is None or queue.role is None:
            must(self._out_of_order, "5.5.2 queue", f"{name} of a queue that is not there")
            return
        must(self.status & FEATURES_OK, "3.1.1 order", f"{name} before FEATURES_OK")
        must(self._features_ok_read, "3.1.1 re-read", name)
        must(not self.status & DRIVER_OK, "3.1.1 order", f"{name} after DRIVER_OK")
        must(not queue.enabled, "4.1.4.3.2 configured first", name)
        feature = FEATURE_OF.get(queue.role, MODERN)
        must(self.accepted & feature, "5.5.2 queue", f"{queue.role} was set up without feature {feature:#x}")
        if name == "queue_size":
            must(value and not value & (value - 1), "4.1.4.3.2 power of two", f"{value}")
            must(value <= queue.largest, "4.1.5.1.3 size", f"{value} of {queue.largest}")
            queue.size = value
        elif name == "queue_enable":
            must(value == 1, "4.1.4.3.2 enable", f"{value}")
            must(queue.descriptors and queue.available and queue.used, "4.1.4.3.2 configured first", "a ring has no address")
            for what, address, align, size in (
                ("descriptor table", queue.descriptors, 16, 16 * queue.size),
                ("available ring", queue.available, 2, 6 + 2 * queue.size),
                ("used ring", queue.used, 4, 6 + 8 * queue.size),
            ):
                must(address % align == 0, "2.7 alignment", f"{what} at {address:#x}, not at a multiple of {align}")
                self._bytes(address, size, what)
            queue.written = bytes(self._used_ring(queue))
            queue.enabled = True
        else:
            part, _, half = name.removeprefix("queue_").rpartition("_")
            attribute = {"desc": "descriptors", "driver": "available", "device": "used"}[part]
            shift = 32 if half == "hi" else 0
            old = getattr(queue, attribute)
            setattr(queue, attribute, old & ~(0xFFFFFFFF << shift) | value << shift)

    def _reset(self) -> None:
        self._awaiting_zero = True
        self._reads_to_zero = self.quirks.slow_reset
        if self.quirks.stuck_reset or self.quirks.unplugged:
            return
        self._out_of_order = self._seen_broken = self._stats_given = self._pulse = False
        self._masked = True
        self._tags = None
        self.status = self.accepted = self.interrupt_cause = 0
        self._values.clear()
        self._fresh_queues()
        # A device that was reset has nothing of the guest's, and will touch none of it.
        self.state = bytearray(len(self.state))

    def be_reborn(self, features: int, roles: Sequence[str | None], size: int) -> None:
        """From its next reset on the device offers these features, and these queues."""
        self._reborn = (features, [Queue(role, size, size) for role in roles])

    def _fresh_queues(self) -> None:
        if self._reborn is not None:
            (self.features, self.queues), self._reborn = self._reborn, None
        self.queues = [Queue(queue.role, queue.largest, queue.largest) for queue in self.queues]

    def _read_isr(self, _offset: int, _width: int) -> int:
        if self.quirks.unplugged:
            return 0xFF
        cause, self.interrupt_cause = self.interrupt_cause, 0
        return cause

    def _read_device(self, offset: int, width: int) -> int:
        must(width == 4, "4.1.3.1 width", f"configuration read with {width} bytes")
        if self.quirks.unplugged:
            return 0xFFFFFFFF
        return {0: self.num_pages, 4: self.actual}.get(offset, 0)

    def _write_device(self, offset: int, width: int, value: int) -> None:
        must(offset == 4, "5.5.4 configuration", f"written at {offset}")
        must(width == 4, "5.5.4 configuration", f"actual written with {width} bytes")
        self.actual = value
        self.actual_history.append(value)

    # -- queues ------------------------------------------------------------------------------------------------------

    def _write_notify(self, offset: int, width: int, value: int) -> None:
        assert not self.quirks.removed, "a register was touched that is not there"
        if self.quirks.unplugged:
            return
        self.notifications.append(value)
        self.on_notification(self)
        if self._out_of_order:
            must(not self._seen_broken, "2.1.1 needs reset", f"queue {value} was notified")
            return
        if not self.bus_master or (self.quirks.needs_classic_queues and not all(queue.enabled for queue in self.queues[:2])):
            return  # it cannot see the queue, or has not come to life
        must(width == 2, "4.1.5.2 notification", f"{width} bytes")
        must(value < len(self.queues), "4.1.5.2 notification", f"queue {value} of {len(self.queues)}")
        must(offset == value * self.notify_multiplier, "4.1.5.2 notification", f"queue {value} at {offset:#x}")
        must(self.status & DRIVER_OK, "3.1.1 early notification", f"queue {value}")
        queue = self.queues[value]
        must(queue.enabled, "5.5.2 queue", f"queue {value} was notified, and is not enabled")
        self._check_used_ring(queue)
        flags, index = struct.unpack("<HH", self._bytes(queue.available, 4, "available ring"))
        must(flags in (0, 1), "2.7.10.1 flags", f"{flags:#x}")
        new = (index - queue.next_available) % 0x10000
        must(new + len(queue.pending) <= queue.size, "2.7.6.1 index", f"from {queue.next_available} to {index}")
        for _ in range(new):
            at = queue.available + 4 + 2 * (queue.next_available % queue.size)
            (head,) = struct.unpack("<H", self._bytes(at, 2, "available ring"))
            queue.next_available = (queue.next_available + 1) % 0x10000
            self._serve(queue, self._chain(queue, head))

    def _bytes(self, address: int, size: int, what: str) -> memoryview:
        page = self.memory.get(address // PAGE * PAGE)
        must(page is not None, "2.7 memory", f"{what} at {address:#x}")
        assert page is not None
        offset = address % PAGE
        must(offset + size <= PAGE, "2.7.5 length", f"{what} at {address:#x} has {size} bytes, over the end of what was shared")
        return page[offset : offset + size]

    def _used_ring(self, queue: Queue) -> memoryview:
        return self._bytes(queue.used, 4 + 8 * queue.size, "used ring")

    def _check_used_ring(self, queue: Queue) -> None:
        must(self._used_ring(queue) == queue.written, "2.7.8 used ring", f"of the {queue.role} queue")

    def _chain(self, queue: Queue, head: int) -> Chain:
        numbers: list[int] = []
        raw = b""
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        number = head
        in_use = {number for chain in queue.pending for number in chain.numbers}
        while True:
            must(number < queue.size, "2.7.5 length", f"descriptor {number} of {queue.size}")
            must(number not in numbers, "2.7.5.2 loop", f"at descriptor {number}")
            must(number not in in_use, "2.7.13 in use", f"descriptor {number}")
            numbers.append(number)
            piece = bytes(self._bytes(queue.descriptors + 16 * number, 16, "descriptor"))
            raw += piece
            address, length, flags, following = struct.unpack("<QIHH", piece)
            must(length > 0, "2.7.5 length", "a buffer of no bytes")
            if flags & WRITE:
                writable.append((address, length))
            else:
                must(not writable, "2.7.4.2 order", f"of the {queue.role} queue")
                readable.append((address, length))
            if not flags & NEXT:
                break
            number = following
        data = b"".join(bytes(self._bytes(address, length, "buffer")) for address, length in readable)
        return Chain(head, numbers, raw, readable, data, writable, [])

    def _serve(self, queue: Queue, chain: Chain) -> None:
        self.largest_buffer = max(self.largest_buffer, len(chain.data))
        match queue.role:
            case "inflate" | "deflate":
                read_frames(chain)
            case "inflate_cont" | "deflate_cont":
                read_runs(chain)
            case "reporting":
                read_report(chain)
            case "stats":
                self._read_statistics(queue, chain)
        must(not chain.writable or queue.role == "reporting", "5.5.6.7.1 writable", f"on the {queue.role} queue")
        self._take(str(queue.role), chain.runs)
        queue.pending.append(chain)
        ignored = queue.role in ("inflate", "deflate") and 0 < 4 * self.quirks.most_frames < len(chain.data)
        if queue.role != "stats" and not (self.quirks.late or self.quirks.silent or ignored):
            self._complete(queue, queue.pending.pop())

    def _read_statistics(self, queue: Queue, chain: Chain) -> None:
        must(not queue.pending, "5.5.6.3.1 one buffer", "there is one already")
        self.statistics = read_statistics(chain)
        must(self._tags in (None, self.statistics.keys()), "5.5.6.3.1 same set", f"{self.statistics.keys()}, not {self._tags}")
        self._tags = set(self.statistics)
        self._stats_given = True

    def _take(self, role: str, runs: list[tuple[int, int]]) -> None:
        for first, count in runs:
            must(first + count <= len(self.state), "5.5.6 frames", f"{first:#x}+{count} of {len(self.state)}")
            states = self.state[first : first + count]
            where = f"frames {first:#x}+{count} on the {role} queue"
            if role.startswith("deflate"):
                must(INFLATING not in states and GUEST not in states, "5.5.6.1 deflate before inflate ack", where)
                must(DEFLATING not in states, "5.5.6.1 deflate before inflate ack", where)
                begin = DEFLATING
            else:
                must(states.count(GUEST) == count, "5.5.6 unused", where)
                must(self.guest is None or not self.guest.uses(first, count), "5.5.6 unused", where)
                begin = REPORTING_NOW if role == "reporting" else INFLATING
            self.state[first : first + count] = bytes([begin]) * count
        if role.startswith("deflate") and self.check_floor and not self.accepted & DEFLATE_ON_OOM:
            left = self.state.count(BALLOON)
            must(left >= self.num_pages, "5.5.6.1 below target", f"{left} frames of {self.num_pages}")

    def _complete(self, queue: Queue, chain: Chain) -> None:
        if self._out_of_order:
            return
        self._check_used_ring(queue)
        raw = b"".join(bytes(self._bytes(queue.descriptors + 16 * number, 16, "descriptor")) for number in chain.numbers)
        must(raw == chain.descriptors, "2.7.13 altered", f"descriptors of the {queue.role} queue")
        data = b"".join(bytes(self._bytes(address, length, "buffer")) for address, length in chain.readable)
        must(data == chain.data, "2.7.13 altered", f"a buffer of the {queue.role} queue")
        role = str(queue.role)
        for first, count in chain.runs:
            end = BALLOON if role.startswith("inflate") else GUEST
            self.state[first : first + count] = bytes([end]) * count
            self.reported_frames += count if role == "reporting" else 0
        identifier = chain.head
        if self.quirks.wrong_id:
            identifier = queue.size + 7
        elif self.quirks.repeated_id:
            identifier = (chain.head + 1) % queue.size
        slot = queue.used + 4 + 8 * (queue.next_used % queue.size)
        # The length says nothing on these queues: a driver that believed it would be found out.
        self._bytes(slot, 8, "used ring")[:] = struct.pack("<II", identifier, 0xDEAD)
        queue.next_used = (queue.next_used + 1 + self.quirks.index_jump) % 0x10000
        self._bytes(queue.used + 2, 2, "used index")[:] = struct.pack("<H", queue.next_used)
        queue.written = bytes(self._used_ring(queue))
        (flags,) = struct.unpack("<H", self._bytes(queue.available, 2, "available flags"))
        if not flags & 1 and not self.quirks.lost_interrupts:
            self._raise(QUEUE_CAUSE)
