"""``balloonctl map``: the guest's memory as the terminal can show it, a character for each piece of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from balloon_agent.api.client import ask
from balloon_agent.errors import BadInput
from balloon_agent.frames import FRAME
from balloon_agent.linux.page_flags import KPF_BUDDY, KPF_NOPAGE
from balloon_agent.memory.sources.source import SOURCE_NAMES
from balloon_agent.size import format_size

ANSWER_DEADLINE = 35.0
SMALLEST_CELL = 1 << 21
MOST_CELLS = 1 << 16
# How each source is drawn: a letter, which is all there is without colours, and its colour.
MARKS = {
    "blocks": ("B", "blue"),
    "hugetlb-1g": ("G", "magenta"),
    "hugetlb": ("H", "magenta"),
    "thp": ("T", "cyan"),
    "pages": ("p", "yellow"),
}
FREE, USED, UNKNOWN, NOTHING = (".", "green"), ("#", "red"), ("?", "white"), (" ", "")
HALF = ("+", "red")
# Pages looked at in each piece: whether they are free.
LOOKS = 256
_ENTRY = 8
_RAM = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) : System RAM$", re.MULTILINE)


@dataclass
class Cell:
    """A piece of guest-physical memory: what of it is RAM, what of that is in the balloon, and how much of the rest is used."""

    ram: int = 0
    held: dict[str, int] = field(default_factory=dict)
    used: float | None = None

    @property
    def mark(self) -> tuple[str, str]:
        """What to draw: what most of it is."""
        if self.ram == 0 and not self.held:
            return NOTHING
        if self.held:
            source, size = max(self.held.items(), key=lambda item: item[1])
            if size * 2 >= self.ram:
                return MARKS[source]
        if self.used is None:
            return UNKNOWN
        return FREE if self.used < 0.1 else USED if self.used > 0.6 else HALF


def ram_ranges(iomem: str) -> list[tuple[int, int]]:
    """First byte and end of each range of RAM, in bytes, by /proc/iomem. Without root the kernel shows nothing but zeros."""
    ranges = [(int(begin, 16), int(end, 16) + 1) for begin, end in _RAM.findall(iomem)]
    return [(begin, end) for begin, end in ranges if end > 1]


def cells_of(ranges: Sequence[tuple[int, int]], held: dict[str, list[list[int]]], size: int) -> dict[int, Cell]:
    """The pieces with RAM in them, by number."""
    cells: dict[int, Cell] = {}
    for begin, end in ranges:
        for number in range(begin // size, (end - 1) // size + 1):
            cell = cells.setdefault(number, Cell())
            cell.ram += min(end, (number + 1) * size) - max(begin, number * size)
    for source, pieces in held.items():
        for number, amount in pieces:
            cells.setdefault(number, Cell()).held[source] = amount
    return dict(sorted(cells.items()))


def look(cells: dict[int, Cell], size: int, path: str = "/proc/kpageflags") -> None:
    """Find out how much of each is used, from some of its pages; where that cannot be read, it stays unknown."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    frames = size // FRAME
    apart = max(1, frames // 4)
    at_once = min(LOOKS // 4, apart)
    try:
        for number, cell in cells.items():
            entries: list[int] = []
            for place in range(4):
                data = os.pread(fd, at_once * _ENTRY, (number * frames + place * apart) * _ENTRY)
                entries += memoryview(data[: len(data) // _ENTRY * _ENTRY]).cast("Q").tolist()
            there = [entry for entry in entries if not entry & KPF_NOPAGE]
            if there:
                cell.used = sum(1 for entry in there if not entry & KPF_BUDDY) / len(there)
    except OSError:
        return
    finally:
        os.close(fd)


def fitting(ram_end: int, width: int, height: int) -> int:
    """Bytes for each character, a power of two, so that all of memory fits."""
    size = SMALLEST_CELL
    while ram_end // size > width * height:
        size *= 2
    return size


def draw(cells: dict[int, Cell], size: int, width: int) -> Text:
    """Rows of ``width`` pieces, each with its address; of rows without any RAM nothing is drawn."""
    text = Text()
    rows = sorted({number // width for number in cells})
    for row in rows:
        text.append(f"{row * width * size >> 20:>9} MiB  ")
        for number in range(row * width, (row + 1) * width):
            letter, colour = cells.get(number, Cell()).mark
            text.append(letter, colour)
        text.append("\n")
    return text


def legend(cells: dict[int, Cell], size: int) -> Text:
    text = Text(f"each {format_size(size)}: ")
    held = {source: sum(cell.held.get(source, 0) for cell in cells.values()) for source in SOURCE_NAMES}
    parts = [(MARKS[source], f"{source} {format_size(amount)}") for source, amount in held.items() if amount]
    parts += [(FREE, "free"), (HALF, "partly used"), (USED, "used")]
    if any(cell.mark == UNKNOWN for cell in cells.values()):
        parts.append((UNKNOWN, "the guest's"))
    for (letter, colour), name in parts:
        text.append(letter, colour)
        text.append(f" {name}  ")
    return text


def show_map(path: Path, size: int | None, *, as_json: bool, proc_root: Path = Path("/proc")) -> None:
    """Print it. BadInput for a piece that is too small, or makes too many."""
    console = Console(highlight=False)
    ranges = ram_ranges((proc_root / "iomem").read_text())
    end = max((end for _, end in ranges), default=0)
    width = 1 << (max(16, min(console.width - 16, 128)).bit_length() - 1)
    if size is None:
        size = fitting(end or 1 << 40, width, 32)
    if size < SMALLEST_CELL or size % SMALLEST_CELL or end // size > MOST_CELLS:
        raise BadInput(
            f"--cell {format_size(size)} is no multiple of 2M, or makes more than {MOST_CELLS} pieces of {format_size(end)}"
        )
    held = ask(path, {"op": "map", "cell_bytes": size}, ANSWER_DEADLINE)["map"]
    cells = cells_of(ranges, held, size)
    look(cells, size, str(proc_root / "kpageflags"))
    if as_json:
        pieces = [
            {"address": number * size, "ram_bytes": cell.ram, "held_bytes": cell.held, "used": cell.used}
            for number, cell in cells.items()
        ]
        print(json.dumps({"cell_bytes": size, "cells": pieces}))
        return
    console.print(draw(cells, size, width), end="", soft_wrap=True)
    console.print(legend(cells, size), soft_wrap=True)
