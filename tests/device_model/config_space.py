"""PCI configuration space for the model: capability lists, and a transport that finds its registers by them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from balloon_agent.virtio.capabilities import Layout, Region, layout
from balloon_agent.virtio.registers import Window

from .model import BalloonModel, Page
from .registers import Registers

COMMON, NOTIFY, ISR, DEVICE, PCI = 1, 2, 3, 4, 5
NAMES = {COMMON: "common", NOTIFY: "notify", ISR: "isr", DEVICE: "device"}
FIRST_CAPABILITY = 0x40
BAR_SIZE = 0x10000


class Capability(NamedTuple):
    """A virtio capability: its type, and where it says that its structure lies."""

    kind: int
    bar: int
    offset: int
    length: int


def config_space(capabilities: Sequence[Capability], multiplier: int = 4) -> bytearray:
    """256 bytes of configuration space with these virtio capabilities, linked in their order."""
    config = bytearray(256)
    struct.pack_into("<H", config, 6, 0x10)
    at, link = FIRST_CAPABILITY, 0x34
    for kind, bar, offset, length in capabilities:
        config[link] = at
        size = 20 if kind == NOTIFY else 16
        struct.pack_into("<BBBBBBxxII", config, at, 9, 0, size, kind, bar, 0, offset, length)
        if kind == NOTIFY:
            struct.pack_into("<I", config, at + 16, multiplier)
        link, at = at + 1, at + 20
    return config


class ModelTransport:
    """The model behind BARs: what a transport does with a real function, with the registers where ``config`` says they are.

    ``truth`` is where they really are: an access anywhere else is an access to nothing, and fails the test.
    """

    interrupt_fd = -1

    def __init__(self, model: BalloonModel, config: bytes, truth: Mapping[int, Capability]) -> None:
        self._model = model
        self._truth = truth
        found: Layout = layout(config)
        self.notify_multiplier = found.notify_multiplier
        self.common = self._window(found.common, "common configuration")
        self.notify = self._window(found.notify, "notify region")
        self.isr = self._window(found.isr, "interrupt status")
        self.device = self._window(found.device, "device configuration")

    def _window(self, region: Region, name: str) -> Window:
        region.check(BAR_SIZE, name)

        def registers(offset: int) -> tuple[Registers, int]:
            place = region.offset + offset
            for kind, capability in self._truth.items():
                if capability.bar == region.bar and capability.offset <= place < capability.offset + capability.length:
                    return getattr(self._model, NAMES[kind]), place - capability.offset
            raise AssertionError(f"there are no registers at {place:#x} of BAR {region.bar}, which was taken for the {name}")

        def read(offset: int, width: int) -> int:
            window, at = registers(offset)
            return window.read(at, width)

        def write(offset: int, width: int, value: int) -> None:
            window, at = registers(offset)
            window.write(at, width, value)

        return Registers(name, region.length, read, write)

    def allocate_pages(self, count: int) -> list[Page]:
        return self._model.allocate_pages(count)

    def wait_interrupt(self, timeout: float) -> bool:
        return self._model.wait_interrupt(timeout)

    def enable_interrupt(self) -> None:
        self._model.enable_interrupt()

    def enable(self) -> None:
        self._model.enable()

    def disable(self) -> None:
        self._model.disable()

    def interrupts(self) -> int | None:
        return self._model.interrupts()
