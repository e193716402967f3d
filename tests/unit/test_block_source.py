"""Memory blocks as a source: which are tried, for how long, and what is believed about them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from balloon_agent.errors import (
    GaveWay,
    HolderLost,
    Shortage,
    StillHeld,
    Unfinished,
)
from balloon_agent.frames import FRAME, Run
from balloon_agent.linux import memory_blocks
from balloon_agent.linux.page_flags import KPF_BUDDY, KPF_HUGE, KPF_SLAB
from balloon_agent.memory.holders import Holders
from balloon_agent.memory.ledger.ledger import Extent
from balloon_agent.memory.sources.block_choice import FAILED_BLOCK_REST, SURVEY_HOLDS
from balloon_agent.memory.sources.block_costs import Survey
from balloon_agent.memory.sources.blocks import (
    TRIES_A_STEP,
    BlockSource,
)
from balloon_agent.memory.sources.intrusions import INTRUSIONS_WITHIN, MOST_INTRUSIONS
from balloon_agent.memory.worker import Worker

BLOCK = 128 << 20


class FakeWorkers:
    """In place of real processes: one worker that changes the tree as the kernel would, or does not."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.busy: set[int] = set()
        self.stuck: set[int] = set()
        # Where somebody else needs memory while they are taken.
        self.in_need: set[int] = set()
        self.gave_way = self.on_the_fuse = False
        self.does_it_all_the_same = False
        self.started = 0
        # Killed, and stuck in the kernel.
        self.unended_workers: list[str] = []
        self.dies = True
        self.name: str | None = None
        self.asked: list[tuple[str, int]] = []
        self.short: list[tuple[str, bool]] = []

    def __contains__(self, name: object) -> bool:
        return name is not None and name == self.name

    def start(self, *, holds_memory: bool) -> FakeWorkers:
        assert not holds_memory, "what may be killed must not hold memory"
        self.started += 1
        self.name = f"w{self.started}"
        return self

    def kill(self, name: str) -> None:
        assert name == self.name
        self.name = None
        if not self.dies:
            self.unended_workers.append(name)

    def set_fuse(self, on: bool) -> None:
        self.on_the_fuse = on

    def request(
        self, message: dict[str, Any], _deadline: float, *, short: bool = False, takes: bool = False, kills: bool = True
    ) -> dict[str, Any]:
        self.short.append((message["op"], short))
        assert takes == self.on_the_fuse == (message["op"] == "offline")
        self.gave_way = False
        return self._offline(message) if message["op"] == "offline" else self._online(message)

    def _offline(self, message: dict[str, Any]) -> dict[str, Any]:
        done: list[int] = []
        failed: tuple[int, int, str] | None = None
        for number in message["blocks"]:
            if len(done) == message["most"]:
                break
            self.asked.append(("offline", number))
            assert memory_blocks.state(str(self.root), number) == "online"
            if number in self.in_need:
                self.gave_way = True
                break
            if number in self.stuck:
                if self.does_it_all_the_same:
                    self._set(number, "offline")
                raise HolderLost("gave no answer")
            if number in self.busy:
                failed = (number, 16, "Device or resource busy")
                break
            self._set(number, "offline")
            done.append(number)
        return {"ok": True, "done": done, "failed": failed, "seconds": {"populate": 0.5}}

    def _online(self, message: dict[str, Any]) -> dict[str, Any]:
        failed: dict[str, str] = {}
        for number, state in message["blocks"]:
            self.asked.append(("online", number))
            assert state == "online_kernel"
            if number in self.busy:
                failed[str(number)] = "[Errno 16]"
            else:
                self._set(number, "online")
        return {"ok": True, "failed": failed}

    def _set(self, number: int, state: str) -> None:
        (self.root / f"memory{number}/state").write_text(f"{state}\n")


