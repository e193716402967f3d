"""What is read from sysfs and procfs, over trees of files that look like them."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from array import array
from pathlib import Path

import psutil
import pytest

from balloon_agent.access import binding
from balloon_agent.access.binding import require_driver, take
from balloon_agent.access.pci import (
    Command,
    PciFunction,
    find_balloon,
    functions,
)
from balloon_agent.errors import (
    DeviceBusy,
    DeviceNotFound,
    DriverUnavailable,
    NotPermitted,
)
from balloon_agent.frames import FRAMES_PER_HUGE, Run
from balloon_agent.guest.headroom import spare_pages
from balloon_agent.linux import memory_blocks
from balloon_agent.linux.pagemap import Pagemap
from contrib.vm.experiment import lost_thp_kib
from contrib.vm.smaps import GuestRam, mapping_at

PRESENT = 1 << 63


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """A PCI bus with a disk, a bridge and a balloon that belongs to virtio-pci."""
    root = tmp_path / "sys"
    for name in ("virtio-pci", "uio_pci_generic", "vfio-pci"):
        (root / "bus/pci/drivers" / name).mkdir(parents=True)
    (root / "bus/pci/devices").mkdir()
    (root / "bus/pci/drivers_probe").touch()
    for address, vendor, device in (("0000:00:01.0", 0x8086, 0x1237), ("0000:00:04.0", 0x1AF4, 0x1042)):
        add_function(root, address, vendor, device)
    add_function(root, "0000:00:05.0", 0x1AF4, 0x1045, "virtio-pci")
    return root


def add_function(root: Path, address: str, vendor: int, device: int, driver: str | None = None) -> Path:
    folder = root / "devices/pci0000:00" / address
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor:#06x}\n")
    (folder / "device").write_text(f"{device:#06x}\n")
    (folder / "driver_override").write_text("(null)\n")
    (folder / "config").write_bytes(struct.pack("<HHH", vendor, device, 0x0407) + bytes(58))
    if driver is not None:
        (folder / "driver").symlink_to(root / "bus/pci/drivers" / driver)
        (root / "bus/pci/drivers" / driver / "unbind").touch()
    (root / "bus/pci/devices" / address).symlink_to(folder)
    return folder


def test_the_only_balloon_is_found(sysfs: Path) -> None:
    found = find_balloon(None, functions(sysfs))
    assert found.address == "0000:00:05.0"
    assert found.driver == "virtio-pci"
    assert find_balloon("00:05.0", functions(sysfs)).address == "0000:00:05.0"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("0000:00:04.0", "0000:00:04.0 is not a virtio balloon"),
        ("0000:00:1f.0", "no PCI function 0000:00:1f.0"),
        ("balloon", "'balloon' is no PCI address"),
        ("00:05.9", "is no PCI address"),
    ],
)
def test_a_wrong_address_is_refused_with_those_that_are_right(sysfs: Path, address: str, words: str) -> None:
    with pytest.raises(DeviceNotFound) as caught:
        find_balloon(address, functions(sysfs))
    assert words in str(caught.value)
    assert "0000:00:05.0 (virtio-pci)" in str(caught.value)


def test_of_two_balloons_one_must_be_chosen(sysfs: Path) -> None:
    add_function(sysfs, "0000:00:06.0", 0x1AF4, 0x1002)
    with pytest.raises(DeviceNotFound, match=r"2 virtio balloons: 0000:00:05\.0 .*0000:00:06\.0 \(no driver\).*--device"):
        find_balloon(None, functions(sysfs))


def test_without_a_balloon_the_remedy_is_named(sysfs: Path) -> None:
    (sysfs / "bus/pci/devices/0000:00:05.0").unlink()
    with pytest.raises(DeviceNotFound, match="-device virtio-balloon-pci,cont-pages=on"):
        find_balloon(None, functions(sysfs))


def test_the_command_register_is_changed_by_bits(sysfs: Path) -> None:
    function = find_balloon(None, functions(sysfs))
    function.set_command(on=Command.BUS_MASTER | Command.MEMORY, off=Command.INTX_DISABLE)
    assert struct.unpack_from("<H", function.config(), 4) == (0x0007,)


def test_a_device_that_lost_its_driver_half_way_goes_back_to_the_one_on_record(
    sysfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent was killed between unbinding and binding. Here no kernel binds anything: what it would be told counts."""
    told: list[str | None] = []
    monkeypatch.setattr(binding, "_hand_over", lambda function, driver, bus: told.append(driver))
    function = PciFunction(add_function(sysfs, "0000:00:06.0", 0x1AF4, 0x1045))
    assert function.driver is None
    take(function, "uio_pci_generic", "virtio-pci", bus=sysfs / "bus/pci").restore()
    assert told == ["uio_pci_generic", "virtio-pci"]


