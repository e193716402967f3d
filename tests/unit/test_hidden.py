"""Memory that hides in holes of huge pages: how much there is, by which means it is freed, and when that is left alone."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balloon_agent.frames import FRAME
from balloon_agent.memory.hidden import (
    DEADLINE_AT_NEED,
    FIRST_REST,
    LEAST,
    MEANS_KNOWN,
    MOST_IN_VAIN,
    RECLAIMED,
    ROOM,
    SECONDS_AT_NEED,
    STALE,
    Hidden,
    hidden_in,
    hidden_pages,
)
from balloon_agent.memory.worker import Worker

MIB = 1 << 20
VMSTAT = """nr_free_pages 23852
nr_inactive_anon {inactive}
nr_active_anon 35
nr_unevictable {unevictable}
nr_anon_pages {mapped}
nr_shmem 80
nr_swapcached 0
"""


def vmstat(hidden: int, locked: int = 0, files: int = 0) -> str:
    """Of a guest with so many hidden pages, and locked ones of programs and of files."""
    mapped = 104145 + locked
    return VMSTAT.format(inactive=104145 - 35 + 80 + hidden, unevictable=locked + files, mapped=mapped)


@pytest.mark.parametrize(("locked", "files"), [(0, 0), (15000, 0), (15000, 5000), (0, 5000)])
@pytest.mark.parametrize("hidden", [0, 1, 102000])
def test_what_is_on_the_lists_and_mapped_by_nobody_hides(hidden: int, locked: int, files: int) -> None:
    assert hidden_pages(vmstat(hidden, locked, files), files) == hidden


def test_of_locked_memory_none_hides() -> None:
    text = "anon 400000000\nshmem 4096\ninactive_anon 4096\nactive_anon 0\nunevictable 420000000\n"
    assert hidden_in(text) == 0


class FakeWorker:
    """Splits and reclaims in a guest that is a few files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hidden = 0
        self.unfindable = 0
        self.at_once = 64 * MIB
        self.asked: list[dict[str, Any]] = []
        self.terms: list[tuple[float, bool]] = []
        self.gave_way = False
        self.is_up = True
        self.denied = 0
        self.answers: dict[str, Any] = {}
        # Bytes that a write to memory.reclaim frees of what hides.
        self.reclaims: Callable[[str], int] = lambda _: 0
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/status").write_text("Name:\tx\nRssFile:\t    8192 kB\n")
        (root / "proc/swaps").write_text("Filename Type Size Used Priority\n")
        (root / "cgroup").mkdir()
        self.show()

    def hide(self, size: int) -> None:
        self.hidden = size
        self.show()

    def show(self) -> None:
        (self.root / "proc/vmstat").write_text(vmstat(self.hidden // FRAME, 1000, 2048))

    def ask(
        self, message: dict[str, Any], deadline: float, *, short: bool = False, takes: bool = False, kills: bool = True
    ) -> Any:
        self.asked.append(message)
        self.terms.append((deadline, kills))
        if message["op"] in self.answers:
            return self.answers[message["op"]]
        if message["op"] == "split":
            freed = min(self.at_once, self.hidden - self.unfindable, message["frames"] * FRAME)
            self.hide(self.hidden - freed)
            return {
                "ok": True,
                "freed": freed // FRAME,
                "done": self.hidden <= self.unfindable,
                "denied": self.denied,
                "problem": None,
            }
        self.hide(self.hidden - self.reclaims(message["text"]))
        return {"ok": True, "problem": None}

    @property
    def ops(self) -> list[str]:
        return [message["op"] for message in self.asked]


class World:
    def __init__(self, root: Path) -> None:
        self.worker = FakeWorker(root)
        self.now = 100.0
        self.cgroup = root / "cgroup"
        self.nodes = root / "node"
        self.hidden = Hidden(
            cast("Worker", self.worker), lambda: [17], lambda: self.now, root / "proc", self.cgroup, self.nodes
        )

    def group(self, path: str, hidden: int) -> None:
        group = self.cgroup / path
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.reclaim").write_text("")
        (group / "memory.stat").write_text(
            f"anon {100 * MIB}\nshmem 0\ninactive_anon {100 * MIB + hidden}\nactive_anon 0\nunevictable 0\nswapcached 0\n"
        )

    def search(self, wanted: int = 400 * MIB) -> int:
        """Until there is no more to do: so many steps."""
        for steps in range(200):
            if not self.hidden.free(wanted):
                return steps
        raise AssertionError("it never ends")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_guest_that_hides_nothing_is_not_looked_through(world: World) -> None:
    world.worker.hide(LEAST - FRAME)
    assert world.search() == 0
    assert world.worker.asked == []


def test_what_hides_is_freed_in_steps_as_far_as_it_is_wanted(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.worker.hide(398 * MIB)
    with caplog.at_level("INFO"):
        assert world.search(400 * MIB) == 7
    assert world.hidden.freed == {"split": 398 * MIB - LEAST // 2, "reclaim": 0}
    assert [message["begin"] for message in world.worker.asked] == [True] + [False] * 6
    assert world.worker.asked[0]["skip"] == [17]
    assert caplog.messages == ["396 MiB hid in holes of huge pages, and are free now"]
    assert world.hidden.note is None
    assert world.search() == 0


def test_a_search_that_has_found_enough_is_over_and_the_next_begins_anew(world: World) -> None:
    world.worker.at_once = 500 * MIB
    world.worker.hide(900 * MIB)
    for left in (900 - 228, 900 - 2 * 228):
        assert world.hidden.free(100 * MIB)
        assert world.hidden.size == left * MIB
    assert [message["begin"] for message in world.worker.asked] == [True, True]


def test_no_more_is_looked_for_than_is_wanted_or_hides(world: World) -> None:
    """Processes without holes take as long to look through as others."""
    world.worker.at_once = 400 * MIB
    world.worker.hide(900 * MIB)
    assert world.search(200 * MIB)
    asked = [200 * MIB + ROOM, 200 * MIB + ROOM, 900 * MIB - 2 * (200 * MIB + ROOM) - LEAST // 2]
    assert [message["frames"] * FRAME for message in world.worker.asked] == asked
    assert world.hidden.size == LEAST // 2


def test_what_cannot_be_found_is_left_alone_for_longer_each_time(world: World) -> None:
    world.worker.hide(100 * MIB)
    world.worker.unfindable = 60 * MIB
    assert world.search()
    assert world.hidden.freed["split"] == 40 * MIB
    asked = len(world.worker.asked)
    world.now += FIRST_REST - 1
    assert world.search() == 0
    world.now += 1
    assert world.search()
    world.now += FIRST_REST
    assert world.search() == 0, "the second rest is longer"
    assert world.worker.ops.count("split") == asked + 1
    # What has come since is another matter.
    world.worker.hide(60 * MIB + LEAST)
    world.worker.unfindable = 0
    assert world.search()
    assert world.hidden.size < LEAST


def test_where_nothing_can_be_split_a_little_is_reclaimed_where_most_hides(world: World) -> None:
    world.worker.hide(300 * MIB)
    world.worker.answers["split"] = {
        "ok": True,
        "freed": 0,
        "done": True,
        "denied": 0,
        "problem": "split_huge_pages: Operation not permitted",
    }
    world.worker.reclaims = lambda text: min(world.worker.hidden, 70 * MIB)
    world.group("", 300 * MIB)
    world.group("system.slice", 20 * MIB)
    world.group("user.slice", 280 * MIB)
    world.group("user.slice/a", 2 * MIB)
    world.group("user.slice/b", 278 * MIB)
    assert world.search()
    assert world.hidden.freed == {"split": 0, "reclaim": 300 * MIB}
    paths = {message["path"] for message in world.worker.asked if message["op"] == "reclaim"}
    assert paths == {str(world.cgroup / "user.slice/b/memory.reclaim")}
    assert {message["text"] for message in world.worker.asked if message["op"] == "reclaim"} == {f"{RECLAIMED} swappiness=0"}
    # That splitting fails here is remembered.
    world.worker.hide(100 * MIB)
    assert world.search()
    assert world.worker.ops.count("split") == 1


@pytest.mark.parametrize("has_group", [False, True])
def test_without_control_groups_of_version_2_the_node_is_asked(world: World, has_group: bool) -> None:
    world.worker.hide(300 * MIB)
    world.worker.answers["split"] = {"ok": True, "freed": 0, "done": True, "denied": 0, "problem": "no debugfs"}
    world.worker.reclaims = lambda text: 150 * MIB
    for number, size in enumerate((20 * MIB, 280 * MIB, 0)):
        (world.nodes / f"node{number}").mkdir(parents=True)
        (world.nodes / f"node{number}/reclaim").write_text("")
        (world.nodes / f"node{number}/vmstat").write_text(vmstat(size // FRAME))
    # Comes and goes while it is read.
    (world.nodes / "node3").mkdir()
    (world.nodes / "node3/reclaim").write_text("")
    if has_group:
        world.group("", 300 * MIB)
    assert world.search()
    assert world.hidden.freed["reclaim"] == 300 * MIB
    expected = world.cgroup / "memory.reclaim" if has_group else world.nodes / "node1/reclaim"
    assert {message["path"] for message in world.worker.asked if message["op"] == "reclaim"} == {str(expected)}


def test_reclaim_that_frees_nothing_is_given_up(world: World) -> None:
    world.worker.hide(300 * MIB)
    world.worker.unfindable = 300 * MIB
    world.group("", 300 * MIB)
    assert world.search()
    assert world.worker.ops == ["split"] + ["reclaim"] * MOST_IN_VAIN
    assert world.search() == 0


def swaps(world: World) -> None:
    (world.worker.root / "proc/swaps").write_text("Filename Type Size Used Priority\n/dev/zram0 partition 1 0 5\n")


@pytest.mark.parametrize("has_swap", [False, True])
def test_a_kernel_without_swappiness_in_the_request_never_swaps_for_it(world: World, has_swap: bool) -> None:
    world.worker.hide(300 * MIB)
    world.worker.answers["split"] = {"ok": True, "freed": 0, "done": True, "denied": 0, "problem": "no debugfs"}
    world.group("", 300 * MIB)
    if has_swap:
        swaps(world)
    real = world.worker.ask

    def ask(message: dict[str, Any], *args: Any, **options: Any) -> Any:
        if "swappiness" in message.get("text", ""):
            world.worker.asked.append(message)
            return {"ok": True, "problem": errno.EINVAL}
        return real(message, *args, **options)

    world.worker.ask = ask  # type: ignore[method-assign]
    world.worker.reclaims = lambda text: 150 * MIB
    assert world.search()
    assert world.hidden.freed["reclaim"] == (0 if has_swap else 300 * MIB)
    if has_swap:
        why = f"{world.cgroup}/memory.reclaim knows no swappiness= on this kernel, and would swap out"
        assert world.hidden.note == f"no debugfs; {why}"
        world.now += 10 * FIRST_REST
        assert world.search() <= 1
        assert world.worker.ops.count("reclaim") == 1, "nothing is tried that is known not to work"


def test_where_there_is_no_means_it_is_said(world: World) -> None:
    world.worker.hide(300 * MIB)
    world.worker.answers["split"] = {"ok": True, "freed": 0, "done": True, "denied": 0, "problem": "no debugfs"}
    assert world.search()
    why = f"neither a memory.reclaim below {world.cgroup} nor one of a node below {world.nodes}"
    assert world.hidden.note == f"no debugfs; {why}"
    # The note goes with its reason.
    world.worker.hide(0)
    assert world.search() == 0
    assert world.hidden.note is None


def test_a_worker_that_hangs_is_asked_again_later(world: World) -> None:
    world.worker.hide(300 * MIB)
    world.worker.answers["split"] = "given up: holder w gave no answer to split within 10 s"
    assert world.search() == 1
    assert world.hidden.note == world.worker.answers["split"]
    del world.worker.answers["split"]
    assert world.search() == 0
    world.now += FIRST_REST
    assert world.search()
    assert world.hidden.size < LEAST
    assert world.hidden.note is None


def test_means_that_were_not_to_be_had_are_tried_again_later(world: World) -> None:
    """debugfs may be mounted by then."""
    world.worker.hide(300 * MIB)
    world.worker.answers["split"] = {"ok": True, "freed": 0, "done": True, "denied": 0, "problem": "no debugfs"}
    assert world.search()
    del world.worker.answers["split"]
    world.now += MEANS_KNOWN - 1
    assert world.search() <= 1
    world.now += 1
    assert world.search()
    assert world.hidden.freed["split"] >= 300 * MIB - LEAST
    assert world.hidden.note is None


def test_a_search_that_was_left_begins_anew(world: World) -> None:
    """Other processes may have the most memory by then, and the worker may be another one."""
    world.worker.hide(300 * MIB)
    assert world.hidden.free(300 * MIB)
    world.now += STALE - 1
    assert world.hidden.free(300 * MIB)
    world.now += STALE
    assert world.hidden.free(300 * MIB)
    assert [message["begin"] for message in world.worker.asked] == [True, False, True]


def test_for_who_waits_for_memory_it_is_short_and_evicts_nothing(world: World) -> None:
    world.worker.hide(300 * MIB)
    world.worker.unfindable = 280 * MIB
    world.group("", 300 * MIB)
    assert world.hidden.free(300 * MIB, at_need=True)
    assert (world.worker.terms, world.worker.asked[0]["seconds"]) == ([(DEADLINE_AT_NEED, False)], SECONDS_AT_NEED)
    assert not world.hidden.free(300 * MIB, at_need=True)
    assert world.worker.ops == ["split"]
    assert world.hidden.free(300 * MIB)
    assert world.worker.ops == ["split", "reclaim"]


def test_for_who_waits_for_memory_no_worker_is_started(world: World) -> None:
    """A new process needs memory, and seconds at worst."""
    world.worker.hide(300 * MIB)
    world.worker.is_up = False
    assert not world.hidden.free(300 * MIB, at_need=True)
    assert world.worker.asked == []
    assert world.hidden.free(300 * MIB)


@pytest.mark.parametrize(("error", "says"), [(errno.EROFS, True), (errno.ENOENT, False), (errno.ENODEV, False)])
def test_a_file_that_cannot_be_written_to_is_said_and_a_group_that_ends_is_not(world: World, error: int, says: bool) -> None:
    world.worker.hide(300 * MIB)
    world.worker.answers["split"] = {"ok": True, "freed": 0, "done": True, "denied": 0, "problem": "no debugfs"}
    world.worker.answers["reclaim"] = {"ok": True, "problem": error}
    world.group("", 300 * MIB)
    assert world.search()
    why = f"no debugfs; {world.cgroup}/memory.reclaim: Read-only file system"
    assert world.hidden.note == (why if says else None)
    assert world.worker.ops.count("reclaim") == (1 if says else MOST_IN_VAIN)


def test_what_gave_way_to_others_is_not_left_alone_for_it(world: World) -> None:
    world.worker.hide(300 * MIB)
    world.worker.unfindable = 300 * MIB
    world.group("", 300 * MIB)
    assert world.hidden.free(300 * MIB)
    world.worker.gave_way = True
    world.worker.answers["reclaim"] = "given up half-way: somebody else needs the memory"
    assert world.hidden.free(300 * MIB)
    world.worker.gave_way = False
    assert world.hidden.free(300 * MIB)
    assert world.worker.ops == ["split", "reclaim", "split"]
    assert world.hidden.note is None


def test_processes_that_may_not_be_looked_through_are_said(world: World) -> None:
    world.worker.hide(300 * MIB)
    world.worker.unfindable = 300 * MIB
    world.worker.denied = 3
    world.group("", 300 * MIB)
    assert world.search()
    assert world.hidden.note == "3 processes may not be looked through, which needs CAP_DAC_READ_SEARCH"


def test_what_cannot_be_told_is_not_looked_for(world: World) -> None:
    (world.worker.root / "proc/vmstat").write_text("nr_free_pages 7\n")
    assert world.search() == 0


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 2000 * MIB), st.integers(0, 2000 * MIB), st.floats(0, 4000)), max_size=8))
@pytest.mark.parametrize("wanted", [0, 100 * MIB, 1 << 62])
def test_it_always_comes_to_an_end(
    tmp_path_factory: pytest.TempPathFactory, wanted: int, happens: list[tuple[int, int, float]]
) -> None:
    world = World(tmp_path_factory.mktemp("guest"))
    world.group("", 300 * MIB)
    for hidden, unfindable, seconds in happens:
        world.worker.hide(hidden // FRAME * FRAME)
        world.worker.unfindable = min(hidden, unfindable) // FRAME * FRAME
        world.now += seconds
        world.search(wanted)
        assert world.search(wanted) == 0
