"""Flags and layouts of the virtio 1.3 specification, each declared once."""

from __future__ import annotations

import ctypes
from enum import IntEnum, IntFlag

VENDOR = 0x1AF4


class Status(IntFlag):
    """The device status field, spec 2.1."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class TransportFeature(IntFlag):
    """Feature bits that belong to every device type, spec 6, as masks."""

    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34


class CapabilityType(IntEnum):
    """cfg_type of a virtio PCI capability, spec 4.1.4."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI = 5


class InterruptStatus(IntFlag):
    """The ISR status byte, spec 4.1.4.5. Reading it acknowledges the interrupt."""

    QUEUE = 1
    CONFIGURATION = 2


class CommonConfiguration(ctypes.LittleEndianStructure):
    """struct virtio_pci_common_cfg, spec 4.1.4.3. Used for its offsets; the registers are read one by one."""

    _pack_ = 1
    _fields_ = (
        ("device_feature_select", ctypes.c_uint32),
        ("device_feature", ctypes.c_uint32),
        ("driver_feature_select", ctypes.c_uint32),
        ("driver_feature", ctypes.c_uint32),
        ("config_msix_vector", ctypes.c_uint16),
        ("num_queues", ctypes.c_uint16),
        ("device_status", ctypes.c_uint8),
        ("config_generation", ctypes.c_uint8),
        ("queue_select", ctypes.c_uint16),
        ("queue_size", ctypes.c_uint16),
        ("queue_msix_vector", ctypes.c_uint16),
        ("queue_enable", ctypes.c_uint16),
        ("queue_notify_off", ctypes.c_uint16),
        ("queue_desc", ctypes.c_uint64),
        ("queue_driver", ctypes.c_uint64),
        ("queue_device", ctypes.c_uint64),
    )


class VendorCapability(ctypes.LittleEndianStructure):
    """struct virtio_pci_cap, spec 4.1.4."""

    _pack_ = 1
    _fields_ = (
        ("cap_vndr", ctypes.c_uint8),
        ("cap_next", ctypes.c_uint8),
        ("cap_len", ctypes.c_uint8),
        ("cfg_type", ctypes.c_uint8),
        ("bar", ctypes.c_uint8),
        ("id", ctypes.c_uint8),
        ("padding", ctypes.c_uint8 * 2),
        ("offset", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
    )


class Descriptor(ctypes.LittleEndianStructure):
    """struct virtq_desc, spec 2.7.5."""

    _pack_ = 1
    _fields_ = (
        ("addr", ctypes.c_uint64),
        ("len", ctypes.c_uint32),
        ("flags", ctypes.c_uint16),
        ("next", ctypes.c_uint16),
    )


class DescriptorFlag(IntFlag):
    """virtq_desc.flags, spec 2.7.5."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4


# struct virtq_avail and virtq_used, spec 2.7.6 and 2.7.8: flags u16, idx u16, then the ring.
RING_HEADER = 4
USED_ELEMENT = 8
# Largest queue whose descriptor table fits one page of 4096 bytes, which is what this driver uses.
LARGEST_QUEUE = 256
