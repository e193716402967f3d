"""The picture of the guest's memory."""

from __future__ import annotations

import struct
from pathlib import Path

from balloon_agent.cli.map import (
    FREE,
    MARKS,
    NOTHING,
    UNKNOWN,
    USED,
    Cell,
    cells_of,
    draw,
    fitting,
    look,
    ram_ranges,
)
from balloon_agent.frames import Run
from balloon_agent.linux.page_flags import KPF_BUDDY, KPF_NOPAGE
from balloon_agent.memory.ledger.ledger import Extent, Ledger
from tests.unit.test_questions import located

MIB = 1 << 20
IOMEM = """00000000-00000fff : Reserved
00001000-0009fbff : System RAM
00100000-007fffff : System RAM
  00200000-003fffff : Kernel code
00800000-00ffffff : Reserved
100000000-1007fffff : System RAM
"""
RANGES = [(0x1000, 0x9FC00), (0x100000, 0x800000), (1 << 32, (1 << 32) + 8 * MIB)]


def test_ram_is_found_and_hidden_addresses_are_none() -> None:
    assert ram_ranges(IOMEM) == RANGES
    assert ram_ranges("00000000-00000000 : System RAM\n") == []


def test_each_piece_knows_how_much_of_it_is_ram_and_held() -> None:
    ledger = Ledger()
    # Across the border of two pieces.
    ledger.add(Extent("thp-1", "thp", [Run(2 * 512 - 100, 200)], "h"))
    ledger.add(Extent("pages-1", "pages", [Run(0, 1), Run(5, 1), Run(2 * 512 + 300, 1)], "h"))
    held = located(ledger, 2 * MIB)
    cells = cells_of(RANGES, held, 2 * MIB)
    assert [cells[number].ram for number in (0, 1, 3)] == [0x9EC00 + MIB, 2 * MIB, 2 * MIB]
    assert cells[0].held == {"pages": 8192}
    assert cells[1].held == {"thp": 409600}
    assert cells[2].held == {"thp": 409600, "pages": 4096}
    assert sum(sum(cell.held.values()) for cell in cells.values()) == ledger.size
    assert list(cells) == [0, 1, 2, 3, 2048, 2049, 2050, 2051]


def test_what_most_of_a_piece_is_is_drawn() -> None:
    assert Cell().mark == NOTHING
    assert Cell(ram=2 * MIB).mark == UNKNOWN
    assert Cell(ram=2 * MIB, used=0.01).mark == FREE
    assert Cell(ram=2 * MIB, used=0.9).mark == USED
    assert Cell(ram=2 * MIB, held={"thp": 2 * MIB}, used=1.0).mark == MARKS["thp"]
    assert Cell(ram=2 * MIB, held={"pages": 4096}, used=0.01).mark == FREE


def test_pages_are_looked_at(tmp_path: Path) -> None:
    flags = [KPF_BUDDY] * 512 + [0] * 512 + [KPF_NOPAGE] * 512
    (tmp_path / "kpageflags").write_bytes(struct.pack(f"<{len(flags)}Q", *flags))
    cells = {number: Cell(ram=2 * MIB) for number in range(4)}
    look(cells, 2 * MIB, str(tmp_path / "kpageflags"))
    assert [cell.used for cell in cells.values()] == [0.0, 1.0, None, None]
    look(cells, 2 * MIB, str(tmp_path / "none"))


def test_rows_have_their_address_and_holes_are_left_out() -> None:
    cells = cells_of(RANGES, {"blocks": [[2048, 2 * MIB]]}, 2 * MIB)
    lines = draw(cells, 2 * MIB, 16).plain.splitlines()
    assert lines == ["        0 MiB  ????            ", "     4096 MiB  B???            "]


def test_all_memory_fits() -> None:
    assert fitting(1 << 30, 64, 32) == 2 * MIB
    assert (1 << 40) // fitting(1 << 40, 64, 32) <= 64 * 32
