"""PCI configuration space for the model: capability lists, and a transport that finds its registers by them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from balloon_agent.virtio.capabilities import Layout, Region, layout
from balloon_agent.virtio.registers import Window

from .model import BalloonModel
from .parts import Page
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


def first_of_each(config: bytes) -> tuple[dict[str, Region], int]:
    """The first usable structure of each type, and the multiplier, for a sound list: 4.1.4 read without the driver."""
    found: dict[str, Region] = {}
    multiplier = 0
    at = config[0x34] & ~3
    while at:
        vendor, following, _, kind, bar, _, offset, length = struct.unpack_from("<BBBBBBxxII", config + bytes(32), at)
        if vendor == 9 and kind in NAMES and bar < 6 and NAMES[kind] not in found:
            found[NAMES[kind]] = Region(bar, offset, length)
            if kind == NOTIFY:
                (multiplier,) = struct.unpack_from("<I", config + bytes(32), at + 16)
        at = following & ~3
    return found, multiplier


class ModelTransport:
    """The model behind its capability list: what a transport does with a real function.

    DeviceMisbehaved for a list that is none; AssertionError if the driver reads a sound one in another way than this module.
    """

    interrupt_fd = -1
    translated = False
    unreachable: str | None = None

    def __init__(self, model: BalloonModel, config: bytes) -> None:
        self._model = model
        found: Layout = layout(config)
        self.notify_multiplier = found.notify_multiplier
        regions, model.notify_multiplier = first_of_each(config)
        assert {name: getattr(found, name) for name in NAMES.values()} == regions
        self.common, self.notify, self.isr, self.device = (
            self._window(getattr(found, name), name) for name in ("common", "notify", "isr", "device")
        )

    def _window(self, region: Region, name: str) -> Window:
        """As large as the list says, which need not be what is there."""
        region.check(BAR_SIZE, name)
        window: Registers = getattr(self._model, name)
        return Registers(name, region.length, window.read, window.write)

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

    def answers(self) -> bool:
        return True

    def check_present(self) -> None:
        self._model.check_present()

    def interrupts(self) -> int | None:
        return self._model.interrupts()