def test_a_device_in_other_hands_is_left_alone(sysfs: Path) -> None:
    folder = add_function(sysfs, "0000:00:07.0", 0x1AF4, 0x1045, "vfio-pci")
    function = find_balloon("0000:00:07.0", functions(sysfs))
    with pytest.raises(DeviceBusy, match="bound to vfio-pci"):
        take(function, bus=sysfs / "bus/pci")
    assert (folder / "driver_override").read_text() == "(null)\n"


def test_a_driver_that_does_not_take_the_device_leaves_no_override_behind(sysfs: Path) -> None:
    # Nobody acts on what is written to this tree: the driver "does not take it", and the old one is there still.
    function = find_balloon(None, functions(sysfs))
    with pytest.raises(DriverUnavailable, match=r"uio_pci_generic did not take 0000:00:05\.0"):
        take(function, bus=sysfs / "bus/pci")
    assert (function.path / "driver_override").read_text() == "\n"
    assert function.driver == "virtio-pci"


def test_a_kernel_without_the_driver_is_named(sysfs: Path) -> None:
    with pytest.raises(DriverUnavailable, match="no driver balloon_test_no_such_driver"):
        require_driver("balloon_test_no_such_driver", sysfs / "bus/pci")


# -- pagemap ---------------------------------------------------------------------------------------------------------


def proc_tree(tmp_path: Path, entries: dict[int, int]) -> str:
    """A /proc whose pagemap has the given entries by page number."""
    (tmp_path / "self").mkdir(parents=True)
    with (tmp_path / "self/pagemap").open("wb") as file:
        for page, entry in entries.items():
            file.seek(page * 8)
            file.write(struct.pack("<Q", entry))
    return str(tmp_path)


def test_frames_are_read_where_they_are_present(tmp_path: Path) -> None:
    pagemap = Pagemap(proc_tree(tmp_path, {16: PRESENT | 0x1234, 17: PRESENT | 1 << 55 | 0x99, 18: 5, 19: PRESENT}))
    assert pagemap.frames(16 * 4096, 2) == [0x1234, 0x99]
    with pytest.raises(LookupError, match="not present"):
        pagemap.frames(17 * 4096, 2)
    with pytest.raises(NotPermitted, match="CAP_SYS_ADMIN"):
        pagemap.frames(19 * 4096, 1)
    with pytest.raises(LookupError, match="8 bytes at page 0x13, not 16"):
        pagemap.frames(19 * 4096, 2)
    with pytest.raises(ValueError, match="not the address of a page"):
        pagemap.frames(100, 1)
    pagemap.close()


@pytest.mark.parametrize(
    ("spoil", "huge"),
    [(None, True), ((0, PRESENT | 1025), False), ((511, PRESENT | 1536), False), ((511, 1024 + 511), False)],
)
def test_a_huge_page_begins_and_ends_where_it_must(tmp_path: Path, spoil: tuple[int, int] | None, huge: bool) -> None:
    entries = array("Q", (PRESENT | 1024 + number for number in range(FRAMES_PER_HUGE)))
    if spoil is not None:
        entries[spoil[0]] = spoil[1]
    pagemap = Pagemap(proc_tree(tmp_path, dict(enumerate(entries, 512))))
    assert pagemap.huge_frames(512 * 4096, 1) == [1024 if huge else None]
    pagemap.close()


def test_a_huge_page_that_is_in_a_row_but_not_aligned_is_none(tmp_path: Path) -> None:
    entries = {512 + number: PRESENT | 1000 + number for number in range(FRAMES_PER_HUGE)}
    pagemap = Pagemap(proc_tree(tmp_path, entries))
    assert pagemap.huge_frames(512 * 4096, 1) == [None]
    pagemap.close()


# -- memory blocks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def memory_root(tmp_path: Path) -> str:
    root = tmp_path / "memory"
    root.mkdir()
    (root / "block_size_bytes").write_text("8000000\n")
    (root / "auto_online_blocks").write_text("offline\n")
    blocks_here = ((0, "online", "none"), (2, "online", "DMA32"), (10, "online", "Movable"), (9, "offline", "Normal Movable"))
    for number, state, zones in blocks_here:
        (root / f"memory{number}").mkdir()
        (root / f"memory{number}/state").write_text(f"{state}\n")
        (root / f"memory{number}/valid_zones").write_text(f"{zones}\n")
    return str(root)


