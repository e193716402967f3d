"""When room is made for huge pages, and when that is left alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest

from balloon_agent.errors import GaveWay, HolderLost, Shortage
from balloon_agent.frames import FRAME, HUGE
from balloon_agent.memory.holders import Holders
from balloon_agent.memory.ledger.ledger import Ledger
from balloon_agent.memory.sources.held import USELESS_ROOM_REST, HeldSource
from balloon_agent.memory.sources.source import MOST_RUNS


class FragmentedHolders:
    """One holder, which finds no huge page."""

    name = "h"
    holds_memory = True
    is_older = False
    gave_way = False

    def __iter__(self) -> Any:
        return iter([self])

    def set_fuse(self, on: bool) -> None:
        pass

    def request(self, message: dict[str, Any], *, takes: bool) -> dict[str, Any]:
        assert takes
        assert message["op"] == "take"
        return {"ok": False, "error": "memory is fragmented"}


def test_no_more_blocks_are_emptied_for_huge_pages_that_do_not_come_of_it(always: str) -> None:
    made: list[float] = []
    clock = [0.0]

    def make_room() -> int:
        made.append(clock[0])
        return 128 << 20

    holders = cast("Holders", FragmentedHolders())
    source = HeldSource("thp", HUGE, holders, Ledger(), 1 << 30, make_room, lambda: clock[0], thp_enabled=always)
    for clock[0] in (1.0, 3.0, 5.0, USELESS_ROOM_REST, USELESS_ROOM_REST + 2):
        assert source.portion(HUGE, 1 << 30, 64 << 20) == HUGE
        with pytest.raises(Shortage, match="fragmented"):
            source.take(HUGE)
    assert made == [1.0, USELESS_ROOM_REST + 2]


class OneHolder:
    """A holder that gives what it is asked for, and whose pins can be duplicated; counts how often they are."""

    name = "h"
    holds_memory = True
    is_older = False
    pagemap = None

    def __init__(self) -> None:
        self.duplicated: list[int] = []
        self.on_the_fuse = self.gave_way = False
        self.problem: str | None = None
        self.pieces = [[1 << 30, 512, 512]]
        # Whether it was while it took memory.
        self.fuse_at_takes: list[bool] = []

    def set_fuse(self, on: bool) -> None:
        self.on_the_fuse = on

    def __iter__(self) -> Any:
        return iter([self])

    def __getitem__(self, name: str) -> OneHolder:
        assert name == self.name
        return self

    def request(self, message: dict[str, Any], *, takes: bool = False) -> dict[str, Any]:
        assert takes == (message["op"] == "take")
        if message["op"] == "give_back":
            return {"ok": True, "failed": {}}
        self.fuse_at_takes.append(self.on_the_fuse)
        if self.problem is not None:
            return {"ok": False, "error": self.problem}
        answer = {
            "ok": True,
            "name": message["name"],
            "source": message.get("source"),
            "pieces": self.pieces,
            "pin": 7,
        }
        return answer | {"seconds": {"populate": 0.5}}

    def duplicate(self, pin: int) -> int:
        assert not self.on_the_fuse, "the OOM killer may have what is on its way to the host"
        self.duplicated.append(pin)
        return os.open("/dev/null", os.O_RDONLY)


def test_what_lies_scattered_is_taken_in_small_portions() -> None:
    """So that it can be given back in such, too."""
    holder = OneHolder()
    source = HeldSource("pages", FRAME, cast("Holders", holder), Ledger(), 1 << 30)
    step, small = 64 << 20, MOST_RUNS * FRAME
    # Of what nothing is known yet, the worst is to be expected.
    assert source.portion(1 << 30, 1 << 30, step) == small < step
    for runs, portion in ((1, step), (small // FRAME, small), (small // FRAME // 2, 2 * small), (8, step)):
        frames = small // FRAME // runs
        holder.pieces = [[(1 << 30) + FRAME * frames * 2 * at, frames * 2 * at, frames] for at in range(runs)]
        for extent in source.take(small):
            source.settle(extent)
        assert source.portion(1 << 30, 1 << 30, step) == portion


def test_only_what_is_not_on_its_way_is_on_the_fuse() -> None:
    """What is being taken is nobody's but the holder's yet; what it holds besides is on the fuse as before."""
    holder, ledger = OneHolder(), Ledger()
    source = HeldSource("thp", HUGE, cast("Holders", holder), ledger, 1 << 30)
    source.rest(True)
    assert not holder.on_the_fuse, "it holds nothing"
    for extent in source.take(HUGE):
        ledger.add(extent)
        source.settle(extent)
    source.rest(True)
    assert holder.on_the_fuse
    assert holder.fuse_at_takes == [True], "it had nothing to lose"
    source.take(HUGE)
    assert not holder.on_the_fuse
    source.rest(True)
    # A host that does not bear a loss, after the device was reset.
    source.rest(False)
    assert not holder.on_the_fuse
    source.take(HUGE)
    assert holder.fuse_at_takes == [True, True, False]


def test_who_gives_way_has_no_block_emptied_and_is_asked_again(always: str) -> None:
    """What is missing are not huge pages: somebody else needs the memory."""
    holder = Fragmented()
    holder.gave_way = True
    source = HeldSource("thp", HUGE, cast("Holders", holder), Ledger(), 1 << 30, holder.make_room, thp_enabled=always)
    with pytest.raises(GaveWay):
        source.take(HUGE)
    assert (len(holder.asked), holder.room) == (1, 0)
    holder.gave_way = False
    assert source.take(HUGE)
    assert holder.room


def test_who_gives_way_after_room_was_made_for_it_has_room_made_again(always: str) -> None:
    """It is no sign that room was not what was missing."""
    holder, made = Fragmented(), 0

    def make_room() -> int:
        nonlocal made
        made += 1
        # Somebody else is faster at first.
        holder.gave_way = made == 1
        holder.room = 0 if made == 1 else HUGE
        return HUGE

    source = HeldSource("thp", HUGE, cast("Holders", holder), Ledger(), 1 << 30, make_room, thp_enabled=always)
    with pytest.raises(GaveWay):
        source.take(HUGE, of=2 * HUGE)
    assert source.take(HUGE, of=2 * HUGE)
    assert made == 2


def test_who_holds_nothing_and_found_nothing_is_off_the_fuse_again() -> None:
    """The OOM killer would have nothing of it."""
    holder = OneHolder()
    source = HeldSource("thp", HUGE, cast("Holders", holder), Ledger(), 1 << 30)
    holder.problem = "memory is fragmented"
    with pytest.raises(Shortage):
        source.take(HUGE)
    assert holder.fuse_at_takes == [True]
    assert not holder.on_the_fuse


def test_what_cannot_be_taken_off_the_fuse_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when there are no more descriptors: it must not be posted, and nobody would know of it."""
    holder = OneHolder()
    source = HeldSource("thp", HUGE, cast("Holders", holder), Ledger(), 1 << 30)
    given_back: list[str] = []
    monkeypatch.setattr(source, "give_back", lambda extents: given_back.extend(extent.source for extent in extents))

    def fails(on: bool) -> None:
        if not on:
            raise OSError(24, "Too many open files")

    monkeypatch.setattr(holder, "set_fuse", fails)
    with pytest.raises(Shortage, match="Too many open files"):
        source.take(HUGE)
    assert given_back == ["thp"]


