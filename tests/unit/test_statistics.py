"""What the guest's kernel says of its memory, read from a tree that looks like /proc; and how much there is of it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from balloon_agent.balloon.wire import StatisticTag as Tag
from balloon_agent.guest.statistics import GuestStatistics
from balloon_agent.linux.installed_memory import end_of_ram, machine_bytes, physical_bytes

PAGE = os.sysconf("SC_PAGE_SIZE")
MEMINFO = """MemTotal:         985440 kB
MemFree:          612340 kB
MemAvailable:     770128 kB
Buffers:            1024 kB
Cached:           204800 kB
SwapCached:            0 kB
Active:            90000 kB
Inactive:         140000 kB
Shmem:              2000 kB
Slab:              40000 kB
"""
VMSTAT = """nr_free_pages 153085
nr_file_pages 51456
pswpin 3
pswpout 4
allocstall_dma 1
allocstall_dma32 2
allocstall_normal 0
allocstall_movable 5
pgfault 900
pgmajfault 40
pgsteal_kswapd 11
pgsteal_direct 12
pgscan_kswapd 21
pgscan_direct 22
pgscan_direct_throttle 99
oom_kill 1
htlb_buddy_alloc_success 6
htlb_buddy_alloc_fail 7
"""


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "vmstat").write_text(VMSTAT)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    return tmp_path


def test_every_tag_is_counted_as_the_host_expects_it(proc: Path) -> None:
    statistics = GuestStatistics(proc).read()
    assert list(statistics) == list(Tag)
    assert statistics == {
        Tag.SWAP_IN: 3 * PAGE,
        Tag.SWAP_OUT: 4 * PAGE,
        Tag.MAJOR_FAULTS: 40,
        Tag.MINOR_FAULTS: 860,
        Tag.FREE_MEMORY: 612340 << 10,
        Tag.TOTAL_MEMORY: 985440 << 10,
        Tag.AVAILABLE_MEMORY: 770128 << 10,
        Tag.CACHES: 51456 * PAGE,
        Tag.HUGETLB_ALLOCATIONS: 6,
        Tag.HUGETLB_FAILURES: 7,
        Tag.OOM_KILLS: 1,
        Tag.ALLOCATION_STALLS: 8,
        Tag.ASYNC_SCANNED: 21 * PAGE,
        Tag.DIRECT_SCANNED: 22 * PAGE,
        Tag.ASYNC_RECLAIMED: 11 * PAGE,
        Tag.DIRECT_RECLAIMED: 12 * PAGE,
    }


def test_what_the_kernel_does_not_count_is_left_out_and_the_set_never_changes(proc: Path) -> None:
    # A kernel without huge pages and without swap.
    kept = [line for line in VMSTAT.splitlines() if not line.startswith(("htlb", "pswp"))]
    (proc / "vmstat").write_text("\n".join(kept) + "\n")
    statistics = GuestStatistics(proc)
    absent = {Tag.HUGETLB_ALLOCATIONS, Tag.HUGETLB_FAILURES, Tag.SWAP_IN, Tag.SWAP_OUT}
    first = statistics.read()
    assert set(first) == set(Tag) - absent
    (proc / "vmstat").write_text(VMSTAT)
    assert list(statistics.read()) == list(first)
    (proc / "vmstat").unlink()
    assert list(statistics.read()) == list(first)
    assert set(GuestStatistics(proc).read()) == {Tag.FREE_MEMORY, Tag.TOTAL_MEMORY, Tag.AVAILABLE_MEMORY}


def test_the_running_kernel_has_most_of_them() -> None:
    statistics = GuestStatistics().read()
    assert len(statistics) >= 12
    assert statistics[Tag.TOTAL_MEMORY] == psutil.virtual_memory().total


def test_memory_blocks_say_how_much_memory_there_is(tmp_path: Path) -> None:
    (tmp_path / "block_size_bytes").write_text("8000000\n")
    for name in ("memory0", "memory1", "memory7", "power"):
        (tmp_path / name).mkdir()
    assert physical_bytes(str(tmp_path)) == 3 << 27


def test_without_memory_blocks_the_ranges_of_ram_are_added_up(tmp_path: Path) -> None:
    (tmp_path / "iomem").write_text(
        "00000000-00000fff : Reserved\n00001000-0009fbff : System RAM\n00100000-3ffdffff : System RAM\n"
        "  01000000-01ffffff : Kernel code\n"
    )
    assert physical_bytes(str(tmp_path / "none"), tmp_path) == 0x9EC00 + 0x3FEE0000


@pytest.mark.parametrize(
    ("iomem", "mib"),
    [
        # QEMU's older chipset: tables at the end of RAM, and 600 MiB are no number of whole blocks.
        (
            "00001000-0009fbff : System RAM\n0009fc00-0009ffff : Reserved\n00100000-257dffff : System RAM\n"
            "257e0000-257fffff : Reserved\n",
            600,
        ),
        # The newer one: a window of the chipset's follows, which is no RAM; the rest of RAM lies above 4 GiB.
        (
            "00100000-7ffdffff : System RAM\n7ffe0000-7fffffff : Reserved\nb0000000-bfffffff : PCI ECAM\n"
            "  b0000000-bfffffff : Reserved\n100000000-17fffffff : System RAM\n",
            4096,
        ),
        ("00100000-afffffff : System RAM\nb0000000-bfffffff : Reserved\n", 2816),
        ("00000000-00000000 : System RAM\n", 0),
    ],
)
def test_ram_is_counted_as_the_hypervisor_does(tmp_path: Path, iomem: str, mib: int) -> None:
    (tmp_path / "iomem").write_text(iomem)
    assert machine_bytes(tmp_path) >> 20 == mib


def test_ram_ends_behind_its_last_byte_as_far_as_is_shown(tmp_path: Path) -> None:
    (tmp_path / "iomem").write_text(
        "00100000-7ffdffff : System RAM\n100000000-17fffffff : System RAM\nfd00000000-ffffffffff : Reserved\n"
    )
    assert end_of_ram(tmp_path) == 6 << 30
    (tmp_path / "iomem").write_text("00000000-00000000 : System RAM\n")
    assert end_of_ram(tmp_path) == 0
