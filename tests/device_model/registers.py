"""The device's registers: the common configuration of virtio 1.3, 4.1.4.3, as offsets and widths of its own."""

from __future__ import annotations

from collections.abc import Callable

from balloon_agent.virtio.registers import Window

from .musts import must

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


def common_field(offset: int, width: int) -> str:
    """The register at ``offset``; a breach if it is accessed in part."""
    must(offset in COMMON, "4.1.3.1 width", f"the common configuration at {offset:#x}, inside a field")
    name, size = COMMON[offset]
    must(width == size, "4.1.3.1 width", f"{name} with {width} bytes, not {size}")
    return name
