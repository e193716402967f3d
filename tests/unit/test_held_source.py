"""When room is made for huge pages, and when that is left alone."""

from __future__ import annotations

import os
from typing import Any, cast

import pytest

from balloon_agent.errors import Shortage, Unfinished
from balloon_agent.memory.frames import HUGE
from balloon_agent.memory.held_source import USELESS_ROOM_REST, HeldSource
from balloon_agent.memory.holders import Holders
from balloon_agent.memory.ledger import Ledger


class FragmentedHolders:
    """One holder, which finds no huge page."""

    name = "h"
    holds_memory = True

    def __iter__(self) -> Any:
        return iter([self])

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        assert message["op"] == "take"
        return {"ok": False, "error": "memory is fragmented"}


def test_no_more_blocks_are_emptied_for_huge_pages_that_do_not_come_of_it() -> None:
    made: list[float] = []
    clock = [0.0]

    def make_room() -> int:
        made.append(clock[0])
        return 128 << 20

    holders = cast("Holders", FragmentedHolders())
    source = HeldSource("thp", HUGE, holders, Ledger(), 1 << 30, make_room, lambda: clock[0])
    for clock[0] in (1.0, 3.0, 5.0, USELESS_ROOM_REST, USELESS_ROOM_REST + 2):
        assert source.portion(HUGE, 1 << 30, 64 << 20) == HUGE
        with pytest.raises(Shortage, match="fragmented"):
            source.take(HUGE)
    assert made == [1.0, USELESS_ROOM_REST + 2]


class OneHolder:
    """A holder that gives what it is asked for, and whose pins can be duplicated; counts how often they are."""

    name = "h"
    holds_memory = True

    def __init__(self) -> None:
        self.duplicated: list[int] = []

    def __iter__(self) -> Any:
        return iter([self])

    def __getitem__(self, name: str) -> OneHolder:
        assert name == self.name
        return self

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["op"] == "give_back":
            return {"ok": True, "failed": {}}
        answer = {"ok": True, "name": message["name"], "source": message.get("source"), "runs": [[512, 512]], "pin": 7}
        return answer | {"seconds": {"populate": 0.5}}

    def duplicate(self, pin: int) -> int:
        self.duplicated.append(pin)
        return os.open("/dev/null", os.O_RDONLY)


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


def test_room_is_made_for_all_that_is_wanted_before_any_of_it_is_used_up() -> None:
    """A block at a time, so that others have their turn; at the end the guest may have no block to spare for a moment."""
    asked: list[bool] = []
    made: list[int] = []

    class Holder(OneHolder):
        def request(self, message: dict[str, Any]) -> dict[str, Any]:
            asked.append(message["compact"])
            if len(made) < 3:
                return {"ok": False, "error": "memory is fragmented"}
            return super().request(message)

    def make_room() -> int:
        made.append(128)
        return 128 << 20

    source = HeldSource("thp", HUGE, cast("Holders", Holder()), Ledger(), 1 << 30, make_room)
    for _ in range(2):
        source.portion(300 << 20, 1 << 30, 64 << 20)
        with pytest.raises(Unfinished):
            source.take(64 << 20)
    (extent,) = source.take(64 << 20)
    assert len(made) == 3
    assert asked == [False, False], "what is slow comes last"
    source.settle(extent)


def test_where_no_block_can_be_emptied_the_kernel_is_asked_to_compact() -> None:
    asked: list[bool] = []

    class Holder(OneHolder):
        def request(self, message: dict[str, Any]) -> dict[str, Any]:
            asked.append(message["compact"])
            return super().request(message) if message["compact"] else {"ok": False, "error": "memory is fragmented"}

    source = HeldSource("thp", HUGE, cast("Holders", Holder()), Ledger(), 1 << 30, lambda: 0)
    source.portion(HUGE, 1 << 30, 64 << 20)
    (extent,) = source.take(HUGE)
    assert asked == [False, True]
    source.settle(extent)


def test_where_nothing_can_be_pinned_the_remedy_is_named_and_nothing_asked() -> None:
    source = HeldSource("thp", HUGE, cast("Holders", None), Ledger(), 1 << 30, obstacle="set kernel.io_uring_disabled=0")
    with pytest.raises(Shortage, match="io_uring_disabled=0"):
        source.take(HUGE)