class World:
    def __init__(self, root: Path, count: int = 8) -> None:
        self.root = root
        (root / "block_size_bytes").write_text(f"{BLOCK:x}\n")
        for number in range(count):
            (root / f"memory{number}").mkdir()
            (root / f"memory{number}/state").write_text("online\n")
            (root / f"memory{number}/valid_zones").write_text("Normal\n")
        self.workers = FakeWorkers(root)
        self.recorded: set[int] = set()
        self.now = 0.0
        self.room = 1 << 40
        self.ours: set[int] = set()
        self.forget_problem: OSError | None = None
        self.source = BlockSource(
            Worker(cast("Holders", self.workers)),
            lambda: self.ours,
            lambda which: self.recorded.update(block.number for block in which),
            self.forget,
            lambda: self.room,
            str(root),
            lambda: self.now,
            Survey(str(root / "proc"), str(root / "hugepages")),
        )

    def forget(self, numbers: Sequence[int]) -> None:
        if self.forget_problem is not None:
            raise self.forget_problem
        self.recorded.difference_update(numbers)

    def take(self, count: int = 1) -> Extent:
        extent, *_ = self.source.take(count * BLOCK)
        return extent

    def state(self, number: int) -> str:
        return memory_blocks.state(str(self.root), number)

    def use(self, pages: dict[int, int]) -> None:
        """Use that number of pages of each block, from its first one on; all else is free."""
        flags = array("Q", [KPF_BUDDY]) * (8 * BLOCK // FRAME)
        for number, count in pages.items():
            flags[number * BLOCK // FRAME : number * BLOCK // FRAME + count] = array("Q", [0]) * count
        (self.root / "proc").mkdir(exist_ok=True)
        (self.root / "proc/kpageflags").write_bytes(flags.tobytes())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def free_world(world: World) -> World:
    """Blocks with nothing in them, of which several are taken at once."""
    world.use({})
    return world


def test_a_block_is_recorded_while_it_is_ours(world: World) -> None:
    extent = world.take()
    assert extent.runs == (Run(7 * 32768, 32768),)
    assert world.recorded == {7}
    assert world.source.in_place(extent)
    assert not world.source.give_back([extent])
    assert world.state(7) == "online"
    assert world.recorded == set()


def test_a_block_that_went_back_is_the_easiest_to_take_again(free_world: World) -> None:
    """What was left over when the survey was made may be what is hardest to take."""
    extents = free_world.source.take(2 * BLOCK)
    assert not free_world.source.give_back(extents)
    free_world.now += 1
    assert [extent.name for extent in free_world.source.take(3 * BLOCK)] == ["block-7", "block-6", "block-5"]


def test_only_what_has_to_be_moved_is_emptied_for_room(world: World) -> None:
    """What came back is empty; but others may have been filled since anybody looked."""
    world.use({})
    extents = world.source.take(8 * BLOCK)
    assert not world.source.give_back(extents)
    world.use({3: 1})
    assert world.source.make_room() == BLOCK
    assert world.workers.asked[-1] == ("online", 3)


def test_what_was_moved_out_of_a_block_is_not_moved_again_with_the_next_one(world: World) -> None:
    """The kernel chooses the blocks that pages move to."""
    half = BLOCK // FRAME // 2
    world.use(dict.fromkeys(range(8), half))
    original = world.workers._offline

    def fills_others(message: dict[str, Any]) -> dict[str, Any]:
        assert len(message["blocks"]) == 1, "more would be taken before anybody has looked"
        world.use(dict.fromkeys(range(8), half) | {6: 2 * half})
        return original(message)

    world.workers._offline = fills_others  # type: ignore[method-assign]
    assert [world.take(3).name for _ in range(3)] == ["block-7", "block-5", "block-4"]


@pytest.mark.parametrize("free", [False, True])
def test_what_has_nothing_to_move_is_done_ahead_of_others(world: World, free: bool) -> None:
    """What has may take long, and a single pinned page makes it go on for ever."""
    (world.root / "proc").mkdir()
    flags = KPF_BUDDY if free else KPF_BUDDY | KPF_SLAB
    (world.root / "proc/kpageflags").write_bytes(flags.to_bytes(8, "little") * (8 * BLOCK // FRAME))
    assert not world.source.give_back([world.take()])
    assert world.workers.short == [("offline", free), ("online", True)]


def test_a_block_with_our_own_pinned_memory_is_not_tried(world: World) -> None:
    world.ours = {7}
    assert world.take().name == "block-6"
    assert ("offline", 7) not in world.workers.asked


def test_a_busy_block_is_left_alone_for_a_while(world: World) -> None:
    world.workers.busy = {7}
    assert world.take().name == "block-6"
    world.workers.busy = set()
    assert world.take().name == "block-5"
    world.now = FAILED_BLOCK_REST + 1
    assert world.take().name == "block-7"


def test_a_step_tries_a_few_blocks_and_the_next_one_goes_on(world: World) -> None:
    world.workers.busy = set(range(8))
    with pytest.raises(Unfinished, match="memory7: in it is memory that cannot be moved"):
        world.take()
    assert len(world.workers.asked) == TRIES_A_STEP
    with pytest.raises(Shortage, match="memory0") as caught:
        world.take()
    assert not isinstance(caught.value, Unfinished)
    assert len(world.workers.asked) == 8
    assert world.recorded == set()


def test_a_worker_that_hangs_is_killed_and_the_state_decides(world: World) -> None:
    world.workers.stuck = {7}
    assert world.take().name == "block-6"
    assert world.workers.started == 2
    world.workers.stuck = {5}
    world.workers.does_it_all_the_same = True
    # It was killed, but had got there: the block is offline, and so it is ours.
    assert world.take().name == "block-5"
    assert 5 in world.recorded


def test_a_block_that_gives_way_is_as_good_as_before(world: World) -> None:
    """Others have their turn first; then it is tried again, and not left alone for a while."""
    world.workers.in_need = {7}
    with pytest.raises(GaveWay, match="somebody else needs the memory"):
        world.take()
    assert world.workers.asked == [("offline", 7)], "this is no time to try others"
    assert world.recorded == set()
    assert not world.workers.on_the_fuse
    with pytest.raises(GaveWay):
        world.source.make_room()
    world.workers.in_need = set()
    assert world.take().name == "block-7"


def test_what_was_taken_before_it_gave_way_is_ours(free_world: World) -> None:
    free_world.workers.in_need = {5}
    assert [extent.name for extent in free_world.source.take(4 * BLOCK)] == ["block-7", "block-6"]
    assert free_world.recorded == {7, 6}


def test_a_worker_that_died_of_need_is_not_followed_by_another_at_once(world: World) -> None:
    """It was asked to give way, and the OOM killer was faster."""
    original = world.workers.request

    def dies(
        message: dict[str, Any], _deadline: float, *, short: bool = False, takes: bool = False, kills: bool = True
    ) -> dict[str, Any]:
        world.workers.gave_way = True
        raise HolderLost("died at offline")

    world.workers.request = dies  # type: ignore[method-assign]
    with pytest.raises(GaveWay):
        world.take()
    assert (world.workers.started, world.recorded) == (1, set())
    world.workers.request = original  # type: ignore[method-assign]
    assert world.take().name == "block-7", "it was not the block's fault"


def test_whoever_gives_way_takes_no_block_of_somebody_elses(world: World) -> None:
    """One that somebody else took offline just then."""

    def late(message: dict[str, Any]) -> dict[str, Any]:
        world.workers.gave_way = True
        (world.root / "memory7/state").write_text("offline\n")
        return {"ok": True, "done": [], "failed": None, "seconds": {}}

    original = world.workers._offline
    world.workers._offline = late  # type: ignore[method-assign]
    with pytest.raises(GaveWay):
        world.take()
    world.workers._offline = original  # type: ignore[method-assign]
    assert world.recorded == set()
    assert world.take().name == "block-6"


def test_a_block_whose_worker_gave_way_and_cannot_be_killed_is_taken_once(world: World) -> None:
    original = world.workers.request

    def hangs(
        message: dict[str, Any], _deadline: float, *, short: bool = False, takes: bool = False, kills: bool = True
    ) -> dict[str, Any]:
        world.workers.gave_way = True
        (world.root / "memory7/state").write_text("going-offline\n")
        raise HolderLost("gave no answer")

    world.workers.request = hangs  # type: ignore[method-assign]
    with pytest.raises(GaveWay):
        world.take()
    world.workers.request = original  # type: ignore[method-assign]
    assert world.recorded == {7}
    (world.root / "memory7/state").write_text("offline\n")
    assert [world.take().name, world.take().name] == ["block-7", "block-6"]


def test_a_block_that_is_sorted_out_twice_is_taken_once(world: World) -> None:
    """Whatever goes wrong while it is."""
    original, problems = world.workers.request, [RuntimeError("out of order")]

    def hangs(
        message: dict[str, Any], _deadline: float, *, short: bool = False, takes: bool = False, kills: bool = True
    ) -> dict[str, Any]:
        (world.root / "memory7/state").write_text("going-offline\n")
        raise HolderLost("gave no answer")

    def forget(numbers: Sequence[int]) -> None:
        if numbers and problems:
            raise problems.pop()
        world.forget(numbers)

    world.workers.request = hangs  # type: ignore[method-assign]
    world.source._forget = forget
    with pytest.raises(RuntimeError):
        world.take(2)
    world.workers.request = original  # type: ignore[method-assign]
    assert world.recorded == {7}
    (world.root / "memory7/state").write_text("offline\n")
    assert [world.take().name, world.take().name] == ["block-7", "block-6"]


def test_a_block_that_does_not_come_back_is_still_held(world: World) -> None:
    extent = world.take()
    world.workers.busy = {7}
    (problem,) = world.source.give_back([extent]).values()
    assert isinstance(problem, StillHeld)
    assert "memory7 does not come back" in str(problem)
    assert world.recorded == {7}
    world.workers.busy = set()
    assert not world.source.give_back([extent])
    assert world.state(7) == "online"


def test_a_record_that_cannot_be_written_does_not_make_memory_ours_again(world: World) -> None:
    extent = world.take()
    world.forget_problem = OSError(28, "No space left on device")
    assert not world.source.give_back([extent])  # no StillHeld: the guest has it
    assert world.state(7) == "online"


def test_room_is_made_only_where_the_guest_can_spare_a_block_meanwhile(world: World) -> None:
    world.room = BLOCK - 1
    assert not world.source.make_room()
    assert world.workers.asked == []
    world.room = BLOCK
    assert world.source.make_room()
    assert world.workers.asked == [("offline", 7), ("online", 7)]
    assert world.recorded == set()


def test_a_block_stranded_while_making_room_is_taken_next_or_brought_back(world: World) -> None:
    original = world.workers.request

    def online_fails(
        message: dict[str, Any], _deadline: float, *, short: bool = False, takes: bool = False, kills: bool = True
    ) -> dict[str, Any]:
        if message["op"] == "online":
            return {"ok": False, "error": "no"}
        return original(message, _deadline, short=short, takes=takes)

    world.workers.request = online_fails  # type: ignore[method-assign]
    assert not world.source.make_room()
    assert world.recorded == {7}
    assert world.take().name == "block-7"
    assert not world.source.make_room()
    assert world.recorded == {7, 6}
    world.workers.request = original  # type: ignore[method-assign]
    world.source.restore_stranded()
    assert world.state(6) == "online"
    assert world.recorded == {7}


def test_a_worker_killed_in_the_middle_of_several_loses_none_of_them(free_world: World) -> None:
    free_world.workers.stuck = {5}
    assert [extent.name for extent in free_world.source.take(4 * BLOCK)] == ["block-7", "block-6"]
    assert free_world.recorded == {7, 6}
    assert [extent.name for extent in free_world.source.take(2 * BLOCK)] == ["block-4", "block-3"]
    assert free_world.recorded == {7, 6, 4, 3}


def test_a_failure_in_the_middle_of_several_loses_none_of_them(free_world: World) -> None:
    free_world.workers.busy = {5}
    assert [extent.name for extent in free_world.source.take(4 * BLOCK)] == ["block-7", "block-6"]
    assert free_world.recorded == {7, 6}


def test_whatever_goes_wrong_what_is_offline_is_kept_for_the_balloon(world: World) -> None:
    original = world.workers.request

    def nonsense(
        message: dict[str, Any], _deadline: float, *, short: bool = False, takes: bool = False, kills: bool = True
    ) -> dict[str, Any]:
        return {**original(message, _deadline, takes=takes), "done": None}

    world.workers.request = nonsense  # type: ignore[method-assign]
    with pytest.raises(TypeError):
        world.take()
    assert world.recorded == {7}
    world.workers.request = original  # type: ignore[method-assign]
    assert world.take().name == "block-7"


def test_what_was_pinned_or_taken_since_the_last_look_is_left_alone(world: World) -> None:
    assert world.take().name == "block-7"
    world.ours = {6}
    (world.root / "memory5/state").write_text("offline\n")
    assert world.take().name == "block-4"
    assert world.recorded == {7, 4}


def test_a_block_that_fails_again_and_again_is_left_alone_for_longer(world: World) -> None:
    world.workers.busy = {7}
    for pause in (0.0, FAILED_BLOCK_REST, 2 * FAILED_BLOCK_REST):
        world.now += pause + 0.001
        extent = world.take()
        assert world.workers.asked.count(("offline", 7)) == (1 if pause == 0 else 2 if pause == FAILED_BLOCK_REST else 3)
        world.source.give_back([extent])
        world.now += FAILED_BLOCK_REST / 2
        world.source.give_back([world.take()])
        world.now -= FAILED_BLOCK_REST / 2


def test_a_stranded_block_that_somebody_brought_back_is_not_taken_for_ours(world: World) -> None:
    world.workers.stuck = {7}
    world.workers.does_it_all_the_same = True
    original = world.workers.request

    def online_fails(
        message: dict[str, Any], _deadline: float, *, short: bool = False, takes: bool = False, kills: bool = True
    ) -> dict[str, Any]:
        return {"ok": False, "error": "no"} if message["op"] == "online" else original(message, _deadline, takes=takes)

    world.workers.request = online_fails  # type: ignore[method-assign]
    assert not world.source.make_room()
    assert world.recorded == {7}
    (world.root / "memory7/state").write_text("online\n")
    world.ours = {7}
    assert world.take().name == "block-6"
    assert world.recorded == {6}


def test_a_block_that_somebody_else_takes_just_then_is_not_on_our_record(world: World) -> None:
    original = world.workers._offline

    def late(message: dict[str, Any]) -> dict[str, Any]:
        world.workers.busy = {7}
        (world.root / "memory7/state").write_text("offline\n")
        world.workers._offline = original  # type: ignore[method-assign]
        return {"ok": True, "done": [], "failed": (7, 22, "Invalid argument"), "seconds": {}}

    world.workers._offline = late  # type: ignore[method-assign]
    assert world.take().name == "block-6"
    assert world.recorded == {6}


def test_a_block_whose_worker_cannot_be_killed_stays_on_record(world: World) -> None:
    original = world.workers.request

    def hangs(
        message: dict[str, Any], _deadline: float, *, short: bool = False, takes: bool = False, kills: bool = True
    ) -> dict[str, Any]:
        (world.root / "memory7/state").write_text("going-offline\n")
        world.workers.request = original  # type: ignore[method-assign]
        raise HolderLost("gave no answer")

    world.workers.request = hangs  # type: ignore[method-assign]
    assert world.take().name == "block-6"
    assert world.recorded == {7, 6}
    (world.root / "memory7/state").write_text("offline\n")
    assert world.take().name == "block-7"


def pool(world: World, size: int, count: int, frames: Sequence[int], flags: int = KPF_HUGE) -> None:
    """A pool of so many huge pages; those at these frames are shown by /proc/kpageflags, all else is free memory."""
    folder = world.root / f"hugepages/hugepages-{size >> 10}kB"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nr_hugepages").write_text(f"{count}\n")
    (world.root / "proc").mkdir(exist_ok=True)
    pages = array("Q", [KPF_BUDDY]) * (8 * BLOCK // FRAME)
    for frame in frames:
        pages[frame : frame + size // FRAME] = array("Q", [flags] * (size // FRAME))
    (world.root / "proc/kpageflags").write_bytes(pages.tobytes())


@pytest.mark.parametrize("frame", [7 * 32768, 8 * 32768 - 512])
def test_a_block_with_pages_of_a_pool_is_left_alone(world: World, frame: int) -> None:
    """They would be gone for good, and the administrator's pool smaller. Making room would do the same."""
    pool(world, 2 << 20, 1, [frame])
    assert world.take().name == "block-6"
    pool(world, 2 << 20, 1, [frame, *(number * 32768 + 512 for number in range(6))])
    with pytest.raises(Shortage, match=r"memory0, memory1, .*: in it are huge pages of a pool"):
        world.take()
    assert not world.source.make_room()
    assert {number for _, number in world.workers.asked} == {6}


def test_a_huge_page_larger_than_a_block_is_in_all_of_them(world: World) -> None:
    pool(world, 2 << 20, 0, [])
    pool(world, 1 << 30, 1, [0])
    with pytest.raises(Shortage, match="of a pool"):
        world.take()


def test_where_no_pool_has_any_page_nothing_is_looked_at(world: World) -> None:
    pool(world, 2 << 20, 0, [7 * 32768])
    (world.root / "proc/kpageflags").unlink()
    assert world.take().name == "block-7"


def test_where_it_cannot_be_seen_no_pool_is_put_at_risk(world: World) -> None:
    pool(world, 2 << 20, 1, [])
    (world.root / "proc/kpageflags").unlink()
    with pytest.raises(Shortage, match="of a pool"):
        world.take()


def bring_online(world: World, number: int) -> None:
    (world.root / f"memory{number}/state").write_text("online\n")


def test_blocks_that_others_bring_online_are_named_and_not_touched_again(free_world: World) -> None:
    first, second = free_world.source.take(2 * BLOCK)
    assert free_world.source.lost(None) == []
    bring_online(free_world, 7)
    assert free_world.source.lost({6}) == []
    assert free_world.source.lost({7, 99}) == free_world.source.lost(None) == [first.name]
    assert not free_world.source.is_ours(first)
    assert free_world.source.is_ours(second)
    free_world.workers.asked.clear()
    assert not free_world.source.give_back([first])
    assert free_world.workers.asked == [], "it is online: nobody is asked to bring it online"
    assert free_world.recorded == {6}
    assert free_world.source.lost(None) == []


def test_a_block_that_is_unplugged_is_lost(world: World) -> None:
    extent = world.take()
    (world.root / "memory7/state").unlink()
    assert world.source.lost({7}) == [extent.name]
    assert not world.source.give_back([extent])
    assert world.recorded == set()
    assert world.take().name == "block-6"


def test_a_block_that_is_on_its_way_is_not_lost(world: World) -> None:
    extent = world.take()
    (world.root / "memory7/state").write_text("going-offline\n")
    assert world.source.lost(None) == []
    assert not world.source.is_ours(extent)


def test_a_block_that_others_brought_online_is_left_alone_for_a_while(world: World) -> None:
    extent = world.take()
    bring_online(world, 7)
    world.source.give_back([extent])
    # What is easy to take has been looked for again by then.
    world.now += SURVEY_HOLDS + 1
    assert world.take().name == "block-6"
    world.now += FAILED_BLOCK_REST
    assert world.take().name == "block-7"


def test_blocks_that_are_unplugged_are_no_insistence(world: World) -> None:
    extents = world.source.take(MOST_INTRUSIONS * BLOCK)
    for number in (7, 6, 5):
        (world.root / f"memory{number}/state").unlink()
    assert not world.source.give_back(extents)
    assert world.take().name == "block-4"


def test_whoever_insists_has_all_blocks_rest_ever_longer(free_world: World) -> None:
    for rest in (FAILED_BLOCK_REST, 2 * FAILED_BLOCK_REST, 4 * FAILED_BLOCK_REST):
        extents = free_world.source.take(MOST_INTRUSIONS * BLOCK)
        names = [int(extent.name.removeprefix("block-")) for extent in extents]
        for number in names:
            bring_online(free_world, number)
        free_world.source.give_back(extents)
        with pytest.raises(Shortage, match=f"memory{min(names)}.*balloon-agent doctor"):
            free_world.take()
        assert not free_world.source.make_room()
        free_world.now += rest - 1
        with pytest.raises(Shortage, match="somebody else brings them online again and again"):
            free_world.take()
        # Blocks that failed are left alone for longer each time; the others are there.
        free_world.now += 2
        free_world.source._choice._failed.clear()
    assert free_world.recorded == set()


def test_blocks_brought_online_now_and_then_are_no_insistence(world: World) -> None:
    for _ in range(2 * MOST_INTRUSIONS):
        extent = world.take()
        bring_online(world, int(extent.name.removeprefix("block-")))
        world.source.give_back([extent])
        world.now += INTRUSIONS_WITHIN / (MOST_INTRUSIONS - 1) + 1
    assert world.take()


def test_nothing_is_kept_or_posted_before_its_worker_has_ended(free_world: World) -> None:
    """Killed, it may be in the kernel yet, and bring online what it was asked to, at any time."""
    extents = free_world.source.take(2 * BLOCK)
    original = free_world.workers.request

    def hangs(
        message: dict[str, Any], _deadline: float, *, short: bool = False, takes: bool = False, kills: bool = True
    ) -> dict[str, Any]:
        free_world.workers.request = original  # type: ignore[method-assign]
        raise HolderLost("gave no answer")

    free_world.workers.request = hangs  # type: ignore[method-assign]
    free_world.workers.dies = False
    assert not free_world.source.give_back(extents), "what is not provably held is not kept"
    assert free_world.recorded == {7, 6}, "and is on record until that shows"
    assert free_world.take().name == "block-5"
    bring_online(free_world, 7)
    assert free_world.take().name == "block-4"
    # It was asked for both, and has done the first; now it is gone.
    free_world.workers.unended_workers.clear()
    assert free_world.take().name == "block-6"
    assert free_world.recorded == {6, 5, 4}
    assert free_world.source.lost(None) == []


def test_what_went_offline_is_not_posted_before_its_worker_has_ended(world: World) -> None:
    world.workers.stuck = {7}
    world.workers.does_it_all_the_same = True
    world.workers.dies = False
    assert world.take().name == "block-6"
    assert world.recorded == {7, 6}
    world.workers.unended_workers.clear()
    assert world.take().name == "block-7"
