"""Where an extent is mapped and what is behind that: as few pieces as there can be, and whether it is still so."""

from __future__ import annotations

from array import array
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloon_agent.frames import (
    FRAME,
    FRAMES_PER_HUGE,
    HUGE,
    from_frames,
    join,
)
from balloon_agent.holder.mapping import Pieces, pieces_of
from balloon_agent.linux.pagemap import MemoryGone, Pagemap

PRESENT = 1 << 63
BASE = 64 * HUGE
# Huge pages by where they are mapped, with the huge page that is there; some in a row, some apart.
huge_pages = st.dictionaries(st.integers(0, 12), st.integers(1, 24), min_size=1, max_size=12).filter(
    lambda pages: len({*pages.values()}) == len(pages)
)


class Process:
    """A page table of 13 huge pages from BASE on."""

    def __init__(self, root: Path, pages: dict[int, int]) -> None:
        (root / "7").mkdir(parents=True, exist_ok=True)
        self.path = root / "7/pagemap"
        self.entries = array("Q", bytes(8 * 13 * FRAMES_PER_HUGE))
        for at, page in pages.items():
            begin = at * FRAMES_PER_HUGE
            first = PRESENT | page * FRAMES_PER_HUGE
            self.entries[begin : begin + FRAMES_PER_HUGE] = array("Q", range(first, first + FRAMES_PER_HUGE))
        self.write()
        self.pagemap = Pagemap(str(root), 7)

    def write(self) -> None:
        with self.path.open("wb") as file:
            file.seek(BASE // FRAME * 8)
            file.write(self.entries.tobytes())


@given(huge_pages)
def test_pieces_are_few_and_have_every_frame_once(pages: dict[int, int]) -> None:
    pieces = pieces_of([(BASE + at * HUGE, pages[at] * FRAMES_PER_HUGE) for at in sorted(pages)], HUGE)
    frames = {page * FRAMES_PER_HUGE + number for page in pages.values() for number in range(FRAMES_PER_HUGE)}
    assert join(pieces.runs()) == from_frames(frames)
    listed = [*pieces]
    for before, after in pairwise(listed):
        assert before.address + before.frames * FRAME <= after.address
        joined = (before.address + before.frames * FRAME, before.first + before.frames)
        assert joined != (after.address, after.first), "these are one"
    assert [*Pieces(listed)] == listed


@given(huge_pages, st.data())
def test_whatever_has_moved_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, pages: dict[int, int], data: st.DataObject
) -> None:
    process = Process(tmp_path_factory.mktemp("proc"), pages)
    for unit in (HUGE, FRAME):
        first_only = min(pages)
        chosen = sorted(pages) if unit == HUGE else [first_only]
        pieces = pieces_of(
            [
                (BASE + at * HUGE + offset * FRAME, pages[at] * FRAMES_PER_HUGE + offset)
                for at in chosen
                for offset in range(0, FRAMES_PER_HUGE, unit // FRAME)
            ],
            unit,
        )
        assert pieces.are_in_place(process.pagemap, unit)
        spoilt = data.draw(st.sampled_from(chosen))
        # Of a huge page its ends are looked at, of single pages each.
        offset = data.draw(st.sampled_from([0, FRAMES_PER_HUGE - 1]) if unit == HUGE else st.integers(0, FRAMES_PER_HUGE - 1))
        place = spoilt * FRAMES_PER_HUGE + offset
        good = process.entries[place]
        for bad in (0, good & ~PRESENT, good + FRAMES_PER_HUGE):
            process.entries[place] = bad
            process.write()
            assert not pieces.are_in_place(process.pagemap, unit)
        process.entries[place] = good
        process.write()
    process.pagemap.close()


def test_who_has_no_memory_any_more_is_not_one_whose_memory_has_moved(tmp_path: Path) -> None:
    process = Process(tmp_path, {0: 3})
    process.path.write_bytes(b"")
    with pytest.raises(MemoryGone, match="7/pagemap: nothing at page"):
        pieces_of([(BASE, 3 * FRAMES_PER_HUGE)], HUGE).are_in_place(process.pagemap, HUGE)
    process.pagemap.close()
