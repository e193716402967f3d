"""What travels between a balloon driver and its device: feature bits, configuration, entries. All pure."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum, IntFlag
from itertools import islice
from typing import TypeVar

from balloon_agent.frames import (
    FRAME,
    FRAMES_PER_HUGE,
    Run,
    split,
)

T = TypeVar("T")


class BalloonFeature(IntFlag):
    """Feature bits of device type 5 as masks: spec 5.5.3, and CONT_PAGES from its RFC."""

    MUST_TELL_HOST = 1 << 0
    STATS_VQ = 1 << 1
    DEFLATE_ON_OOM = 1 << 2
    FREE_PAGE_HINT = 1 << 3
    PAGE_POISON = 1 << 4
    REPORTING = 1 << 5
    CONT_PAGES = 1 << 6


class BalloonConfiguration(ctypes.LittleEndianStructure):
    """struct virtio_balloon_config, spec 5.5.4. Used for its offsets; sizes are in frames of 4096 bytes."""

    _pack_ = 1
    _fields_ = (
        ("num_pages", ctypes.c_uint32),
        ("actual", ctypes.c_uint32),
        ("free_page_hint_cmd_id", ctypes.c_uint32),
        ("poison_val", ctypes.c_uint32),
    )


class ContEntry(ctypes.LittleEndianStructure):
    """One run on a cont queue: first frame, and size in bytes, a multiple of 4096, never 0, below 4 GiB."""

    _pack_ = 1
    _fields_ = (("pfn", ctypes.c_uint32), ("size", ctypes.c_uint32))


class StatisticTag(IntEnum):
    """What a statistic counts: spec 5.5.6.4, from 10 on Linux's include/uapi/linux/virtio_balloon.h. Bytes, or a number."""

    SWAP_IN = 0
    SWAP_OUT = 1
    MAJOR_FAULTS = 2
    MINOR_FAULTS = 3
    FREE_MEMORY = 4
    TOTAL_MEMORY = 5
    AVAILABLE_MEMORY = 6
    CACHES = 7
    HUGETLB_ALLOCATIONS = 8
    HUGETLB_FAILURES = 9
    OOM_KILLS = 10
    ALLOCATION_STALLS = 11
    ASYNC_SCANNED = 12
    DIRECT_SCANNED = 13
    ASYNC_RECLAIMED = 14
    DIRECT_RECLAIMED = 15


class Statistic(ctypes.LittleEndianStructure):
    """struct virtio_balloon_stat, spec 5.5.6.3: packed, 10 bytes."""

    _pack_ = 1
    _fields_ = (("tag", ctypes.c_uint16), ("val", ctypes.c_uint64))


CONT_ENTRY_SIZE = ctypes.sizeof(ContEntry)
_ENTRY = struct.Struct("<II")
_STATISTIC = struct.Struct("<HQ")
FRAME_NUMBER_SIZE = 4
_LARGEST_SIZE = 0xFFFFFFFF // FRAME * FRAME
_LARGEST_FRAME = 0xFFFFFFFF


def pack_runs(runs: Sequence[Run]) -> bytes:
    """Runs as cont entries, each written whole or not at all. ValueError for a run that the format cannot carry."""
    for run in runs:
        if run.size > _LARGEST_SIZE or run.end - 1 > _LARGEST_FRAME:
            raise ValueError(
                f"a run of {run.size} bytes at frame {run.first:#x} does not fit 32 bits: "
                f"at most {_LARGEST_SIZE} bytes, up to frame {_LARGEST_FRAME:#x}"
            )
    return b"".join(_ENTRY.pack(run.first, run.size) for run in runs)


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of at most ``size``, in their order."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


def frame_arrays(runs: Sequence[Run], most: int) -> Iterator[bytes]:
    """Frames one by one as the classic queues have them: arrays of at most ``most`` 32-bit numbers, spec 5.5.6.

    The frames of one aligned huge page follow one another, in one array where it is long enough for them: a host whose memory
    lies in huge pages discards one only if it has seen all its parts in one buffer. ValueError for a frame beyond 32 bits.
    """
    waiting: list[int] = []
    for piece in split(runs, min(most, FRAMES_PER_HUGE)):
        if piece.end - 1 > _LARGEST_FRAME:
            raise ValueError(f"frame {piece.end - 1:#x} does not fit 32 bits: at most {_LARGEST_FRAME:#x}")
        if len(waiting) + piece.count > most:
            yield _numbers(waiting)
            waiting = []
        waiting += range(piece.first, piece.end)
    if waiting:
        yield _numbers(waiting)


def _numbers(frames: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(frames)}I", *frames)


def pack_statistics(statistics: Mapping[StatisticTag, int]) -> bytes:
    """Statistics as they go into a buffer of the statistics queue. Values are taken modulo 64 bits."""
    return b"".join(_STATISTIC.pack(tag, value & 0xFFFFFFFFFFFFFFFF) for tag, value in statistics.items())
