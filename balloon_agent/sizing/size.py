"""Sizes as people write them."""

from __future__ import annotations

import re

from balloon_agent.errors import BadInput
from balloon_agent.memory.frames import FRAME

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"^(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]?)(?:i?b)?$", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes, a multiple of 4096: 424M, 424MiB, 1.5G, 1048576. Units are powers of 1024. BadInput for anything else."""
    match = _SIZE.match(text.strip())
    if not match:
        raise BadInput(f"{text!r} is no size: write a number with K, M, G or T, such as 424M or 1.5GiB")
    size = float(match[1]) * _UNITS[match[2].lower()]
    if size != int(size) or int(size) % FRAME:
        raise BadInput(f"{text!r} is {size:g} bytes, not a multiple of {FRAME}: the balloon moves in pages of {FRAME} bytes")
    return int(size)


def format_size(size: int) -> str:
    """Bytes as MiB, exactly where that takes few digits."""
    return f"{size / (1 << 20):.10g} MiB"
