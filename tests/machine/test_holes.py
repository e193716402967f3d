"""Huge pages with holes, found in the page tables of the running kernel."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from balloon_agent.frames import FRAME, FRAMES_PER_HUGE, HUGE
from balloon_agent.holder import holes
from balloon_agent.holder.holes import (
    LEAST_HOLES,
    Holed,
    Splitter,
    Walk,
)
from balloon_agent.holder.server import Holder
from balloon_agent.linux import libc
from balloon_agent.linux.pagemap import Pagemap

PAGES = 5
# include/uapi/asm-generic/mman-common.h, include/uapi/linux/mman.h
MADV_DOFORK, MREMAP_MAYMOVE, MREMAP_FIXED = 11, 1, 2
_mremap = ctypes.CDLL(None, use_errno=True).mremap
_mremap.restype = ctypes.c_void_p
_mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]


class Memory:
    """Huge pages of this process's."""

    def __init__(self) -> None:
        self.reserved = (PAGES + 2) * HUGE
        self.base = libc.map_anonymous(self.reserved)
        self.begin = -(-self.base // HUGE) * HUGE
        libc.advise(self.begin, PAGES * HUGE, libc.MADV_HUGEPAGE)
        libc.advise(self.begin, PAGES * HUGE, libc.MADV_POPULATE_WRITE)
        pagemap = Pagemap()
        frames = pagemap.huge_frames(self.begin, PAGES)
        self.frames = [frame for frame in frames if frame is not None]
        whole = len(self.frames) == PAGES and all(pagemap.are_huge(self.frames))
        pagemap.close()
        if not whole:
            pytest.skip("NOT TESTED HERE: this machine has no huge pages to give for now")

    def punch(self, page: int, offset: int, holes: int, apart: int = 2) -> None:
        """Give up so many small pages of one huge page, the first at ``offset``."""
        for number in range(holes):
            libc.advise(self.begin + page * HUGE + (offset + number * apart) * FRAME, FRAME, libc.MADV_DONTNEED)

    def found(self) -> list[Holed]:
        """In this process alone."""
        others = [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit() and each.name != str(os.getpid())]
        return [holed for part in Walk(others) for holed in part if holed.frame in self.frames]


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    libc.unmap(memory.base, memory.reserved)


def test_huge_pages_with_holes_are_found_and_no_others(memory: Memory) -> None:
    memory.punch(0, 0, FRAMES_PER_HUGE // 2)
    memory.punch(2, 1, FRAMES_PER_HUGE - 1, apart=1)
    memory.punch(3, 7, LEAST_HOLES - 1, apart=1)
    first, second = memory.found()
    assert first == Holed(os.getpid(), memory.begin + FRAME, memory.frames[0], FRAMES_PER_HUGE // 2)
    assert second == Holed(os.getpid(), memory.begin + 2 * HUGE, memory.frames[2], FRAMES_PER_HUGE - 1)


def test_what_another_process_maps_is_no_hole(memory: Memory) -> None:
    libc.advise(memory.begin, PAGES * HUGE, MADV_DOFORK)
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        memory.punch(0, 0, FRAMES_PER_HUGE // 2)
        assert memory.found() == []
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert [holed.holes for holed in memory.found()] == [FRAMES_PER_HUGE // 2]


def test_what_is_not_aligned_to_huge_pages_is_found_too(memory: Memory) -> None:
    """The kernel splits a huge page's mapping when it is moved to an address that is not aligned to it."""
    to = libc.map_anonymous(PAGES * HUGE)
    try:
        moved = -(-to // HUGE) * HUGE + 100 * FRAME
        assert _mremap(memory.begin + HUGE, HUGE, HUGE, MREMAP_MAYMOVE | MREMAP_FIXED, moved) == moved
        for number in range(0, FRAMES_PER_HUGE, 2):
            libc.advise(moved + number * FRAME, FRAME, libc.MADV_DONTNEED)
        (found,) = {(holed.frame, holed.holes) for holed in memory.found()}
        assert found == (memory.frames[1], FRAMES_PER_HUGE // 2)
    finally:
        libc.unmap(to, PAGES * HUGE)


def test_mappings_are_read_right_wherever_a_piece_of_them_ends(memory: Memory) -> None:
    memory.punch(0, 0, FRAMES_PER_HUGE // 2)
    data = Path("/proc/self/smaps").read_bytes()
    whole = [*holes._areas([data])]
    assert len(whole) == data.count(b"\nVmFlags:")
    assert [(begin, end) for begin, end, _ in whole] == [
        tuple(int(address, 16) for address in line.split()[0].split("-"))
        for line in data.decode().splitlines()
        if not line.split()[0].endswith(":")
    ]
    (here,) = [pages for begin, end, pages in whole if begin <= memory.begin < end]
    assert here
    for size in (1, 7, 100, 4096):
        assert [*holes._areas(data[at : at + size] for at in range(0, len(data), size))] == whole


def split(holder: Holder, *, begin: bool = False, frames: int = 1 << 30, seconds: float = 60.0) -> dict[str, Any]:
    others = [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit() and each.name != str(os.getpid())]
    return holder.answer({"op": "split", "begin": begin, "skip": others, "frames": frames, "seconds": seconds})


@pytest.mark.parametrize("begin", [False, True])
def test_whoever_has_nothing_to_go_on_with_begins(memory: Memory, monkeypatch: pytest.MonkeyPatch, begin: bool) -> None:
    """The agent does not know that a worker is a new one."""
    wanted: list[Holed] = []

    class Splitter:
        def split(self, holed: Holed) -> None:
            wanted.append(holed)

        def close(self) -> None:
            pass

    monkeypatch.setattr(holes, "Splitter", Splitter)
    memory.punch(0, 0, FRAMES_PER_HUGE // 2)
    memory.punch(3, 0, FRAMES_PER_HUGE // 2)
    holder = Holder()
    for _ in range(2):
        wanted.clear()
        # Nothing was split, so that nothing has come free.
        assert split(holder, begin=begin) == {"ok": True, "freed": 0, "done": True, "denied": 0, "problem": None}
        assert {memory.frames[0], memory.frames[3]} <= {holed.frame for holed in wanted}
    wanted.clear()
    while not (answer := split(holder, seconds=0.0))["done"]:
        assert answer["ok"]
    assert {memory.frames[0], memory.frames[3]} <= {holed.frame for holed in wanted}


def test_where_nothing_can_be_split_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = tmp_path / "split_huge_pages"
    monkeypatch.setattr(Splitter.__init__, "__defaults__", (str(missing),))
    expected = f"{missing}: No such file or directory"
    assert split(Holder()) == {"ok": True, "freed": 0, "done": True, "denied": 0, "problem": expected}


def test_who_has_ended_since_is_passed_over(tmp_path: Path) -> None:
    """The kernel answers EINVAL, or ESRCH."""
    (tmp_path / "full").symlink_to("/dev/full")
    with closing(Splitter(str(tmp_path / "full"))) as splitter:
        splitter.split(Holed(1, FRAME, 512, 256))


def test_processes_of_others_that_may_not_be_looked_through_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> Pagemap:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(holes, "Pagemap", denied)
    others = [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit() and each.name != str(os.getpid())]
    walk = Walk(others)
    assert [holed for part in walk for holed in part] == []
    assert walk.denied >= 1
