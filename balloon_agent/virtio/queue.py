"""The split virtqueue, spec 2.7, from the driver's side.

The device can write to the used ring at any time and say anything there. So the free list and the table of what is
outstanding are kept in private memory, and each used element is checked against them before it is believed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from balloon_agent.errors import ConfigurationInvalid, UsedRingInvalid

from .spec import (
    LARGEST_QUEUE,
    RING_HEADER,
    USED_ELEMENT,
    Descriptor,
    DescriptorFlag,
)

_DESCRIPTOR_SIZE = 16
_U16 = 0x10000
_AVAILABLE_FLAGS, _AVAILABLE_INDEX = 0, 1
_USED_INDEX = 1
_NO_INTERRUPT = 1


def wrapping_distance(newer: int, older: int) -> int:
    """How far a free-running 16-bit index has come: the one place where such indices are compared."""
    return (newer - older) % _U16


_order = threading.Lock()


def full_barrier() -> None:
    """Order earlier memory accesses before later ones.

    x86 only ever reorders a store with a later load, and Python has no fence; taking a lock is an atomic operation
    with acquire and release semantics on every architecture, which orders both.
    """
    with _order:
        pass


class DevicePage(Protocol):
    """4096 bytes that both sides see. ``address`` is what the device must be told."""

    @property
    def address(self) -> int: ...

    @property
    def view(self) -> memoryview: ...


@dataclass(frozen=True)
class Buffer:
    """A piece of memory for the device: address as the device sees it, length in bytes, and who writes it."""

    address: int
    length: int
    device_writes: bool = False


class SplitQueue:
    """One queue in three pages of the caller's: descriptor table, available ring, used ring.

    The pages belong to the caller and must stay mapped and pinned until the device has been reset.
    """

    def __init__(self, index: int, size: int, pages: Sequence[DevicePage], *, interrupts: bool = True) -> None:
        if size < 1 or size > LARGEST_QUEUE or size & (size - 1):
            raise ConfigurationInvalid(f"queue_size of queue {index} is {size}, not a power of two from 1 to {LARGEST_QUEUE}")
        self.index = index
        self.size = size
        self.descriptors, self.available, self.used = pages
        for page in pages:
            page.view[:] = bytes(len(page.view))
        self._available = self.available.view.cast("H")
        self._used16 = self.used.view.cast("H")
        self._used32 = self.used.view.cast("I")
        self._available_index = 0
        self._used_index = 0
        self._free = list(range(size - 1, -1, -1))
        self._outstanding: dict[int, list[int]] = {}
        self.set_interrupts(interrupts)

    @property
    def outstanding(self) -> int:
        """How many chains the device has and has not returned."""
        return len(self._outstanding)

    def set_interrupts(self, on: bool) -> None:
        """Whether the device should interrupt for used buffers: a hint only, it may do so all the same (spec 2.7.7)."""
        self._available[_AVAILABLE_FLAGS] = 0 if on else _NO_INTERRUPT
        full_barrier()

    def add(self, chain: Sequence[Buffer]) -> int:
        """Make a chain of buffers available and return its head; the device hears of it by a notification.

        The buffers are the device's from now until ``completed`` returns the head. ValueError if the queue is full.
        """
        if not chain or len(chain) > len(self._free):
            raise ValueError(f"queue {self.index} has room for {len(self._free)} buffers, not for {len(chain)}")
        numbers = [self._free.pop() for _ in chain]
        for position, (number, buffer) in enumerate(zip(numbers, chain, strict=True)):
            last = position == len(chain) - 1
            flags = (DescriptorFlag.WRITE if buffer.device_writes else 0) | (0 if last else DescriptorFlag.NEXT)
            following = 0 if last else numbers[position + 1]
            descriptor = Descriptor(buffer.address, buffer.length, flags, following)
            begin = number * _DESCRIPTOR_SIZE
            self.descriptors.view[begin : begin + _DESCRIPTOR_SIZE] = bytes(descriptor)
        head = numbers[0]
        self._outstanding[head] = numbers
        self._available[RING_HEADER // 2 + self._available_index % self.size] = head
        # Spec 2.7.13.2: the ring entry and the descriptors before the index that publishes them.
        full_barrier()
        self._available_index = (self._available_index + 1) % _U16
        self._available[_AVAILABLE_INDEX] = self._available_index
        full_barrier()
        return head

    def completed(self) -> list[int]:
        """Heads that the device has returned since the last call, in its order. UsedRingInvalid if it lies.

        The length it gives is not used: nothing on this driver's queues depends on it.
        """
        index = self._used16[_USED_INDEX]
        count = wrapping_distance(index, self._used_index)
        if count > len(self._outstanding):
            raise UsedRingInvalid(
                f"queue {self.index}: used index went from {self._used_index} to {index}, "
                f"with at most {len(self._outstanding)} buffers to return"
            )
        # Spec 2.7.8.3: the elements may be read only after the index that announces them.
        full_barrier()
        heads = []
        for _ in range(count):
            slot = self._used_index % self.size
            head = self._used32[(RING_HEADER + slot * USED_ELEMENT) // 4]
            numbers = self._outstanding.pop(head, None)
            if numbers is None:
                raise UsedRingInvalid(f"queue {self.index}: used id {head} was not given out (size {self.size})")
            self._free.extend(reversed(numbers))
            self._used_index = (self._used_index + 1) % _U16
            heads.append(head)
        return heads

    def release(self) -> None:
        """Drop the views of the pages. Only after the device has been reset."""
        for view in (self._available, self._used16, self._used32):
            view.release()