def test_blocks_that_may_go_offline_are_listed_from_the_top(memory_root: str) -> None:
    found = list(memory_blocks.known_blocks(memory_root))
    assert [(block.number, block.zone, block.online_state) for block in found] == [
        (10, "Movable", "online_movable"),
        (2, "DMA32", "online_kernel"),
    ]
    assert found[1].run == Run(2 * 32768, 32768)


def test_a_kernel_without_memory_blocks_has_none(tmp_path: Path) -> None:
    assert memory_blocks.block_size(str(tmp_path)) is None
    assert list(memory_blocks.known_blocks(str(tmp_path))) == []


def test_a_block_is_set_by_one_write(memory_root: str) -> None:
    memory_blocks.set_state(memory_root, 2, "offline")
    assert memory_blocks.state(memory_root, 2) == "offline"
    with pytest.raises(FileNotFoundError):
        memory_blocks.set_state(memory_root, 77, "offline")


# -- numbers ------------------------------------------------------------------------------------------------------------

ZONEINFO = """\
Node 0, zone      DMA
  per-node stats
      nr_inactive_file 800
      nr_active_file 200
      nr_slab_reclaimable 500
  pages free     3800
        boost    0
        min      173
        low      216
        high     259
        managed  3840
        protection: (0, 943, 943, 943, 943)
  pagesets
    cpu: 0
              count: 0
              high:  216
Node 0, zone    DMA32
  pages free     27096
        boost    100
        min      8743
        low      10928
        protection: (0, 0, 0, 0, 0)
  pagesets
    cpu: 0
              count: 51
    cpu: 1
              count: 9
Node 0, zone   Normal
  pages free     10
        boost    0
        min      50
        low      62
        protection: (0, 0, 0, 0, 0)
"""


def test_spare_memory_ends_at_the_kernels_own_reserves() -> None:
    # The min watermark is shown with its boost: min_wmark_pages() in include/linux/mmzone.h.
    zones = (3800 - 173 - 943) + (27096 + 60 - 8743) + 0
    assert spare_pages(ZONEINFO) == (zones, 1000 // 2 + 500 // 2)


def test_spare_memory_of_this_machine_is_a_number_that_makes_sense() -> None:
    spare = sum(spare_pages(Path("/proc/zoneinfo").read_text())) * os.sysconf("SC_PAGE_SIZE")
    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    assert 0 < spare < total


SMAPS = """\
7f0000000000-7f0040000000 rw-p 00000000 00:00 0
Size:            1048576 kB
Rss:              561152 kB
AnonHugePages:    137216 kB
VmFlags: rd wr mr mw me ac sd hg
7f0050000000-7f0060000000 rw-p 00000000 00:00 0
Size:             262144 kB
Rss:              262144 kB
AnonHugePages:    262144 kB
"""


def test_only_the_guests_mapping_counts() -> None:
    assert mapping_at(SMAPS, 0x7F0000100000) == GuestRam(1048576, 561152, 137216)
    assert mapping_at(SMAPS, 0x7F0050000000) == GuestRam(262144, 262144, 262144)
    with pytest.raises(LookupError):
        mapping_at(SMAPS, 0x7F0040000000)


def test_lost_is_what_lies_in_small_pages_and_did_not_before() -> None:
    # The proposal's kernel driver, as measured here: 424 MiB given back, 414 MiB more in small pages.
    assert lost_thp_kib(GuestRam(1048576, 976896, 976896), GuestRam(1048576, 561152, 137216)) == 423936
    # Memory that left whole is not lost.
    assert lost_thp_kib(GuestRam(1048576, 991232, 991232), GuestRam(1048576, 595968, 595968)) == 0


def test_what_the_harness_starts_does_not_outlive_it() -> None:
    """SIGKILL of a process that runs a machine: its guard ends the machine's process group."""
    program = (
        "import subprocess, sys; from contrib.vm.machine import guard;"
        "p = subprocess.Popen(['sleep', '600'], start_new_session=True); guard(f'kill -s KILL -- -{p.pid}');"
        "print(p.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as harness:
        assert harness.stdout
        machine = psutil.Process(int(harness.stdout.readline()))
        harness.kill()
    # Nobody waits for it here: a zombie is as dead as it gets.
    deadline = time.monotonic() + 60
    while machine.is_running() and machine.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the machine outlived its harness"
