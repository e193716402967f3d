"""What is changed outside the process, on fake trees: the pool of huge pages, the watermark, and how all of it is undone."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from balloon_agent.access.pci import functions
from balloon_agent.agent.run import _give_back_what_is_held
from balloon_agent.errors import (
    BalloonError,
    DeviceBusy,
    DeviceNotFound,
    GaveWay,
    Shortage,
)
from balloon_agent.frames import Run
from balloon_agent.guest.headroom import PLENTY, Spare, spare_pages
from balloon_agent.guest.min_free import WISH_KIB, Watermark, recommended_kib
from balloon_agent.guest.shared_sysctls import Changed
from balloon_agent.linux import huge_page_pools, page_flags
from balloon_agent.linux.files import write_file
from balloon_agent.memory import left_behind
from balloon_agent.memory.ledger.ledger import Extent, Ledger
from balloon_agent.memory.sources import block_costs
from balloon_agent.memory.sources.block_costs import UNLIKELY, Survey
from balloon_agent.memory.sources.hugetlb import HugetlbSource, Pool
from balloon_agent.options import Options
from balloon_agent.takeover import by_hand
from balloon_agent.takeover.lock import lock_device, lock_run_dir
from balloon_agent.takeover.restore import put_back_all, restore
from balloon_agent.takeover.state import StateFile
from tests.unit.test_access import ADDRESS
from tests.unit.test_linux import sysfs as sysfs

HUGE = 2 << 20
MIB = 1 << 20

# -- the pool of huge pages --------------------------------------------------------------------------------------------


class RacingKernel:
    """A pool as mm/hugetlb.c has it, in which ``late`` pages go free at the worst moment of the next time that it shrinks."""

    def __init__(self, used: int, late: int) -> None:
        self.total = self.used = used
        self.surplus = 0
        self.late = late

    def read(self, path: str) -> str:
        free = self.total - self.used
        return str({"nr": self.total, "free": free, "surplus": self.surplus}[Path(path).name.split("_")[0]])

    def write(self, path: str, text: str) -> None:
        assert path == "/pools/hugepages-2048kB/nr_hugepages"
        count = int(text)
        while self.surplus and count > self.total - self.surplus:
            self.surplus -= 1
        while count < self.total - self.surplus and self.used < self.total:
            self.total -= 1
        late, self.late = min(self.late, self.used), 0
        self.used -= late
        while count < self.total - self.surplus:
            self.surplus += 1


@pytest.mark.parametrize("late", [0, 1, 5])
def test_no_page_that_goes_free_while_the_pool_shrinks_is_stuck_in_it(monkeypatch: pytest.MonkeyPatch, late: int) -> None:
    kernel = RacingKernel(used=5, late=late)
    monkeypatch.setattr(huge_page_pools, "read_file", kernel.read)
    monkeypatch.setattr(huge_page_pools, "write_file", kernel.write)
    huge_page_pools.set_pages("/pools", HUGE, 0)
    # What is in use yet goes by itself.
    assert (kernel.total, kernel.used, kernel.surplus) == (5 - late, 5 - late, 5 - late)
    assert huge_page_pools.pages("/pools", HUGE) == 0


class World:
    """A kernel whose pool grows up to ``most`` pages, and one holder that has what is free in it."""

    name = "h"
    holds_memory = True
    is_older = False
    pagemap = None

    def __init__(self, root: Path, pages: int = 3, most: int = 100) -> None:
        self.root = root
        self.most = most
        self.file = root / "hugepages-2048kB/nr_hugepages"
        self.file.parent.mkdir(parents=True)
        self.file.write_text(f"{pages}\n")
        for name in ("surplus_hugepages", "free_hugepages"):
            self.file.with_name(name).write_text("0\n")
        self.record: list[tuple[int, int]] = []
        self.at_change: list[tuple[int, int]] = []
        self.problem: str | None = None
        self.gave_way = False
        self.pool = self.make_pool()
        self.source = HugetlbSource("hugetlb", cast("Any", self), Ledger(), 1 << 30, self.pool)

    def make_pool(self, before: int | None = None, added: int = 0) -> Pool:
        return Pool(HUGE, cast("Any", self), lambda *record: self.record.append(record), before, added, str(self.root))

    @property
    def pages(self) -> int:
        return int(self.file.read_text())

    def ask(self, message: dict[str, Any], _deadline: float, *, takes: bool) -> dict[str, Any] | str:
        assert message["op"] == "pool"
        assert takes == (message["pages"] > self.pages), "only what takes memory gives way to others"
        assert message["bytes"] == HUGE
        self.at_change.append(self.record[-1])
        self.file.write_text(f"{min(message['pages'], self.most)}\n")
        return {"seconds": {"populate": 1.0}}

    def __iter__(self) -> Any:
        return iter([self])

    def __getitem__(self, _: str) -> World:
        return self

    def set_fuse(self, on: bool) -> None:
        pass

    def duplicate(self, _: int) -> int:
        return os.open("/dev/null", os.O_RDONLY)

    def request(self, message: dict[str, Any], *, takes: bool = False) -> dict[str, Any]:
        assert takes == (message["op"] == "take")
        if message["op"] == "give_back":
            return {"ok": True, "failed": {}}
        if self.problem is not None:
            return {"ok": False, "error": self.problem}
        pieces = [[(512 + number) << 21, 512 * number, 512] for number in range(message["count"])]
        return {"ok": True, "name": message["name"], "source": "hugetlb", "pieces": pieces, "pin": 5, "seconds": {}}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_pool_grows_by_what_is_taken_and_shrinks_by_it(world: World) -> None:
    (extent,) = world.source.take(8 * HUGE)
    assert (extent.size, world.pages) == (8 * HUGE, 11)
    assert world.at_change == [(3, 8)], "on record before it was changed, with what was there before"
    assert not world.source.give_back([extent])
    assert world.pages == 3
    assert world.record[-1] == (3, 0)


def test_a_pool_that_grows_less_than_it_should_gives_what_came(world: World) -> None:
    world.most = 5
    (extent,) = world.source.take(8 * HUGE)
    assert extent.size == 2 * HUGE
    assert world.record[-1] == (3, 2)
    with pytest.raises(Shortage, match="does not grow beyond 5"):
        world.source.take(HUGE)
    world.source.give_back([extent])
    assert world.pages == 3


def test_a_pool_that_gives_way_is_grown_later(world: World) -> None:
    """Others have their turn first, and there is nothing wrong with this source."""
    world.most, world.gave_way = 3, True
    with pytest.raises(GaveWay, match="somebody else needs the memory"):
        world.source.take(8 * HUGE)
    assert (world.pages, world.record[-1]) == (3, (3, 0))
    world.most, world.problem = 5, "given up half-way"
    with pytest.raises(GaveWay):
        world.source.take(8 * HUGE)
    assert (world.pages, world.record[-1]) == (3, (3, 0)), "what had come went back"


def test_what_was_added_and_could_not_be_taken_is_given_back(world: World) -> None:
    (kept,) = world.source.take(HUGE)
    world.problem = "somebody else was faster"
    with pytest.raises(Shortage, match="faster"):
        world.source.take(4 * HUGE)
    assert world.pages == 4
    world.problem = None
    world.source.give_back([kept])
    assert world.pages == 3


@pytest.mark.parametrize(
    ("pages", "added", "held", "left"),
    [
        (11, 8, 8, 11),  # at rest
        (3, 8, 0, 3),  # died between the record and the change
        (11, 8, 0, 3),  # died before anything was taken
        (11, 8, 5, 8),  # a holder died with it
        (2, 8, 0, 2),  # somebody else has shrunk it
    ],
)
def test_what_an_earlier_agent_left_in_the_pool_is_reconciled_with_what_is_held(
    world: World, pages: int, added: int, held: int, left: int
) -> None:
    world.file.write_text(f"{pages}\n")
    pool = world.make_pool(3, added)
    world.record.append((3, added))
    pool.reconcile(held)
    assert (world.pages, pool.added) == (left, held)


def test_a_kernel_without_such_pages_says_so(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.file.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(Shortage, match="no huge pages of 2048 kB"):
        world.source.take(HUGE)


# -- the watermark -----------------------------------------------------------------------------------------------------

ZONE = "Node {}, zone {:>8}\n  pages free     {}\n        min      10\n        low      20\n        managed  {}\n"


def proc(root: Path, minimum: int, megabytes: int, free: int = 1000) -> Path:
    (root / "sys/vm").mkdir(parents=True, exist_ok=True)
    (root / "sys/vm/min_free_kbytes").write_text(f"{minimum}\n")
    text = ZONE.format(0, "DMA", 1000, 3840) + ZONE.format(0, "DMA32", free, megabytes * 256 - 3840)
    (root / "zoneinfo").write_text(text + ZONE.format(0, "Normal", 0, 0) + ZONE.format(0, "Movable", 0, 0))
    (root / "meminfo").write_text(f"MemTotal: 1 kB\nMemFree:        {free * 4} kB\n")
    return root


def minimum(root: Path) -> int:
    return int((root / "sys/vm/min_free_kbytes").read_text())


class Kernel:
    """Chooses vm.min_free_kbytes when it is asked to, unless the user wishes for more: mm/khugepaged.c, mm/page_alloc.c."""

    def __init__(self, root: Path, own: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.own = root, own
        self.record: list[Changed | None] = []
        self.wishes: list[int] = []
        self.enabled = root / "enabled"
        self.enabled.write_text("always [madvise] never")
        monkeypatch.setattr("balloon_agent.guest.min_free.write_file", self.write)

    def write(self, path: str, text: str) -> None:
        if path == str(self.enabled):
            assert text == "madvise"
            set_minimum(self.root, max(self.own, minimum(self.root)))
            return
        self.wishes.append(int(text))
        write_file(path, text)

    def watermark(self, left: Changed | None = None) -> Watermark:
        return Watermark(self.record.append, left, self.root, thp_enabled=str(self.enabled))


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    assert recommended_kib((proc(tmp_path, 45056, 960) / "zoneinfo").read_text()) == 45056
    return Kernel(tmp_path, 45056, monkeypatch)


def set_minimum(root: Path, value: int) -> None:
    (root / "sys/vm/min_free_kbytes").write_text(f"{value}\n")


def test_the_watermark_follows_the_balloon_down_and_is_the_kernels_again(kernel: Kernel) -> None:
    watermark = kernel.watermark()
    # 10 % of the guest: what the kernel keeps too much is not worth a wish.
    watermark.follow(100 * MIB)
    assert (minimum(kernel.root), kernel.record, kernel.wishes) == (45056, [], [])
    watermark.follow(424 * MIB)
    lowered = (960 - 424) * 1024 // 20
    assert minimum(kernel.root) == lowered
    assert kernel.record == [Changed(45056, (45056, lowered))]
    # The next agent has it from the record.
    watermark = kernel.watermark(kernel.record[-1])
    watermark.follow(0)
    assert (minimum(kernel.root), kernel.record[-1]) == (45056, None)
    # As the kernel chose it: a wish is left, for less than it would ever choose.
    assert kernel.wishes == [lowered, WISH_KIB]


def test_where_the_kernel_does_not_choose_it_is_what_it_was(kernel: Kernel) -> None:
    watermark = kernel.watermark()
    watermark.follow(424 * MIB)
    kernel.enabled.unlink()
    watermark.follow(0)
    assert (minimum(kernel.root), kernel.record[-1]) == (45056, None)


def test_for_a_balloon_of_blocks_the_kernel_does_it_all(kernel: Kernel) -> None:
    watermark = kernel.watermark()
    for offline, chosen in ((128 * MIB, 42268), (256 * MIB, 35736), (128 * MIB, 42264)):
        proc(kernel.root, chosen, 960 - (offline >> 20))
        watermark.follow(0, offline)
    # Less than without blocks: its other watermarks were moved when the last one came back. It is asked again.
    proc(kernel.root, 43424, 960)
    watermark.follow(0, 0)
    assert (minimum(kernel.root), kernel.record, kernel.wishes) == (45056, [], [])


def test_after_a_kept_balloon_of_blocks_the_kernel_chooses_as_before(kernel: Kernel) -> None:
    """An agent that goes on with it has not seen the value before: none is on record, since the kernel chose them all."""
    proc(kernel.root, 35736, 960 - 256)
    watermark = kernel.watermark()
    watermark.follow(0, 256 * MIB)
    proc(kernel.root, 44480, 960)
    watermark.follow(0, 0)
    assert (minimum(kernel.root), kernel.record, kernel.wishes) == (45056, [], [])
    # Once: what the kernel has afterwards is nobody's business here.
    set_minimum(kernel.root, 44480)
    watermark.follow(0, 0)
    assert minimum(kernel.root) == 44480


def test_a_watermark_that_somebody_has_chosen_is_left_alone(kernel: Kernel) -> None:
    set_minimum(kernel.root, 100000)
    watermark = kernel.watermark()
    watermark.follow(900 * MIB)
    watermark.follow(0)
    assert (minimum(kernel.root), kernel.record, kernel.wishes) == (100000, [], [])


def test_a_watermark_that_changes_meanwhile_is_right_as_it_is(kernel: Kernel) -> None:
    watermark = kernel.watermark()
    watermark.follow(424 * MIB)
    set_minimum(kernel.root, 90000)
    watermark.follow(0)
    assert minimum(kernel.root) == 90000
    assert kernel.record[-1] is None


def test_a_watermark_that_was_changed_after_an_agent_died_is_left_alone(kernel: Kernel) -> None:
    set_minimum(kernel.root, 90000)
    watermark = kernel.watermark(Changed(45056, (45056, 27443)))
    watermark.follow(0)
    assert (minimum(kernel.root), kernel.record) == (90000, [None])


def test_an_agent_that_died_before_the_kernel_chose_is_undone(kernel: Kernel) -> None:
    set_minimum(kernel.root, WISH_KIB)
    watermark = kernel.watermark(Changed(45056, (45056, 27443)))
    watermark.follow(0)
    assert (minimum(kernel.root), kernel.record) == (45056, [None])


def test_after_huge_pages_and_then_blocks_the_kernel_chooses_as_before(kernel: Kernel) -> None:
    watermark = kernel.watermark()
    watermark.follow(300 * MIB, 0)
    proc(kernel.root, minimum(kernel.root), 960 - 256)
    kernel.own = 35736
    watermark.follow(300 * MIB, 256 * MIB)
    watermark.follow(0, 256 * MIB)
    assert minimum(kernel.root) == 35736
    # The blocks come back while its other watermarks are moved.
    proc(kernel.root, 43424, 960)
    kernel.own = 45056
    watermark.follow(0, 0)
    assert minimum(kernel.root) == 45056


def test_of_two_agents_neither_leaves_a_watermark_behind(kernel: Kernel) -> None:
    first, second = kernel.watermark(), kernel.watermark()
    first.follow(424 * MIB)
    second.follow(600 * MIB)
    first.follow(0)
    second.follow(600 * MIB)
    second.follow(0)
    assert (minimum(kernel.root), kernel.record[-1], kernel.wishes[-1]) == (45056, None, WISH_KIB)


def test_caches_are_worth_the_same_however_early_the_warning_is(tmp_path: Path) -> None:
    text = "Node 0, zone DMA32\n  nr_inactive_file 8000\n  pages free     9000\n  min      1000\n  low      {}\n"
    assert spare_pages(text.format(1250)) == spare_pages(text.format(9000))


# -- which blocks first, and how much there is to spare ----------------------------------------------------------------


def test_free_blocks_cost_nothing_and_the_kernels_own_are_unlikely(tmp_path: Path) -> None:
    flags = array("Q", [page_flags.KPF_BUDDY] * 4096)
    flags[1024:2048] = array("Q", [page_flags.KPF_BUDDY, 1 << 5] * 512)
    flags[2048 + 1023] = page_flags.KPF_SLAB
    (tmp_path / "kpageflags").write_bytes(flags.tobytes())
    runs = [Run(1024 * number, 1024) for number in range(4)]
    free, half, kernels, last = Survey(str(tmp_path)).costs(runs)
    assert free == last == 0
    assert half == block_costs.PLACES * block_costs.PAGES // 2
    assert kernels >= UNLIKELY
    assert Survey(str(tmp_path / "none")).costs(runs) == [1, 1, 1, 1]


def test_spare_memory_is_looked_up_again_when_it_is_old_or_little(tmp_path: Path) -> None:
    now = [0.0]
    plenty = PLENTY // 4096 + 10000
    spare = Spare(PLENTY, 4096, proc(tmp_path, 1, 4096, plenty), lambda: now[0])
    first = spare()
    assert first == (plenty - 10 + 1000 - 10) * 4096
    # Less is free now: told from MemFree as long as that is plenty.
    proc(tmp_path, 1, 4096, plenty - 5000)
    (tmp_path / "zoneinfo").rename(tmp_path / "hidden")
    assert spare() == first - 5000 * 4096
    now[0] = 60.0
    with pytest.raises(FileNotFoundError):
        spare()
    proc(tmp_path, 1, 4096, 200)
    assert spare() == (200 - 10 + 1000 - 10) * 4096


@pytest.mark.parametrize("nodes", [(0,), (1,), (0, 1), (0, 0)])
def test_a_kernel_that_has_given_up_reclaiming_says_so(tmp_path: Path, nodes: tuple[int, ...]) -> None:
    zoneinfo = proc(tmp_path, 1, 4096, 2000) / "zoneinfo"
    spare = Spare(PLENTY, 4096, tmp_path, lambda: 0.0)
    assert not spare.hopeless
    before = zoneinfo.read_text()
    zoneinfo.write_text(before + "".join(f"  node_unreclaimable:  {node}\n  start_pfn:           4096\n" for node in nodes))
    spare()
    assert spare.hopeless == (1 in nodes)
    zoneinfo.write_text(before)
    spare()
    assert not spare.hopeless


def test_caches_that_become_free_memory_are_not_counted_twice(tmp_path: Path) -> None:
    plenty = PLENTY // 4096 + 20000
    root = proc(tmp_path, 1, 4096, plenty)
    (root / "zoneinfo").write_text((root / "zoneinfo").read_text() + "      nr_inactive_file 400000\n")
    spare = Spare(PLENTY, 4096, root, lambda: 0.0)
    assert spare() > (plenty + 200000) * 4096
    assert spare.caches > 200000 * 4096 - 4096
    # The kernel has given up all of it, for us.
    assert spare() <= (plenty + 1000) * 4096
    assert spare.caches == 0


def test_a_pool_that_somebody_else_made_smaller_is_not_made_smaller_still(world: World) -> None:
    (extent,) = world.source.take(8 * HUGE)
    world.file.write_text("2\n")
    world.source.give_back([extent])
    assert world.pages == 2


def test_a_watermark_goes_back_though_lowering_it_failed_once(tmp_path: Path) -> None:
    problem: list[OSError] = []

    def record(_: Changed | None) -> None:
        if problem:
            raise problem[0]

    watermark = Watermark(record, proc_root=proc(tmp_path, 45056, 960), thp_enabled=str(tmp_path / "none"))
    problem.append(OSError(28, "No space left on device"))
    watermark.follow(424 * MIB)
    assert minimum(tmp_path) == 45056
    problem.clear()
    watermark.follow(0)
    assert minimum(tmp_path) == 45056
    watermark = Watermark(record, Changed(45056), proc(tmp_path, 27000, 960), thp_enabled=str(tmp_path / "none"))
    (tmp_path / "sys/vm/min_free_kbytes").rename(tmp_path / "hidden")
    watermark.follow(700 * MIB)
    (tmp_path / "hidden").rename(tmp_path / "sys/vm/min_free_kbytes")
    watermark.follow(0)
    assert minimum(tmp_path) == 45056


# -- restoring ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What an agent has left that was killed: two blocks, one of which came back, a pool, a setting."""
    for number, state in ((7, "offline"), (8, "online")):
        (tmp_path / f"memory/memory{number}").mkdir(parents=True)
        (tmp_path / f"memory/memory{number}/state").write_text(f"{state}\n")
    (tmp_path / "memory/block_size_bytes").write_text("8000000\n")
    (tmp_path / "huge/hugepages-2048kB").mkdir(parents=True)
    (tmp_path / "huge/hugepages-2048kB/nr_hugepages").write_text("12\n")
    # One that is about to go by itself.
    (tmp_path / "huge/hugepages-2048kB/surplus_hugepages").write_text("1\n")
    (tmp_path / "huge/hugepages-2048kB/free_hugepages").write_text("0\n")
    (tmp_path / "sys/bus/pci/devices").mkdir(parents=True)
    (tmp_path / "sysctl/vm").mkdir(parents=True)
    (tmp_path / "sysctl/vm/min_free_kbytes").write_text("27000\n")
    (tmp_path / "run").mkdir()
    state_file = StateFile(tmp_path / "run/state.json")
    state_file.record_blocks({7: "Movable", 8: "Normal"})
    state_file.record_pool(HUGE, 3, 6)
    state_file.record_sysctl("vm.min_free_kbytes", Changed(45056, (27000,)))
    state_file.record_driver("0000:00:09.0", "virtio-pci")
    return tmp_path


