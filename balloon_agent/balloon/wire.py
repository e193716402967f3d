"""What travels between a balloon driver and its device: feature bits, configuration, entries. All pure."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from enum import IntFlag
from itertools import islice

from balloon_agent.memory.frames import FRAME, Run


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


CONT_ENTRY_SIZE = ctypes.sizeof(ContEntry)
_ENTRY = struct.Struct("<II")
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


def in_buffers(runs: Sequence[Run], entries: int) -> Iterator[list[Run]]:
    """Runs in lists of at most ``entries``, in their order."""
    source = iter(runs)
    while batch := list(islice(source, entries)):
        yield batch
