"""Where a virtio PCI function keeps its registers: a walk through its capability list, which is not trusted."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from ctypes import sizeof
from dataclasses import dataclass

from balloon_agent.errors import DeviceMisbehaved

from .spec import CapabilityType, VendorCapability

_STATUS, _HAS_LIST = 0x06, 0x10
_FIRST = 0x34
_VENDOR_SPECIFIC = 0x09
_HEADER_END = 0x40  # a capability never lies in the standard header
_CONFIG_SIZE = 256


@dataclass(frozen=True)
class Region:
    """A piece of a BAR, in bytes."""

    bar: int
    offset: int
    length: int

    def check(self, bar_size: int, name: str) -> None:
        """DeviceMisbehaved unless the piece lies within its BAR of ``bar_size`` bytes."""
        if self.length == 0 or self.offset + self.length > bar_size:
            raise DeviceMisbehaved(
                f"{name} lies at {self.offset:#x}+{self.length:#x} of BAR {self.bar}, which has {bar_size:#x} bytes"
            )


@dataclass(frozen=True)
class Layout:
    """The four regions a driver needs, spec 4.1.4, and the multiplier of the notification offsets."""

    common: Region
    notify: Region
    notify_multiplier: int
    isr: Region
    device: Region

    def bars(self) -> set[int]:
        return {region.bar for region in (self.common, self.notify, self.isr, self.device)}


def vendor_capabilities(config: bytes) -> Iterator[tuple[VendorCapability, bytes]]:
    """Each virtio capability with the bytes behind it, in list order. DeviceMisbehaved for a list that is none."""
    if len(config) < _HEADER_END:
        raise DeviceMisbehaved(f"PCI configuration space has {len(config)} bytes, fewer than {_HEADER_END}: is this root?")
    if not struct.unpack_from("<H", config, _STATUS)[0] & _HAS_LIST:
        return
    pointer = config[_FIRST] & 0xFC
    seen: set[int] = set()
    while pointer:
        if pointer in seen or pointer < _HEADER_END or pointer + 3 > len(config):
            raise DeviceMisbehaved(
                f"PCI capability pointer {pointer:#x}: repeated, or outside {_HEADER_END:#x}..{len(config):#x}"
            )
        seen.add(pointer)
        if config[pointer] == _VENDOR_SPECIFIC:
            length = config[pointer + 2]
            if length < sizeof(VendorCapability) or pointer + length > len(config):
                raise DeviceMisbehaved(
                    f"virtio capability at {pointer:#x} has {length} bytes, not {sizeof(VendorCapability)} or more"
                )
            body = config[pointer : pointer + length]
            yield VendorCapability.from_buffer_copy(body), body[sizeof(VendorCapability) :]
        pointer = config[pointer + 1] & 0xFC


def layout(config: bytes) -> Layout:
    """The layout that the first capability of each type gives (spec 4.1.4.1: a driver should use the first it can)."""
    found: dict[int, Region] = {}
    multiplier = 0
    for capability, rest in vendor_capabilities(config):
        kind = capability.cfg_type
        # Spec 4.1.4.1: bar values other than 0 to 5 are reserved, and capabilities with them are to be ignored.
        if kind in found or capability.bar > 5 or kind not in list(CapabilityType) or kind == CapabilityType.PCI:
            continue
        if kind == CapabilityType.NOTIFY:
            if len(rest) < 4:
                raise DeviceMisbehaved("the notify capability is too short for its multiplier")
            multiplier = struct.unpack_from("<I", rest)[0]
            # Spec 4.1.4.4.1: even power of two, or 0.
            if multiplier & (multiplier - 1) or multiplier % 2:
                raise DeviceMisbehaved(f"notify_off_multiplier is {multiplier}, not 0 and no even power of two")
        found[kind] = Region(capability.bar, capability.offset, capability.length)
    wanted = (CapabilityType.COMMON, CapabilityType.NOTIFY, CapabilityType.ISR, CapabilityType.DEVICE)
    if missing := [kind.name.lower() for kind in wanted if kind not in found]:
        raise DeviceMisbehaved(
            f"the device has no virtio 1.x {', '.join(missing)} capability: a legacy device? (QEMU: disable-modern=off)"
        )
    common, notify, isr, device = (found[kind] for kind in wanted)
    return Layout(common, notify, multiplier, isr, device)