def undo(root: Path) -> None:
    restore(root / "run", str(root / "memory"), str(root / "huge"), root / "sys", str(root / "sysctl"), root / "locks")


@pytest.mark.skipif(os.geteuid() != 0, reason="restoring needs root")
def test_everything_on_record_is_put_back(left: Path) -> None:
    undo(left)
    assert (left / "memory/memory7/state").read_text() == "online_movable"
    assert (left / "memory/memory8/state").read_text() == "online\n"
    # 11 less the 6 that were added: somebody else has added two meanwhile.
    assert (left / "huge/hugepages-2048kB/nr_hugepages").read_text() == "5"
    assert (left / "sysctl/vm/min_free_kbytes").read_text() == "45056"
    assert not (left / "run/state.json").exists()
    undo(left)


@pytest.mark.skipif(os.geteuid() != 0, reason="restoring needs root")
def test_the_watermark_goes_back_last_as_it_depends_on_the_others(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (left / "sysctl/vm/watermark_scale_factor").write_text("450\n")
    StateFile(left / "run/state.json").record_sysctl("vm.watermark_scale_factor", Changed(10, (450,)))
    factors: list[str] = []

    def choose(path: str, before: int, _: str) -> int:
        factors.append((left / "sysctl/vm/watermark_scale_factor").read_text())
        return before

    monkeypatch.setattr("balloon_agent.guest.sysctls.let_kernel_choose", choose)
    undo(left)
    assert factors == ["10"]


def without_a_device(root: Path) -> str:
    """What an agent says that finds none, with the run directory in its hands."""
    roots = (str(root / "memory"), str(root / "huge"), root / "sys", str(root / "sysctl"), root / "locks")
    state = StateFile(root / "run/state.json")
    try:
        _give_back_what_is_held(lambda: put_back_all(root / "run", state, *roots), DeviceNotFound("there is none"))
    except DeviceNotFound as error:
        return str(error)
    return ""


def test_an_agent_that_finds_no_device_gives_back_what_is_on_record(left: Path) -> None:
    with closing(lock_run_dir(left / "run")):
        assert without_a_device(left) == "there is none; what an earlier agent has held is the guest's again"
        assert (left / "memory/memory7/state").read_text() == "online_movable"
        assert not (left / "run/state.json").exists()
        # Then there is nothing to be added to why it ends.
        assert without_a_device(left) == ""


def test_an_agent_that_finds_no_device_says_what_does_not_go_back(left: Path) -> None:
    (left / "huge/hugepages-2048kB/nr_hugepages").unlink()
    said = without_a_device(left)
    assert said.startswith(
        "there is none; of what an earlier agent has held not all goes back: the pool of huge pages of 2048 kB"
    )
    assert StateFile(left / "run/state.json").pools == {HUGE: (3, 6)}


@pytest.mark.skipif(os.geteuid() != 0, reason="restoring needs root")
def test_a_device_without_a_driver_comes_first_and_nothing_else_is_touched_if_that_fails(left: Path) -> None:
    """Somebody was killed between unbinding and binding: nobody has it, and it is still on record."""
    function = left / "sys/bus/pci/devices/0000:00:09.0"
    function.mkdir()
    (function / "driver_override").write_text("uio_pci_generic\n")
    (function / "config").write_bytes(bytes(64))
    with pytest.raises((BalloonError, OSError)):
        undo(left)
    # This is no device that could be bound. All of it is on record still.
    assert StateFile(left / "run/state.json").previous_drivers == {"0000:00:09.0": "virtio-pci"}
    assert (left / "memory/memory7/state").read_text() == "offline\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="restoring needs root")
def test_what_does_not_go_back_stays_on_record(left: Path) -> None:
    (left / "huge/hugepages-2048kB/nr_hugepages").unlink()
    with pytest.raises(BalloonError, match="the pool of huge pages of 2048 kB does not shrink"):
        undo(left)
    assert StateFile(left / "run/state.json").pools == {HUGE: (3, 6)}
    assert StateFile(left / "run/state.json").blocks == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="restoring needs root")
