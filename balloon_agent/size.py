"""Sizes as people write them."""

from __future__ import annotations

import re

from balloon_agent.errors import BadInput
from balloon_agent.frames import FRAME

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


def parse_wish(text: str, target: int, ram: int) -> int:
    """A size as ``parse_size`` has it, or relative: +64M and -64M to the ``target``, 25% of ``ram`` (down to a whole page)."""
    text = text.strip()
    if text.endswith("%"):
        match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)\s*%", text)
        if not match or float(match[1]) > 100:
            raise BadInput(f"{text!r} is no share of the guest's memory: write a number from 0 to 100, such as 25%")
        return int(ram * float(match[1]) / 100) // FRAME * FRAME
    if text[:1] in ("+", "-"):
        try:
            change = parse_size(text[1:])
        except BadInput as error:
            raise BadInput(f"{text!r} is no change of size, such as +64M or -64M: {error}") from error
        size = target + change if text[0] == "+" else target - change
        if size < 0:
            raise BadInput(f"{text!r} is more than the {format_size(target)} that the balloon is to have")
        return size
    return parse_size(text)


def format_size(size: int) -> str:
    """Bytes as MiB, exactly where that takes few digits."""
    return f"{size / (1 << 20):.10g} MiB"
