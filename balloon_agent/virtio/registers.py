"""A window on device registers, in which one Python operation is one access of the register's own width."""

from __future__ import annotations

import ctypes
import sys
from typing import Any, Literal

from balloon_agent.errors import DeviceMisbehaved

if sys.byteorder != "little":  # pragma: no cover - memoryview.cast is native, and virtio 1.x is little-endian
    raise ImportError("balloon_agent drives devices from little-endian machines only")

_FORMATS: dict[int, Literal["B", "H", "I"]] = {1: "B", 2: "H", 4: "I"}


class Window:
    """Registers behind ``memory``, which stays the caller's. Offsets are in bytes.

    A cast memoryview stores and loads with a single instruction of the item's width: what a register demands, and
    what slicing or ``struct.pack_into`` does not promise. The mapping may be larger than the registers, never smaller.
    """

    def __init__(self, memory: memoryview, name: str) -> None:
        self.name = name
        self.size = len(memory)
        # A cast wants whole items: the few bytes behind the last whole one stay reachable by the narrower views.
        self._views = {width: memory[: self.size - self.size % width].cast("B").cast(code) for width, code in _FORMATS.items()}

    def read(self, offset: int, width: int) -> int:
        return self._views[width][self._index(offset, width)]

    def write(self, offset: int, width: int, value: int) -> None:
        self._views[width][self._index(offset, width)] = value

    def _index(self, offset: int, width: int) -> int:
        if offset % width or offset + width > self.size:
            raise DeviceMisbehaved(f"{self.name}: no {width}-byte register at {offset:#x} in a window of {self.size:#x} bytes")
        return offset // width

    def get(self, field: Any) -> int:
        """Read a register named by a ctypes field, e.g. ``CommonConfiguration.num_queues``."""
        return self.read(field.offset, field.size)

    def set(self, field: Any, value: int) -> None:
        """Write a register named by a ctypes field; one of 64 bits as two of 32, as spec 4.1.3.1 has it."""
        if field.size == ctypes.sizeof(ctypes.c_uint64):
            self.write(field.offset, 4, value & 0xFFFFFFFF)
            self.write(field.offset + 4, 4, value >> 32)
        else:
            self.write(field.offset, field.size, value)

    def release(self) -> None:
        """Let go of the memory, so that its owner can unmap it."""
        for view in self._views.values():
            view.release()