def test_a_block_that_may_go_offline_yet_stays_on_record(left: Path) -> None:
    """A worker that could not be ended is at it."""
    (left / "memory/memory7/state").write_text("going-offline\n")
    with pytest.raises(BalloonError, match="memory7 is going-offline"):
        undo(left)
    assert StateFile(left / "run/state.json").blocks == {7: "Movable"}


@pytest.mark.skipif(os.geteuid() != 0, reason="binding needs root")
@pytest.mark.parametrize("known", [True, False])
def test_a_device_is_not_unbound_by_hand_while_memory_is_held(
    sysfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Whether the device is on record with it, or not any more."""
    monkeypatch.setattr(by_hand, "functions", lambda: functions(sysfs))
    monkeypatch.setattr(by_hand, "lock_device", partial(lock_device, folder=tmp_path))
    monkeypatch.setattr(by_hand, "what_is_held", lambda *_: "memory blocks: 2")
    if known:
        StateFile(tmp_path / "state.json").record_driver(ADDRESS, "virtio-pci")
    with pytest.raises(DeviceBusy, match=r"what it held .memory blocks: 2.: balloon-agent restore gives back both"):
        by_hand.unbind(Options(run_dir=tmp_path))


def test_extents_of_several_sizes_are_counted_as_in_use_but_for_blocks() -> None:
    ledger = Ledger()
    ledger.add(Extent("a", "thp", [Run(512, 512)], "h"))
    ledger.add(Extent("b", "blocks", [Run(32768, 32768)]))
    assert ledger.in_use == HUGE
    assert ledger.parts(32768) == {0, 1}


def test_a_killed_agents_holders_are_ended_whatever_they_speak(tmp_path: Path) -> None:
    from balloon_agent.memory.holders import Holders

    program = (
        "import json, socket, sys, time; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[2]); s.listen(); print(flush=True);"
        " c, _ = s.accept(); c.recv(100); import os; send = c.sendall;"
        " send(json.dumps(dict(ok=True, version=99, pid=os.getpid(), extents=[])).encode() + bytes([10])); time.sleep(60)"
    )
    folder = tmp_path / "holders"
    folder.mkdir()
    process = subprocess.Popen([sys.executable, "-c", program, left_behind.HOLDER, str(folder / "x")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    # A zombie is gone enough for a pidfd, and this process is its parent.
    assert Holders(folder).end_all() == ([process.pid], [])
    assert process.wait(60) == -9
    process.stdout.close()
    assert list(folder.iterdir()) == []
