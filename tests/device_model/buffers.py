"""What the buffers on a balloon's queues say, read as the specification and the proposal have it."""

from __future__ import annotations

import struct

from .musts import must
from .parts import Chain

PAGE = 4096
ENTRY_SIZE, STATISTIC_SIZE = 8, 10


def read_frames(chain: Chain) -> None:
    """5.5.6: an array of 32-bit frame numbers, taken together to runs where they follow one another."""
    must(len(chain.data) % 4 == 0, "5.5.6 frames", f"{len(chain.data)} bytes")
    for (frame,) in struct.iter_unpack("<I", chain.data):
        if chain.runs and sum(chain.runs[-1]) == frame:
            chain.runs[-1] = (chain.runs[-1][0], chain.runs[-1][1] + 1)
        else:
            chain.runs.append((frame, 1))


def read_runs(chain: Chain) -> None:
    """The proposal's entries."""
    must(len(chain.data) % ENTRY_SIZE == 0, "RFC entry", f"{len(chain.data)} bytes")
    for frame, size in struct.iter_unpack("<II", chain.data):
        must(size and size % PAGE == 0, "RFC entry", f"{size} bytes at frame {frame:#x}")
        chain.runs.append((frame, size // PAGE))


def read_report(chain: Chain) -> None:
    """5.5.6.7: each buffer is a range of the guest's memory."""
    must(chain.writable and not chain.readable, "5.5.6.7.1 writable", "a readable buffer in a report")
    for address, length in chain.writable:
        must(address % PAGE == 0 and length % PAGE == 0, "5.5.6.7.1 writable", f"{length} bytes at {address:#x}")
        chain.runs.append((address // PAGE, length // PAGE))


def read_statistics(chain: Chain) -> dict[int, int]:
    """5.5.6.3: values by tag."""
    must(chain.data and len(chain.data) % STATISTIC_SIZE == 0, "5.5.6.3.1 whole entries", f"{len(chain.data)} bytes")
    entries = list(struct.iter_unpack("<HQ", chain.data))
    must(len(dict(entries)) == len(entries), "5.5.6.3.1 whole entries", "a tag is there twice")
    return dict(entries)