def test_an_extent_is_guarded_once_and_again_after_it_was_settled() -> None:
    """A device that failed is told of everything anew: of what was in flight, which is guarded still, and of what was not."""
    holder = OneHolder()
    source = HeldSource("thp", HUGE, cast("Holders", holder), Ledger(), 1 << 30)
    before = len(os.listdir("/proc/self/fd"))
    (extent,) = source.take(HUGE)
    source.guard(extent)
    source.guard(extent)
    assert holder.duplicated == [7]
    source.settle(extent)
    source.guard(extent)
    assert holder.duplicated == [7, 7]
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert not source.give_back([extent])
    assert len(os.listdir("/proc/self/fd")) == before
    assert not source._pins


def test_who_dies_before_it_could_be_guarded_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The OOM killer may have it until its answer has been read."""
    holder = OneHolder()
    source = HeldSource("thp", HUGE, cast("Holders", holder), Ledger(), 1 << 30)

    def dead(_: int) -> int:
        raise HolderLost("it died before its pin could be duplicated")

    monkeypatch.setattr(holder, "duplicate", dead)
    with pytest.raises(HolderLost, match="before its pin"):
        source.take(HUGE)
    assert not source._pins
    assert not source._pieces


@pytest.fixture
def always(tmp_path: Path) -> str:
    """Where the kernel says whom it gives huge pages: to everybody."""
    path = tmp_path / "enabled"
    path.write_text("[always] madvise never\n")
    return str(path)


class Fragmented(OneHolder):
    """There are huge pages for who has room made before, or has the kernel compact; ``room`` is in bytes."""

    def __init__(self, *, compacts: bool = False) -> None:
        super().__init__()
        self.room = 0
        self.fuses: list[bool] = []
        self.compacts = compacts
        self.asked: list[bool] = []

    def request(self, message: dict[str, Any], *, takes: bool = False) -> dict[str, Any]:
        if message["op"] != "take":
            return super().request(message, takes=takes)
        self.asked.append(message["compact"])
        self.fuses.append(self.on_the_fuse)
        if message["compact"] and self.compacts:
            return super().request(message, takes=takes)
        if self.room < message["count"] * HUGE:
            return {"ok": False, "error": "memory is fragmented"}
        self.room -= message["count"] * HUGE
        return super().request(message, takes=takes)

    def make_room(self) -> int:
        self.room += 128 << 20
        return 128 << 20


def test_room_is_made_faster_than_it_is_used_up(always: str) -> None:
    """At the end the guest may have no block to spare for a moment, and until then each step yields something."""
    holder = Fragmented()
    source = HeldSource("thp", HUGE, cast("Holders", holder), Ledger(), 1 << 30, holder.make_room, thp_enabled=always)
    wanted, rooms = 320 << 20, []
    while wanted:
        size = source.portion(wanted, 1 << 30, 64 << 20)
        (extent,) = source.take(size, of=wanted)
        source.settle(extent)
        wanted -= size
        rooms.append(holder.room >> 20)
    assert rooms == [64, 128, 192, 128, 64]
    assert not any(holder.asked), "what is slow comes last"


def test_no_room_is_made_for_more_than_is_wanted_now(always: str) -> None:
    holder = Fragmented()
    made: list[int] = []

    def make_room() -> int:
        made.append(128)
        return holder.make_room()

    source = HeldSource("thp", HUGE, cast("Holders", holder), Ledger(), 1 << 30, make_room, thp_enabled=always)
    source.take(source.portion(4 << 30, 8 << 30, 64 << 20), of=4 << 30)
    # The host has changed its mind.
    for _ in range(8):
        source.take(source.portion(HUGE, 8 << 30, 64 << 20), of=HUGE)
    assert len(made) <= 2


def test_where_no_block_can_be_emptied_the_kernel_is_asked_to_compact(always: str) -> None:
    holder = Fragmented(compacts=True)
    source = HeldSource("thp", HUGE, cast("Holders", holder), Ledger(), 1 << 30, lambda: 0, thp_enabled=always)
    source.take(HUGE)
    assert holder.asked == [False, True]


def test_who_found_nothing_is_on_the_fuse_while_it_looks_again(always: str) -> None:
    """The last way of looking, compaction, is the slowest of all."""
    holder, ledger = Fragmented(compacts=True), Ledger()
    source = HeldSource("thp", HUGE, cast("Holders", holder), ledger, 1 << 30, lambda: 0, thp_enabled=always)
    (extent,) = source.take(HUGE, of=2 * HUGE)
    ledger.add(extent)
    source.rest(True)
    source.take(HUGE)
    assert (holder.asked, holder.fuses) == ([False, True] * 2, [True] * 4)


def test_where_only_madvise_gives_huge_pages_it_is_asked_first(tmp_path: Path) -> None:
    """Otherwise blocks would be emptied for huge pages that lie ready."""
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    holder = Fragmented(compacts=True)
    source = HeldSource(
        "thp", HUGE, cast("Holders", holder), Ledger(), 1 << 30, holder.make_room, thp_enabled=str(tmp_path / "enabled")
    )
    source.take(HUGE)
    assert (holder.asked, holder.room) == ([True], 0)


def test_where_huge_pages_are_switched_off_no_block_is_emptied_for_them(tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    holder = Fragmented()
    source = HeldSource(
        "thp", HUGE, cast("Holders", holder), Ledger(), 1 << 30, holder.make_room, thp_enabled=str(tmp_path / "enabled")
    )
    with pytest.raises(Shortage, match="switched off: write madvise to"):
        source.take(HUGE)
    assert (holder.asked, holder.room) == ([], 0)


def test_where_nothing_can_be_pinned_the_remedy_is_named_and_nothing_asked() -> None:
    source = HeldSource("thp", HUGE, cast("Holders", None), Ledger(), 1 << 30, obstacle="set kernel.io_uring_disabled=0")
    with pytest.raises(Shortage, match="io_uring_disabled=0"):
        source.take(HUGE)
